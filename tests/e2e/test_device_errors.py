"""Devices that fail while other threads than that of the engine use them: they copy images to the device."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from torch import Tensor

import camserve
from camserve_server.config import Config, ModelConfig
from camserve_server.engine import engine, steps
from camserve_server.errors import InternalError
from camserve_server.models.model import Model
from camserve_server.plan import Image
from camserve_server.service.in_process import InProcessService
from camserve_server.service.listeners import SERVICE
from tests.conftest import serving
from tests.e2e.engines import wait_until
from tests.e2e.test_device_loads import broken_device
from tests.e2e.test_devices import IMAGE, NOT_SERVING, SERVING, SMALL, TWO, states
from tests.processes import LIMIT_S, patient_client
from tests.server.service.test_errors import method, request

ERROR = "CUDA error: an illegal memory access was encountered"


def let_images_fail(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the copies of images to a device fail, as those to a GPU whose context an operation has broken."""
    original = Model.image_of_row

    def failing(model: Model, row: Tensor) -> Image:
        if model.device_name == name and not threading.current_thread().name.startswith("engine"):
            raise RuntimeError(ERROR)
        return original(model, row)

    monkeypatch.setattr(Model, "image_of_row", failing)


@pytest.mark.slow
@pytest.mark.parametrize("front_ends", [1, 2])
def test_device_that_fails_while_it_receives_an_image_is_left_out(
    monkeypatch: pytest.MonkeyPatch, front_ends: int
) -> None:
    """Its engine has no batch that would fail. Without one, each later request would go to it, because it is idle."""
    with serving(Config(**TWO, frontends=front_ends)) as server, patient_client(server.address) as client:
        let_images_fail(monkeypatch, "cpu:0")
        with broken_device(monkeypatch, "cpu:0"):
            with pytest.raises(camserve.InternalError):
                client.explain(IMAGE, method="grad-cam")
            wait_until(lambda: states(server.address, "cpu:0") == [NOT_SERVING])
        assert states(server.address, SERVICE, "cpu:1") == [SERVING] * 2
        assert client.explain(IMAGE, method="grad-cam").receipt.device_name == "cpu:1"


def test_unexpected_exception_does_not_end_the_engine_of_a_device_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Config(**TWO)) as server, patient_client(server.address) as client:
        with monkeypatch.context() as patched:
            let_images_fail(patched, "cpu:0")
            with pytest.raises(camserve.InternalError):
                client.explain(IMAGE, method="grad-cam")
        assert client.explain(IMAGE, method="grad-cam").receipt.device_name == "cpu:0"
        assert states(server.address, SERVICE, "cpu:0", "cpu:1") == [SERVING] * 3


def test_service_without_listeners_fails_with_its_only_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines of bulk runs end their process then, so that another engine evaluates the images."""

    def check(device: Any) -> None:
        raise RuntimeError(ERROR)

    tiny = ModelConfig(name="tiny", **SMALL)
    service = InProcessService(Config(models=[tiny], device="cpu", threads=1, cache_dir=""))
    try:
        service.start()
        let_images_fail(monkeypatch, "")
        for module in (engine, steps):
            monkeypatch.setattr(module, "check_device", check)
        with pytest.raises(InternalError):
            service.submit(service.explain(request(model="tiny", method=method("grad-cam")))).result(LIMIT_S)
        assert isinstance(service.failed.exception(LIMIT_S), RuntimeError)
    finally:
        service.close()
