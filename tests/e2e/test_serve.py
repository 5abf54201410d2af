"""`camserve serve`: its start, its configuration, and its end."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import skimage.data
import torch
from safetensors.torch import save_file

import camserve
from camserve_server import __main__ as server_main
from camserve_server.config import read_config
from camserve_server.service.server import Server
from tests import nets
from tests.gated import GATE
from tests.processes import CAMSERVE, LIMIT_S, TINY, completed, environment, patient_client, served, started

CONFIG = """
listen = "127.0.0.1:0"
device = "cpu"
grace_s = 600

[[models]]
name = "tiny"
source = "python:tests.nets:tiny_cnn"
weights = "tiny.safetensors"
labels = "labels.txt"
input_size = [32, 32]
batch_size = 2
"""


def write_config(folder: Path) -> Path:
    """Write a configuration, weights and labels, and return the path of the configuration."""
    save_file(nets.tiny_cnn(seed=5).state_dict(), folder / "tiny.safetensors")
    (folder / "labels.txt").write_text("\n".join("abcdefg"))
    path = folder / "camserve.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


# ---- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_running_requests_finish(config: Path, number: signal.Signals) -> None:
    with served(config) as server, patient_client(server.address) as client:
        stream = client.explain_stream(skimage.data.chelsea(), method="opti-cam", parameters={"steps": 600})
        next(event for event in stream if isinstance(event, camserve.Progress))
        server.process.send_signal(number)
        events = list(stream)
        assert isinstance(events[-1], camserve.Explanation), "the running request is answered"
        assert server.process.wait(LIMIT_S) == 0
        with pytest.raises(camserve.Unavailable):
            client.models()


@contextmanager
def ignored(*numbers: signal.Signals) -> Iterator[None]:
    """Ignore these signals in processes that are started in this context."""
    before = [(number, signal.signal(number, signal.SIG_IGN)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


@pytest.mark.slow
def test_second_signal_ends_a_server_at_once(config: Path) -> None:
    """The server starts as under `nohup camserve serve &` in a script, with SIGHUP and SIGINT ignored."""
    with ExitStack() as stack:
        with ignored(signal.SIGHUP, signal.SIGINT):
            server = stack.enter_context(served(config))
        client = stack.enter_context(patient_client(server.address))
        stream = client.explain_stream(skimage.data.chelsea(), method="opti-cam", parameters={"steps": 10_000})
        next(event for event in stream if isinstance(event, camserve.Progress))
        server.process.send_signal(signal.SIGHUP)
        server.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + LIMIT_S
        while "draining" not in server.stderr():
            assert time.monotonic() < until
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(LIMIT_S) == -signal.SIGTERM
        with pytest.raises(camserve.CamserveError):
            list(stream)


@pytest.mark.slow
def test_second_signal_ends_a_server_at_once_while_it_warms_up_a_model(tmp_path: Path) -> None:
    path, gate = tmp_path / "camserve.toml", tmp_path / "gate"
    path.write_text(f'device = "cpu"\ncache_dir = ""\n{TINY.replace("nets:tiny_cnn", "gated:GatedOnEngine")}')
    gate.touch()
    command, until = [*CAMSERVE, "serve", "--config", str(path), "--listen", "127.0.0.1:0"], time.monotonic() + LIMIT_S
    with started(command, env=environment(**{GATE: str(gate)})) as process:
        while process.poll() is None:
            if Path(f"{gate}.reached").exists():
                process.send_signal(signal.SIGTERM)
            assert time.monotonic() < until
            time.sleep(0.02)
        assert process.returncode == -signal.SIGTERM


# ---- files and the log -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_weights_labels_and_log(config: Path, tmp_path: Path) -> None:
    """Weights and labels come from files, and the log contains neither labels nor paths of images."""
    pixels = skimage.data.chelsea()
    path = tmp_path / "secret-name.png"
    PIL.Image.fromarray(pixels).save(path)
    with served(config) as server, patient_client(server.address) as client:
        e = client.explain(path, method="grad-cam", target="e", request_id="req-1")
        with pytest.raises(camserve.InvalidArgument):
            client.explain(path, method="grad-cam", target="secret-label", request_id="req-2")
        (model,) = client.models()
        server.process.terminate()
        assert server.process.wait(LIMIT_S) == 0
        log = server.stderr()

    net = nets.tiny_cnn(seed=5)
    small = np.asarray(PIL.Image.fromarray(pixels).resize((32, 32), PIL.Image.Resampling.BILINEAR), np.float32) / 255
    x = (small - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    logits = net(torch.tensor(x, dtype=torch.float32).permute(2, 0, 1)[None])[0]
    assert e.target.index == 4
    assert e.target.logit == pytest.approx(float(logits[4]), abs=1e-4)
    assert model.digest == e.receipt.model_digest

    lines = [json.loads(line) for line in log.splitlines()]
    calls = {line["request_id"]: line for line in lines if line["event"] == "call"}
    assert (calls["req-1"]["code"], calls["req-1"]["rows"]) == ("OK", 2)
    assert calls["req-2"]["code"] == "INVALID_ARGUMENT"
    assert "secret" not in log


# ---- wrong configurations --------------------------------------------------------------------------------------------


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs `camserve serve` in this process and returns the exit status and standard error."""
    monkeypatch.setattr(server_main, "log_to_stderr", lambda config: None)  # it changes the logging of this process

    def run(**options: Any) -> tuple[int, str]:
        status = server_main.serve(**options)
        return status, capsys.readouterr().err

    return run


