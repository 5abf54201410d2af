"""Explanations of models that real servers run: MLServer and KServe.

MLServer pins other versions of packages than this project, so it needs an environment of its own. The variable
INFERENCE_SERVERS names the Python interpreters of such environments, separated by colons.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import skimage.data

from camserve_server.config import Config, ModelConfig
from tests import nets
from tests.conftest import serving
from tests.e2e.engines import wait_until
from tests.processes import LIMIT_S, free_port, patient_client

FILES = Path(__file__).parent.parent / "inference_servers"
IMAGE = skimage.data.chelsea()


def interpreter(package: str) -> str:
    """Return the Python interpreter that has the package; skip the test if there is none."""
    for python in filter(None, [sys.executable, *os.environ.get("INFERENCE_SERVERS", "").split(":")]):
        if subprocess.run([python, "-c", f"import {package}"], check=False, capture_output=True).returncode == 0:
            return python
    pytest.skip(f"INFERENCE_SERVERS names no Python interpreter with {package}")


def mlserver(python: str, folder: Path, weights: Path) -> tuple[list[str], int]:
    """Write the files of MLServer. Return its command and its gRPC port."""
    http_port, grpc_port, metrics_port = (free_port() for _ in range(3))
    settings = {"host": "127.0.0.1", "http_port": http_port, "grpc_port": grpc_port, "metrics_port": metrics_port}
    (folder / "settings.json").write_text(json.dumps({**settings, "parallel_workers": 0}))
    tensors = [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 32, 32]}]
    model = {"name": "net", "implementation": "mlserver_model.Net", "parameters": {"uri": str(weights), "version": "3"}}
    (folder / "model-settings.json").write_text(json.dumps({**model, "inputs": tensors}))
    return [str(Path(python).parent / "mlserver"), "start", str(folder)], grpc_port


def kserve(python: str, folder: Path, weights: Path) -> tuple[list[str], int]:
    """Return the command of KServe's model server and its gRPC port."""
    port = free_port()
    return [python, str(folder / "kserve_model.py"), str(weights), str(port)], port


@contextmanager
def started(package: str, folder: Path) -> Iterator[int]:
    """Run a server with the tiny network, and yield its gRPC port."""
    python = interpreter(package)
    for name in ("numpy_net.py", f"{package}_model.py"):
        shutil.copy(FILES / name, folder)
    weights = folder / "weights.npz"
    np.savez(weights, **{name: value.numpy() for name, value in nets.tiny_cnn().state_dict().items()})
    command, port = (mlserver if package == "mlserver" else kserve)(python, folder, weights)
    process = subprocess.Popen(command, cwd=folder, stdout=sys.stderr, stderr=sys.stderr)

    def accepts() -> bool:
        assert process.poll() is None, f"{package} has ended"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(accepts)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(LIMIT_S)


@pytest.mark.slow
@pytest.mark.parametrize("package", ["mlserver", "kserve"])
def test_maps_of_a_real_server_are_those_of_the_network_in_this_process(package: str, tmp_path: Path) -> None:
    with started(package, tmp_path) as port:
        remote = ModelConfig(name="remote", source=f"triton:127.0.0.1:{port}/net", batch_size=8)
        local = ModelConfig(name="local", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=8)
        config = Config(listen="127.0.0.1:0", models=[remote, local])
        with serving(config) as server, patient_client(server.address) as client:
            assert client.models()[0].input_size == (32, 32)
            for method in ("rise", "occlusion", "score-cam", "poly-cam+"):
                parameters = {"masks": 64} if method == "rise" else {}
                there, here = (
                    client.explain(IMAGE, model=each, method=method, parameters=parameters, metrics=["deletion"])
                    for each in ("remote", "local")
                )
                assert there.receipt.layers == here.receipt.layers
                np.testing.assert_allclose(there.saliency, here.saliency, atol=1e-5)
                assert there.maps[0].scores["deletion"] == pytest.approx(here.maps[0].scores["deletion"], abs=1e-5)
