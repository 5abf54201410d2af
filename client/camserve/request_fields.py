"""Conversion of Python arguments to the fields of request messages.

Each function checks one argument and raises `InvalidArgument`, whose `field` names the field of the request.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from google.protobuf.struct_pb2 import Struct

from camserve import images
from camserve.errors import InvalidArgument
from camserve.v1 import explain_pb2 as pb

__all__ = [
    "BoxesLike",
    "Parameters",
    "TargetLike",
    "batch_sizes",
    "method_spec",
    "metric_specs",
    "positive_or_unset",
    "seed_value",
    "target_message",
    "target_messages",
    "truth_message",
]

TargetLike: TypeAlias = int | str
Parameters: TypeAlias = Mapping[str, Any]
BoxesLike: TypeAlias = Sequence[float] | Sequence[Sequence[float]]


def method_spec(
    name: str, parameters: Parameters | None, layers: str | Sequence[str] | None, seed: int
) -> pb.MethodSpec:
    """Return the message that selects a method, its parameters, layers and seed."""
    return pb.MethodSpec(
        name=name,
        parameters=_struct(parameters or {}, "method.parameters"),
        layers=[layers] if isinstance(layers, str) else layers or (),
        seed=seed_value(seed),
    )


def metric_specs(metrics: str | Sequence[str] | Mapping[str, Parameters]) -> list[pb.MetricSpec]:
    """Return one message for each metric, in the order of the argument."""
    names = [metrics] if isinstance(metrics, str) else metrics
    parameters_by_name = names if isinstance(names, Mapping) else {name: {} for name in names}
    return [
        pb.MetricSpec(name=name, parameters=_struct(parameters, "metrics.parameters"))
        for name, parameters in parameters_by_name.items()
    ]


def target_messages(target: TargetLike | Sequence[TargetLike] | None) -> list[pb.Target]:
    """Return one message for each target; an empty list selects the predicted class."""
    if target is None:
        return []
    if isinstance(target, Sequence) and not isinstance(target, str):
        return [target_message(each) for each in target]
    return [target_message(target)]


def target_message(target: TargetLike) -> pb.Target:
    """Return the message of one target: a class label (str) or a class index, 0 to 2³¹ − 1."""
    if isinstance(target, str):
        return pb.Target(label=target)
    return pb.Target(index=_integer(target, "target", 0, 2**31 - 1))


def batch_sizes(sizes: Mapping[str, int] | None) -> dict[str, int]:
    """Return the batch size of each kind of lane, each at least 1."""
    return {kind: positive_or_unset(size, "batch_sizes") for kind, size in (sizes or {}).items()}


def truth_message(boxes: BoxesLike | None, mask: object, image: pb.Image) -> pb.Truth | None:
    """Return the position of the target as a message, or None if neither boxes nor a mask are present.

    The message contains boxes as fractions of the width and height of the image.
    """
    if boxes is None and mask is None:
        return None
    return pb.Truth(
        boxes=[] if boxes is None else _box_messages(boxes, *images.size(image)),
        mask=None if mask is None else images.mask_to_wire(mask),
    )


def positive_or_unset(value: int | None, field: str, high: int = 2**31 - 1) -> int:
    """Return a value from 1 to `high`, or 0 for None. The contract defines 0 as "not set" for such fields."""
    return 0 if value is None else _integer(value, field, 1, high)


def seed_value(seed: int) -> int:
    """Return the seed, 0 to 2⁶⁴ − 1."""
    return _integer(seed, "seed", 0, 2**64 - 1)


def _box_messages(boxes: BoxesLike, width: int, height: int) -> list[pb.Box]:
    sides = np.atleast_2d(np.asarray(boxes, np.float64))
    if sides.ndim != 2 or sides.shape[1] != 4 or not len(sides):
        raise InvalidArgument(
            f"boxes has shape {list(sides.shape)}; expected one or more boxes (left, top, right, bottom)",
            field="truth.boxes",
        )
    for i, (left, top, right, bottom) in enumerate(sides):
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise InvalidArgument(
                f"the box is ({left:g}, {top:g}, {right:g}, {bottom:g}); expected (left, top, right, bottom) in "
                f"pixels with left < right and top < bottom, within the image of {width}x{height} pixels",
                field=f"truth.boxes[{i}]",
            )
    return [pb.Box(left=a / width, top=b / height, right=c / width, bottom=d / height) for a, b, c, d in sides]


def _integer(value: int, field: str, low: int, high: int) -> int:
    """Return `value`, which may be a numpy integer, as an int. Raises TypeError for other types."""
    number = operator.index(value)
    if not low <= number <= high:
        raise InvalidArgument(f"{field} is {number}; expected {low} to {high}", field=field)
    return number


def _struct(parameters: Parameters, field: str) -> Struct:
    struct = Struct()
    try:
        struct.update({name: v.item() if isinstance(v, np.generic) else v for name, v in parameters.items()})
    except (ValueError, OverflowError):
        raise InvalidArgument(
            f"the parameters are {parameters!r}; expected numbers, booleans or strings", field=field
        ) from None
    return struct