WRONG = [
    (("tiny.safetensors", "none.safetensors"), "models.tiny.weights: there is no file none.safetensors"),
    (('source = "python:tests.nets:tiny_cnn"', 'source = "python:tests.nets:none"'), "models.tiny.source"),
    (("tests.nets:tiny_cnn", "os:getcwdb"), "models.tiny.source: python:os:getcwdb returned a bytes"),
    (("tests.nets:tiny_cnn", "os:abort_not"), "models.tiny.source"),
    (("tests.nets:tiny_cnn", "tests.nets:calibrated"), "failed: TypeError"),
    (("labels.txt", "tiny.safetensors"), "models.tiny.labels"),
    (("batch_size", "batchsize"), "models.tiny.batchsize"),
    (('device = "cpu"', 'device = "tpu"'), "device"),
    (('device = "cpu"', 'device = "cuda:0"'), "device: cuda:0 was requested"),
    (('listen = "127.0.0.1:0"', 'listen = "here"'), "listen"),
    (("[32, 32]", '[32, "x"]'), "models.tiny.input_size"),
    (("[[models]]", "[[models"), "camserve.toml"),
    (("python:tests.nets:tiny_cnn", "embedded:efficientnet-lite0"), "weights of its own"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_configuration_names_the_key(config: Path, serve: Any, change: tuple[str, str], message: str) -> None:
    if "cuda" in message and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config.write_text(config.read_text().replace(*change))
    status, errors = serve(config=config)
    assert status == 2
    assert message in errors
    assert "Traceback" not in errors


def test_pickled_weights_with_code_are_refused(config: Path, serve: Any, tmp_path: Path) -> None:
    torch.save({"c1.weight": os.system}, tmp_path / "evil.pt")
    config.write_text(config.read_text().replace("tiny.safetensors", "evil.pt"))
    status, errors = serve(config=config)
    assert status == 2
    assert "evil.pt cannot be read: it contains the Python object" in errors
    assert "or a safetensors file" in errors


def test_port_in_use_is_an_error(config: Path, serve: Any, server: Server) -> None:
    status, errors = serve(config=config, listen=server.address)
    assert status == 2
    assert f"cannot bind {server.address}" in errors


@pytest.mark.slow
def test_process_exits_with_status_2_for_a_wrong_configuration(config: Path) -> None:
    change, message = WRONG[0]
    config.write_text(config.read_text().replace(*change))
    ended = completed([*CAMSERVE, "serve", "--config", str(config)])
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_options_override_the_environment_and_that_the_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text(config.read_text().replace("127.0.0.1:0", "no-address"))
    # Only root could bind port 1. The server must not try.
    with served(config, "--listen", "127.0.0.1:0", CAMSERVE_LISTEN="127.0.0.1:1") as server:
        assert not server.address.endswith(":1")
    monkeypatch.setenv("CAMSERVE_LISTEN", "127.0.0.1:2")
    assert read_config(config).listen == "127.0.0.1:2"
