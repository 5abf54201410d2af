"""The log of a server process: JSON alone, the request's id on every line about one, and no secrets."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import PIL.Image
import pytest
import skimage.data

import camserve
from camserve.v1 import explain_pb2 as pb
from camserve.v1 import explain_pb2_grpc
from tests.e2e.test_serve import process

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
NETWORK = '''
"""A network that breaks, or runs out of memory, as the input says."""

import warnings

import torch
from torch import nn

from tests import nets


class Shaky(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nets.tiny_cnn()

    def forward(self, x):
        if x.max() > 1e4:
            raise RuntimeError("broken")
        if x.min() < -1e4 and len(x) > 1:
            raise torch.OutOfMemoryError("no room")
        if x.max() > 1e3:
            warnings.warn("a library complains", stacklevel=1)
        return self.net(x)
'''
CONFIG = """
listen = "127.0.0.1:0"

[[models]]
name = "tiny"
source = "python:shaky:Shaky"
labels = "secret-labels.txt"
input_size = [32, 32]
batch_size = 2
"""


def tensor(value: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.full((3, 32, 32), value, np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shaky.py").write_text(NETWORK)
    (tmp_path / "camserve.toml").write_text(CONFIG)
    (tmp_path / "secret-labels.txt").write_text("\n".join(f"secret-{letter}" for letter in "abcdefg"))
    PIL.Image.fromarray(skimage.data.chelsea()).save(tmp_path / "secret-picture.png")
    return tmp_path


def test_every_line_about_a_request_has_its_id(folder: Path) -> None:
    root = str(Path(__file__).parents[2])
    config = str(folder / "camserve.toml")
    with (
        process("--config", config, PYTHONPATH=f"{root}:{folder}") as (running, address),
        camserve.Client(address) as client,
        grpc.insecure_channel(address) as channel,
    ):
        picture = folder / "secret-picture.png"
        client.explain(picture, method="score-cam", target="secret-a", request_id="good")
        with pytest.raises(camserve.InvalidArgument):
            client.explain(picture, method="grad-cam", target="secret-of-nobody", request_id="bad")
        client.explain(tensor(2e3), method="grad-cam", request_id="warned")
        stream = client.explain_stream(picture, method="opti-cam", parameters={"steps": 10_000}, request_id="left")
        next(event for event in stream if isinstance(event, camserve.Progress) and event.rows_done > 1)
        stream.close()
        with pytest.raises(camserve.InternalError):
            client.explain(tensor(2e4), method="grad-cam", request_id="broken")
        client.explain(tensor(-2e4), method="grad-cam", request_id="tight")
        broken = tensor(2e4)
        with pytest.raises(grpc.RpcError):
            explain_pb2_grpc.ExplainServiceStub(channel).Explain(
                pb.ExplainRequest(
                    request_id="traced",
                    image=pb.Image(tensor=pb.Tensor(shape=broken.shape, data=broken.tobytes())),
                    method=pb.MethodSpec(name="grad-cam"),
                ),
                metadata=(("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01"),),
                timeout=60,
            )
        client.models()
        running.send_signal(signal.SIGTERM)
        _, errors = running.communicate(timeout=120)
    lines = [json.loads(line) for line in errors.splitlines()]
    of_nobody = {line["event"] for line in lines if "request_id" not in line}
    [warning] = of_nobody - {"loaded", "ready", "draining"}
    assert "a library complains" in warning, "about a batch, which may be of many"
    about: dict[str, list[str]] = {}
    for line in lines:
        if "request_id" in line:
            about.setdefault(line["request_id"], []).append(line["event"])
    [listing] = set(about) - {"good", "bad", "warned", "left", "broken", "tight", "traced"}
    assert re.fullmatch("[0-9a-f]{32}", listing), "the server's own"
    assert about.pop(listing) == ["call"]
    assert {name: sorted(events) for name, events in about.items()} == {
        "good": ["call"],
        "bad": ["call"],
        "warned": ["call"],
        "left": ["call"],
        "broken": ["call", "plan failed"],
        "tight": ["call", *["out of memory, batch halved"] * 2],  # forward and gradient
        "traced": ["call", "plan failed"],
    }
    codes = {line["request_id"]: line["code"] for line in lines if line["event"] == "call"}
    assert codes["left"] == "CANCELLED"
    assert (codes["bad"], codes["broken"], codes["tight"]) == ("INVALID_ARGUMENT", "INTERNAL", "OK")
    assert [line.get("trace_id") for line in lines if line.get("request_id") == "traced"] == [TRACE, TRACE]
    assert not [line for line in lines if "trace_id" in line and line["request_id"] != "traced"]
    failed = next(line for line in lines if line["event"] == "plan failed")
    assert "RuntimeError: broken" in failed["exception"]
    assert "secret" not in errors
    assert max(map(len, errors.splitlines())) < 10_000, "no image"
