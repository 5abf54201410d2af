"""Requests of the page: one line of JSON, followed by the image."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from camserve.errors import InvalidArgument

__all__ = ["ExplainForm", "read_map", "split_body"]

# Limit for the number of methods of one request. The page cannot choose more than the server has.
_MAX_METHODS = 100
# Digits of a class index. Python refuses to convert some thousands of them.
_MAX_DIGITS = 20


@dataclass(frozen=True)
class ExplainForm:
    """The values of the page's form.

    Attributes:
        model: Name of the model.
        methods: Names of the methods, at least one.
        target: Class index or label; None selects the predicted class.
        budget: Maximum number of rows of each method, or None.
        seed: Seed of all random numbers.
    """

    model: str
    methods: tuple[str, ...]
    target: int | str | None
    budget: int | None
    seed: int

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> ExplainForm:
        """Read the form from JSON values.

        Args:
            fields: The values: model, methods, target, budget and seed. Digits in `target` are a class index.

        Raises:
            InvalidArgument: A value is missing or has another type; `field` names it.
        """
        methods = fields.get("methods")
        if not (isinstance(methods, list) and 0 < len(methods) <= _MAX_METHODS):
            raise InvalidArgument("no method is selected; select at least one", field="method")
        return cls(
            model=str(fields.get("model") or ""),
            methods=tuple(dict.fromkeys(map(str, methods))),
            target=_target(str(fields.get("target") or "")),
            budget=_integer(fields, "budget"),
            seed=_integer(fields, "seed") or 0,
        )


def split_body(body: bytes) -> tuple[dict[str, Any], bytes]:
    """Split a request into its values and the bytes after them.

    Args:
        body: A JSON object, a line feed, and bytes.

    Raises:
        InvalidArgument: The body has another form.
    """
    line, _, rest = body.partition(b"\n")
    try:
        fields = json.loads(line)
        json.dumps(fields, ensure_ascii=False).encode()  # messages of gRPC cannot contain lone surrogates
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise InvalidArgument("the request is malformed; expected a line of JSON and an image")
    return fields, rest


def read_map(fields: Mapping[str, Any], content: bytes) -> tuple[NDArray[np.float32], bytes]:
    """Read the map that an image follows.

    Args:
        fields: Values with the map's `height` and `width`.
        content: The map, float32 [height, width] in little-endian order, and the image.

    Returns:
        The map, and the bytes of the image.

    Raises:
        InvalidArgument: The size is missing or does not fit the content.
    """
    height, width = _integer(fields, "height") or 0, _integer(fields, "width") or 0
    size = 4 * height * width
    if height < 1 or width < 1 or size >= len(content):
        raise InvalidArgument("the request is malformed; expected a map and an image")
    return np.frombuffer(content[:size], "<f4").reshape(height, width), content[size:]


def _target(text: str) -> int | str | None:
    text = text.strip()
    is_index = text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS
    return int(text) if is_index else text or None


def _integer(fields: Mapping[str, Any], name: str) -> int | None:
    value = fields.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise InvalidArgument("the value is not a whole number; expected digits only", field=name)
