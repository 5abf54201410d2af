"""The receipt of a map: how it goes into a file and comes back, and what differs between two of them."""

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
    """All that is needed to make the same map again; see the contract for each entry."""

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

    def to_json(self) -> str:
        """The receipt as a JSON object."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Receipt:
        """A receipt from a JSON object: one of `to_json`, or one with a "receipt" in it, as the command line writes.

        Raises InvalidArgument where there is none.
        """
        try:
            found = json.loads(text)
            if isinstance(found, dict):
                found = found.get("receipt", found)
            message = json_format.ParseDict(found, pb.Receipt(), ignore_unknown_fields=True)
        except (ValueError, TypeError, AttributeError, json_format.ParseError) as error:
            raise InvalidArgument(f"this is no receipt: {error}", field="receipt") from error
        if not message.model:
            raise InvalidArgument("this is no receipt: it names no model", field="receipt")
        return wire.read(cls, message)


def differences(then: Receipt, now: Receipt) -> dict[str, tuple[Any, Any]]:
    """What differs between two receipts, as (then, now), None for what one of them lacks; request ids do not count.

    Entries of mappings are named like "versions.torch", digests of maps by their class like "map_digests.281".
    """
    old, new = _entries(then), _entries(now)
    return {name: (old.get(name), new.get(name)) for name in old | new if old.get(name) != new.get(name)}


def _entries(receipt: Receipt) -> dict[str, Any]:
    fields = vars(receipt) | {"map_digests": dict(zip(receipt.targets, receipt.map_digests, strict=False))}
    del fields["request_id"]
    entries: dict[str, Any] = {}
    for name, value in fields.items():
        entries |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
    return entries
