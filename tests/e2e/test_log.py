"""The log of a server process: JSON lines with the id of their request, and without labels, paths or images."""

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
from tests.processes import LIMIT_S, ROOT, patient_client, served

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
NETWORK = '''
"""A network that fails, or runs out of memory, depending on its input."""

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
device = "cpu"

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
    PIL.Image.fromarray(skimage.data.chelsea()).save(tmp_path / "secret-image.png")
    return tmp_path


@pytest.mark.slow
def test_every_line_about_a_request_has_its_id(folder: Path) -> None:
    with (
        served(folder / "camserve.toml", PYTHONPATH=f"{ROOT}:{folder}") as server,
        patient_client(server.address) as client,
        grpc.insecure_channel(server.address) as channel,
    ):
        image = folder / "secret-image.png"
        client.explain(image, method="score-cam", target="secret-a", request_id="good")
        with pytest.raises(camserve.InvalidArgument):
            client.explain(image, method="grad-cam", target="secret-of-nobody", request_id="bad")
        client.explain(tensor(2e3), method="grad-cam", request_id="warned")
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
                timeout=LIMIT_S,
            )
        # After "tight", because a lack of memory is logged for all requests that the server has not ended yet.
        stream = client.explain_stream(image, method="opti-cam", parameters={"steps": 10_000}, request_id="left")
        next(event for event in stream if isinstance(event, camserve.Progress) and event.rows_done > 1)
        stream.close()
        client.models()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(LIMIT_S) == 0
        log = server.stderr()
    lines = [json.loads(line) for line in log.splitlines()]
    without_request = {line["event"] for line in lines if "request_id" not in line}
    [warning] = without_request - {"loaded", "ready", "draining"}
    assert "a library complains" in warning, "a batch can hold rows of several requests"
    about: dict[str, list[str]] = {}
    for line in lines:
        if "request_id" in line:
            about.setdefault(line["request_id"], []).append(line["event"])
    [listing] = set(about) - {"good", "bad", "warned", "left", "broken", "tight", "traced"}
    assert re.fullmatch("[0-9a-f]{32}", listing), "the server made this id"
    assert about.pop(listing) == ["call"]
    assert {name: sorted(events) for name, events in about.items()} == {
        "good": ["call"],
        "bad": ["call"],
        "warned": ["call"],
        "left": ["call"],
        "broken": ["call", "plan failed"],
        "tight": ["call", "out of memory, batch halved"],  # the forward pass of one row runs in a batch of one
        "traced": ["call", "plan failed"],
    }
    codes = {line["request_id"]: line["code"] for line in lines if line["event"] == "call"}
    assert codes["left"] == "CANCELLED"
    assert (codes["bad"], codes["broken"], codes["tight"]) == ("INVALID_ARGUMENT", "INTERNAL", "OK")
    assert [line.get("trace_id") for line in lines if line.get("request_id") == "traced"] == [TRACE, TRACE]
    assert not [line for line in lines if "trace_id" in line and line["request_id"] != "traced"]
    failed = next(line for line in lines if line["event"] == "plan failed")
    assert "RuntimeError: broken" in failed["exception"]
    assert "secret" not in log
    assert max(map(len, log.splitlines())) < 10_000, "a line contains an image"
