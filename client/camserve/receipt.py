"""Receipts of maps: conversion from and to JSON, and differences between two receipts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from google.protobuf import json_format

from camserve import wire
from camserve.errors import InvalidArgument
from camserve.v1 import explain_pb2 as pb

__all__ = ["Receipt", "differences"]


@dataclass(frozen=True)
class Receipt:
    """Data from which the maps of a response can be computed again.

    It does not contain the CPU or the number of threads.

    Attributes:
        request_id: Name of the request.
        model: Name of the model.
        model_digest: "sha256:…" of the weights.
        method: Name of the method. Empty if the caller supplied the map.
        parameters: All parameters of the method, defaults included.
        layers: Names of the layers, from fine to coarse.
        targets: Class index of each map.
        seed: Seed of all random numbers of the method.
        precision: Arithmetic of the model: "fp32", "tf32", "bf16", "fp16" or "fp64".
        device: Kind of device, such as "cpu" or "cuda".
        batch_sizes: Batch size of each kind of lane. The same sizes give bitwise identical maps on the
            same CPU with the same number of threads.
        preprocessing: Conversion of the image to the model's input, or "as given" for a tensor.
        versions: Versions of Python and of the packages that affect the maps, by name.
        budget: Number of rows after which a budget or a deadline stopped the method early; 0 if it was not stopped.
        input_digest: "sha256:…" of the model's input, float32 [C, H, W] in little-endian order.
        map_digests: "sha256:…" of each map, float32 [H, W] in little-endian order.
        device_name: Name of the device that computed the maps, such as "cuda:1", if the server has several. The maps do
            not depend on it.
    """

    request_id: str
    model: str
    model_digest: str
    method: str
    parameters: dict[str, Any]
    layers: tuple[str, ...]
    targets: tuple[int, ...]
    seed: int
    precision: str
    device: str
    batch_sizes: dict[str, int]
    preprocessing: str
    versions: dict[str, str]
    budget: int
    input_digest: str
    map_digests: tuple[str, ...]
    device_name: str = ""

    def to_json(self) -> str:
        """Return the receipt as a JSON object."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Receipt:
        """Read a receipt from JSON.

        Args:
            text: JSON object that `to_json` wrote, or an object with such an object as its "receipt", as the command
                line writes it. Unknown fields are ignored.

        Returns:
            The receipt.

        Raises:
            InvalidArgument: The text is not JSON or contains no valid receipt.
        """
        try:
            data = json.loads(text)
            if isinstance(data, dict):
                data = data.get("receipt", data)
            message = json_format.ParseDict(data, pb.Receipt(), ignore_unknown_fields=True)
        except (ValueError, TypeError, AttributeError, RecursionError, json_format.ParseError) as error:
            raise InvalidArgument(
                f"the text is not a receipt: {error}; expected the JSON of Receipt.to_json", field="receipt"
            ) from error
        if not message.model:
            raise InvalidArgument(
                "the text is not a receipt: it names no model; expected the JSON of Receipt.to_json", field="receipt"
            )
        return wire.to_dataclass(cls, message)


def differences(then: Receipt, now: Receipt) -> dict[str, tuple[Any, Any]]:
    """Return the differences between two receipts, without the request ids and the names of devices.

    Args:
        then: The earlier receipt.
        now: The later receipt.

    Returns:
        (then, now) by name of the entry, with None for a value that a receipt does not contain. Entries of mappings
        have names such as "versions.torch". Digests of maps have the class index in their name: "map_digests.281".
    """
    old, new = _flat_entries(then), _flat_entries(now)
    return {name: (old.get(name), new.get(name)) for name in old | new if old.get(name) != new.get(name)}


def _flat_entries(receipt: Receipt) -> dict[str, Any]:
    fields = vars(receipt) | {"map_digests": dict(zip(receipt.targets, receipt.map_digests, strict=False))}
    del fields["request_id"], fields["device_name"]
    entries: dict[str, Any] = {}
    for name, value in fields.items():
        entries |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
    return entries
