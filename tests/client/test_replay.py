"""Receipts and replays, against the fake server."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

import camserve
from camserve import Receipt
from camserve_cli.app import app
from tests.client.fake_server import Servicer


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"}, input=stdin)


# ---- receipts -------------------------------------------------------------------------------------------------------

FULL: dict[str, Any] = {
    "seed": 2**64 - 1,
    "layers": ["a", "b"],
    "parameters": {"n": 3, "rate": 0.1, "norm": "max", "soft": True},
}


def test_receipt_json_round_trip(client: camserve.Client, pixels: NDArray[np.uint8]) -> None:
    receipt = client.explain(pixels, target=[8, 7], budget=2**40, **FULL).receipt
    again = Receipt.from_json(receipt.to_json())
    assert again == receipt
    assert list(again.parameters) == ["n", "norm", "rate", "soft"], "sorted, so that files can be compared"
    assert [type(value) for value in again.parameters.values()] == [type(v) for v in receipt.parameters.values()]
    inside = json.dumps({"image": "dog.jpg", "receipt": json.loads(receipt.to_json())})
    assert Receipt.from_json(inside.encode()) == receipt


def test_unknown_receipt_fields_are_ignored(client: camserve.Client, pixels: NDArray[np.uint8]) -> None:
    receipt = client.explain(pixels).receipt
    assert Receipt.from_json(json.dumps({**json.loads(receipt.to_json()), "later": [1]})) == receipt


NO_JSON = ["", "words", b"\xff\xfe", "{}\n{}"]
NO_RECEIPT = ["[]", "5", "null", "{}", '{"receipt": null}', '{"receipt": {}}', '{"version": "5.1", "shapes": []}']
WRONG = ['{"model": "m", "seed": -1}', '{"model": "m", "layers": 5}', '{"model": "m", "targets": ["a"]}']


@pytest.mark.parametrize("text", [*NO_JSON, *NO_RECEIPT, *WRONG], ids=lambda text: repr(text)[:20])
def test_invalid_receipt_json_raises(text: Any) -> None:
    with pytest.raises(camserve.InvalidArgument, match="the text is not a receipt") as caught:
        Receipt.from_json(text)
    assert caught.value.field == "receipt"


# ---- replays --------------------------------------------------------------------------------------------------------


def test_replay_sends_the_request_of_the_receipt(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8]
) -> None:
    receipt = client.explain(pixels, model="m", method="opti-cam", top_k=2, budget=9, **FULL).receipt
    again = client.replay(receipt, pixels, request_id="second")
    assert (again.same, again.differences) == (True, {})
    assert [each.target.index for each in again.explanation.maps] == [281, 8]
    first, second = servicer.requests
    for request in (first, second):
        request.request_id = ""
    first.target_top_k = 0
    first.targets.extend(camserve.v1.explain_pb2.Target(index=index) for index in (281, 8))
    first.batch_sizes["score"], first.precision = 16, "fp32"  # the defaults of the server
    assert first == second


def test_replay_names_all_differences(servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8]) -> None:
    receipt = client.explain(pixels, parameters={"n": 3}).receipt
    servicer.saliency = servicer.saliency * 0.5
    servicer.receipt_overrides = {
        "device": "cuda",
        "versions": {"torch": "3", "timm": "1"},
        "batch_sizes": {"score": 8},
    }
    servicer.receipt_overrides |= {"parameters": {"n": 3, "m": 1}}
    again = client.replay(receipt, pixels)
    digest = again.differences.pop("map_digests.281")
    assert digest == (receipt.map_digests[0], again.explanation.receipt.map_digests[0])
    assert again.differences == {
        "device": ("cpu", "cuda"),
        "versions.camserve": ("0", None),
        "versions.torch": ("2", "3"),
        "versions.timm": (None, "1"),
        "batch_sizes.score": (16, 8),
        "parameters.m": (None, 1),
    }
    assert not again.same


def test_replay_of_another_image_reports_the_input_digest(client: camserve.Client, pixels: NDArray[np.uint8]) -> None:
    again = client.replay(client.explain(pixels).receipt, 255 - pixels)
    assert list(again.differences) == ["input_digest"]
    assert again.same, "the fake server always returns the same map"


def test_receipts_without_method_or_digests_raise(
    servicer: Servicer, client: camserve.Client, pixels: NDArray[np.uint8], ramp: NDArray[np.float32]
) -> None:
    supplied_map_receipt = client.evaluate(pixels, saliency=ramp).receipt
    with pytest.raises(camserve.InvalidArgument, match="names no method") as caught:
        client.replay(supplied_map_receipt, pixels)
    assert caught.value.field == "receipt.method"
    old = dataclasses.replace(client.explain(pixels).receipt, map_digests=())
    with pytest.raises(camserve.InvalidArgument, match="no map digests"):
        client.replay(old, pixels)
    assert len(servicer.requests) == 2
