"""A server with two GPUs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import skimage.data
import torch
from numpy.typing import NDArray

import camserve
from camserve_server.config import Config, ModelConfig
from tests.conftest import serving
from tests.processes import patient_client

METHODS = ("poly-cam", "score-cam", "grad-cam", "integrated-gradients", "opti-cam")


def config(device: str) -> Config:
    network = {"source": "python:tests.nets:tiny_cnn", "input_size": (32, 32), "batch_size": 4, "compile": False}
    model = ModelConfig.model_validate({"name": "tiny", "precision": ["fp32", "fp16"], **network})
    return Config(listen="127.0.0.1:0", device=device, models=[model])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_maps_of_the_cpu() -> None:
    images = [np.roll(skimage.data.chelsea(), 40 * i, axis=1) for i in range(4)]
    requests = [(method, image) for image in range(len(images)) for method in METHODS]
    maps = []
    for device in ("cpu", "cuda:0,1"):
        with serving(config(device)) as server, patient_client(server.address) as client:

            def saliency(method: str, image: int, client: camserve.Client = client) -> NDArray[np.float32]:
                parameters = {"steps": 5} if method == "opti-cam" else None
                return client.explain(images[image], method=method, parameters=parameters).saliency

            with ThreadPoolExecutor(len(requests)) as pool:
                maps.append([*pool.map(saliency, *zip(*requests, strict=True))])
            assert all(engine.counters.batches for engine in server.engines.local), "each device has work"
    for on_cpu, on_gpu in zip(*maps, strict=True):
        np.testing.assert_allclose(on_gpu, on_cpu, rtol=0, atol=2e-3)
