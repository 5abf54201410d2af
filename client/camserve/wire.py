"""From protobuf's messages to plain Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from google.protobuf.struct_pb2 import ListValue, Struct, Value

__all__ = ["read"]

T = TypeVar("T")


def read(kind: Callable[..., T], message: Any, **given: Any) -> T:
    """A dataclass from the message's fields of the same names, but for those that are given."""
    names = (entry.name for entry in fields(kind))  # type: ignore[arg-type] # every kind here is a dataclass
    return kind(**given, **{name: _plain(getattr(message, name)) for name in names if name not in given})


def _plain(value: Any) -> Any:  # noqa: PLR0911 - a case each
    """A field's value without protobuf in it.

    Whole numbers of a Struct become int: on the wire all are floats. Maps are sorted: on the wire they have no order.
    """
    match value:
        case Value():
            kind = value.WhichOneof("kind") or "null_value"
            inner = None if kind == "null_value" else getattr(value, kind)
            return int(inner) if isinstance(inner, float) and inner.is_integer() else _plain(inner)
        case Struct():
            return {key: _plain(each) for key, each in sorted(value.fields.items())}
        case ListValue():
            return [_plain(each) for each in value.values]
        case str() | bytes():
            return value
        case Mapping():
            return dict(sorted(value.items()))
        case Sequence():
            return tuple(value)
        case _:
            return value
