"""`camserve serve` as a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import skimage.data
import torch
from safetensors.torch import save_file

import camserve
from tests import nets

CONFIG = """
listen = "127.0.0.1:0"
device = "cpu"

[[models]]
name = "tiny"
source = "python:tests.nets:tiny_cnn"
weights = "tiny.safetensors"
labels = "labels.txt"
input_size = [32, 32]
batch_size = 2
"""


@contextmanager
def process(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address, once it says that it is ready."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment}
    command = [sys.executable, "-m", "camserve_cli", "serve", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as running:
        try:
            assert running.stdout is not None
            ready = running.stdout.readline()
            found = re.fullmatch(r"camserve is ready on (127\.0\.0\.1:\d+), serving tiny\n", ready)
            assert found, ready + (running.stderr.read() if running.stderr and running.poll() is not None else "")
            yield running, found[1]
        finally:
            running.kill()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    net = nets.tiny_cnn(seed=5)
    save_file(net.state_dict(), tmp_path / "tiny.safetensors")
    (tmp_path / "labels.txt").write_text("\n".join("abcdefg"))
    path = tmp_path / "camserve.toml"
    path.write_text(CONFIG)
    return path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_and_drains(config: Path, number: signal.Signals) -> None:
    """A signal lets the running request finish, then the process ends with 0."""
    with process("--config", str(config)) as (running, address), camserve.Client(address) as client:
        stream = client.explain_stream(skimage.data.chelsea(), method="opti-cam", parameters={"steps": 600})
        next(event for event in stream if isinstance(event, camserve.Progress))
        running.send_signal(number)
        events = list(stream)
        assert isinstance(events[-1], camserve.Explanation), "what runs is finished"
        assert running.wait(30) == 0
        with pytest.raises(camserve.Unavailable):
            client.models()


def test_a_second_signal_ends_at_once(config: Path) -> None:
    with process("--config", str(config)) as (running, address), camserve.Client(address, timeout=300) as client:
        stream = client.explain_stream(skimage.data.chelsea(), method="opti-cam", parameters={"steps": 10_000})
        next(event for event in stream if isinstance(event, camserve.Progress))
        running.send_signal(signal.SIGTERM)
        assert running.stderr is not None
        while "draining" not in running.stderr.readline():
            pass
        running.send_signal(signal.SIGTERM)
        assert running.wait(10) == -signal.SIGTERM
        with pytest.raises(camserve.CamserveError):
            list(stream)


def test_weights_and_labels_come_from_files(config: Path) -> None:
    picture = skimage.data.chelsea()
    with process("--config", str(config)) as (_, address), camserve.Client(address) as client:
        e = client.explain(picture, method="grad-cam", target="e")
        (model,) = client.models()
    net = nets.tiny_cnn(seed=5)
    small = np.asarray(PIL.Image.fromarray(picture).resize((32, 32), PIL.Image.Resampling.BILINEAR), np.float32) / 255
    x = (small - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    logits = net(torch.tensor(x, dtype=torch.float32).permute(2, 0, 1)[None])[0]
    assert e.target.index == 4
    assert e.target.logit == pytest.approx(float(logits[4]), abs=1e-4)
    assert model.digest == e.receipt.model_digest


def test_the_log_holds_no_label_and_no_path(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "secret-name.png"
    PIL.Image.fromarray(skimage.data.chelsea()).save(path)
    with process("--config", str(config)) as (running, address), camserve.Client(address) as client:
        client.explain(path, method="grad-cam", target="e", request_id="req-1")
        with pytest.raises(camserve.InvalidArgument):
            client.explain(path, method="grad-cam", target="secret-label", request_id="req-2")
        running.terminate()
        _, errors = running.communicate(timeout=30)
    lines = [json.loads(line) for line in errors.splitlines()]
    calls = {line["request_id"]: line for line in lines if line["event"] == "call"}
    assert (calls["req-1"]["code"], calls["req-1"]["rows"]) == ("OK", 2)
    assert calls["req-2"]["code"] == "INVALID_ARGUMENT"
    assert "secret" not in errors


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("tiny.safetensors", "none.safetensors"), "models.tiny.weights: there is no file none.safetensors"),
        (('source = "python:tests.nets:tiny_cnn"', 'source = "python:tests.nets:none"'), "models.tiny.source"),
        (("tests.nets:tiny_cnn", "os:getcwdb"), "models.tiny.source: python:os:getcwdb gave a bytes"),
        (("tests.nets:tiny_cnn", "os:abort_not"), "models.tiny.source"),
        (("tests.nets:tiny_cnn", "tests.nets:calibrated"), "failed: TypeError"),
        (("labels.txt", "tiny.safetensors"), "models.tiny.labels"),
        (("batch_size", "batchsize"), "models.tiny.batchsize"),
        (('device = "cpu"', 'device = "tpu"'), "device"),
        (('device = "cpu"', 'device = "cuda:0"'), "device: cuda:0 was asked for"),
        (('listen = "127.0.0.1:0"', 'listen = "here"'), "listen"),
        (("[32, 32]", '[32, "x"]'), "models.tiny.input_size"),
        (("[[models]]", "[[models"), "camserve.toml"),
        (("python:tests.nets:tiny_cnn", "embedded:efficientnet-lite0"), "weights of its own"),
    ],
)
def test_a_wrong_configuration_names_the_key(config: Path, change: tuple[str, str], says: str) -> None:
    if "cuda" in says and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    config.write_text(config.read_text().replace(*change))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "camserve_cli", "serve", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_pickled_weights_with_code_are_refused(config: Path, tmp_path: Path) -> None:
    torch.save({"c1.weight": os.system}, tmp_path / "evil.pt")
    config.write_text(config.read_text().replace("tiny.safetensors", "evil.pt"))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "camserve_cli", "serve", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)
    assert done.returncode == 2
    assert "without unpickling code" in done.stderr


def test_flags_go_before_the_environment_and_that_before_the_file(config: Path) -> None:
    taken = "127.0.0.1:1"  # nobody but root could bind it, and it must not be tried
    with process("--config", str(config), "--listen", "127.0.0.1:0", CAMSERVE_LISTEN=taken) as (_, address):
        assert not address.endswith(":1")
    config.write_text(config.read_text().replace("127.0.0.1:0", "no-address"))
    with process("--config", str(config), CAMSERVE_LISTEN="127.0.0.1:0"):
        pass


def test_a_port_that_is_taken(config: Path) -> None:
    with process("--config", str(config)) as (_, address):
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-m", "camserve_cli", "serve", "--config", str(config), "--listen", address]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)
    assert done.returncode == 2
    assert f"cannot bind {address}" in done.stderr
