"""The format of the maps of a response: the type of their values, and their resolution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from camserve.v1 import explain_pb2 as pb
from camserve_server.errors import InvalidArgument
from camserve_server.plan import SaliencyMaps
from camserve_server.request_plan import MethodCall
from camserve_server.request_result import finish_maps
from camserve_server.rows import minmax

ITEM_BYTES = {"float32": 4, "float16": 2, "uint8": 1}
DTYPES = tuple(ITEM_BYTES)

# A map that the server restores from its native resolution may differ by this much. Another implementation of the same
# arithmetic in float32 adds up to 4e-7, so the map that a caller restores differs by less than 1e-6.
MAX_DIFFERENCE = 5e-7


@dataclass(frozen=True)
class MapFormat:
    """The checked format of the maps of a response.

    Attributes:
        dtype: The type of the values, one of `DTYPES`.
        native: Return maps at the resolution of the method if they can be restored.
    """

    dtype: str = "float32"
    native: bool = False


def parse(message: pb.MapFormat, call: MethodCall | None) -> MapFormat:
    """Check the format that a request asks for.

    Args:
        message: The message of the caller; empty for the default.
        call: The method that makes the maps; None if the request brings a map, which is never returned at another size.

    Raises:
        InvalidArgument: The type is unknown, or the method scales its maps itself.
    """
    if message.dtype not in ("", *DTYPES):
        raise InvalidArgument(
            f"the type of the maps is {message.dtype!r}; expected {', '.join(DTYPES)} or empty",
            field="map_format.dtype",
        )
    if call is None:
        return MapFormat(message.dtype or "float32")
    if message.native:
        check_scaling(call.method.own_scaling(**call.parameters))
    return MapFormat(message.dtype or "float32", message.native)


def check_scaling(own_scaling: bool) -> None:
    """Raise InvalidArgument if the maps cannot be restored because the method scales them itself."""
    if own_scaling:
        raise InvalidArgument(
            "the method with these parameters scales its maps itself, so they cannot be returned at native resolution; "
            "omit map_format.native",
            field="map_format.native",
        )


def native_maps(raw: Tensor, maps: Tensor, *, own_scaling: bool) -> list[Tensor]:
    """Return each map at its native resolution if the map at input size can be restored from it.

    Args:
        raw: The maps [T, h, w] of the method, on the host.
        maps: The same maps [T, H, W] in [0, 1] at the input size of the model, on the host.
        own_scaling: The method has resized and scaled the maps itself.

    Returns:
        The map [h, w] in [0, 1] of each target. A map is [H, W] if that is not larger, or if the map that is resized
        and scaled from [h, w] would differ: if its contrast is low for float32, or if it is computed in float64.

    Raises:
        InvalidArgument: The method has resized and scaled the maps itself, although it is not registered so.
    """
    check_scaling(own_scaling)
    if raw.shape[-2:].numel() >= maps.shape[-2:].numel():
        return [*maps]
    native = minmax(raw.float()).nan_to_num(nan=0.0)  # a map that is not finite is returned as zeros
    restored, _ = finish_maps(SaliencyMaps(native), (maps.shape[-2], maps.shape[-1]))
    differences = (restored - maps).abs().amax(dim=(-2, -1))
    return [
        small if difference <= MAX_DIFFERENCE else large
        for small, large, difference in zip(native, maps, differences.tolist(), strict=True)
    ]


def tensor(values: Tensor, dtype: str = "float32") -> pb.Tensor:
    """Return the message for a tensor of any shape. The arguments are those of `set_tensor`."""
    message = pb.Tensor()
    set_tensor(message, values, dtype)
    return message


def set_tensor(message: pb.Tensor, values: Tensor, dtype: str = "float32") -> None:
    """Set the fields of a message to a tensor of any shape, little-endian.

    Args:
        message: An empty message.
        values: The values, in [0, 1] if the type is "uint8".
        dtype: The type of the values in the message, one of `DTYPES`.
    """
    values = values.cpu()
    message.shape.extend(values.shape)
    if dtype == "float32":  # The message has no type, so that it is the same as before types existed.
        message.data = values.numpy().astype("<f4", copy=False).tobytes()
        return
    message.dtype = dtype
    if dtype == "uint8":
        message.data = np.rint(255 * values.numpy()).astype(np.uint8).tobytes()
    else:
        message.data = values.half().numpy().astype("<f2", copy=False).tobytes()  # torch converts faster than NumPy
