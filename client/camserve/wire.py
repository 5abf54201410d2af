"""Conversion of protobuf messages to Python dataclasses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from google.protobuf.struct_pb2 import ListValue, Struct, Value

__all__ = ["to_dataclass"]

T = TypeVar("T")


def to_dataclass(kind: Callable[..., T], message: Any, **overrides: Any) -> T:
    """Create a dataclass instance from the fields of a message that have the same names.

    Args:
        kind: The dataclass.
        message: The protobuf message.
        **overrides: Values of fields that are not converted from the message.

    Returns:
        The instance. It contains no protobuf types.
    """
    names = (entry.name for entry in fields(kind))  # type: ignore[arg-type] # Every `kind` is a dataclass.
    values = {name: _to_python(getattr(message, name)) for name in names if name not in overrides}
    return kind(**overrides, **values)


def _to_python(value: Any) -> Any:
    """Convert the value of a field to plain Python types.

    Integral numbers of a Struct become int, because a Struct stores all numbers as floats. Mappings are sorted by key,
    because protobuf maps have no order.
    """
    match value:
        case Value():
            kind = value.WhichOneof("kind") or "null_value"
            inner = None if kind == "null_value" else getattr(value, kind)
            return int(inner) if isinstance(inner, float) and inner.is_integer() else _to_python(inner)
        case Struct():
            return {key: _to_python(each) for key, each in sorted(value.fields.items())}
        case ListValue():
            return [_to_python(each) for each in value.values]
        case Mapping():
            return dict(sorted(value.items()))
        case Sequence() if not isinstance(value, str | bytes):
            return tuple(value)
        case _:
            return value
