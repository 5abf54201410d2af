"""Loads of models on several devices, of which one fails or has little memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from camserve.v1 import admin_pb2 as admin
from camserve.v1.admin_pb2_grpc import AdminServiceStub
from camserve_server import model_pool
from camserve_server.config import Config, ModelConfig, read_config
from camserve_server.engine import engine, steps, warmup
from camserve_server.engine.lanes.dispatch import BatchSlice, Lane, run_batch
from camserve_server.errors import OutOfMemory
from camserve_server.models.model import Model
from camserve_server.service.listeners import SERVICE
from camserve_server.torch_setup import threads
from tests.conftest import serving
from tests.e2e.test_devices import IMAGE, NOT_SERVING, RISE, SERVING, SMALL, TWO, first_device_busy, states, write
from tests.processes import patient_client


@pytest.mark.slow
@pytest.mark.parametrize(("most_rows", "expected"), [(8, 8), (1, 1)])
def test_device_with_less_free_memory_halves_the_measured_batch_sizes_of_all(
    monkeypatch: pytest.MonkeyPatch, most_rows: int, expected: int
) -> None:
    def limited(model: Model, lane: Lane, slices: Sequence[BatchSlice], size: int) -> None:
        if model.device_name == "cpu:1" and size > most_rows:
            raise torch.OutOfMemoryError("no memory")
        run_batch(model, lane, slices, size)

    monkeypatch.setattr(warmup, "run_batch", limited)
    monkeypatch.setitem(warmup.SIZES, "cpu", (32,))
    tiny = ModelConfig(**{**SMALL, "name": "tiny", "batch_size": None})
    with serving(Config(**{**TWO, "models": [tiny]})) as server, patient_client(server.address) as client:
        first = client.explain(IMAGE, **RISE)
        with first_device_busy(server, client):
            second = client.explain(IMAGE, **RISE)
    assert [each.receipt.device_name for each in (first, second)] == ["cpu:0", "cpu:1"]
    assert np.array_equal(first.saliency, second.saliency)
    assert {each.receipt.batch_sizes["forward"] for each in (first, second)} == {expected}


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [4, None])
def test_copy_that_does_not_fit_into_the_memory_of_its_device_fails_the_load(
    monkeypatch: pytest.MonkeyPatch, batch_size: int | None
) -> None:
    def limited(model: Model, *arguments: Any) -> None:
        if model.device_name == "cpu:1":
            raise torch.OutOfMemoryError("no memory")
        run_batch(model, *arguments)

    monkeypatch.setattr(warmup, "run_batch", limited)
    monkeypatch.setitem(warmup.SIZES, "cpu", (4,))
    tiny = ModelConfig(**{**SMALL, "name": "tiny", "batch_size": batch_size})
    with pytest.raises(OutOfMemory), serving(Config(**{**TWO, "models": [tiny]})):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("built_on", "used"), [(("cpu:0", "cpu:1"), True), (("cpu:1",), False), (("cpu:0",), False)])
def test_devices_use_a_faster_forward_pass_only_if_all_have_it(
    monkeypatch: pytest.MonkeyPatch, built_on: tuple[str, ...], used: bool
) -> None:
    def build(model: Model, size: int) -> Any:
        return model.module if model.device_name in built_on else None

    monkeypatch.setattr(warmup, "build_fast_forward", build)
    with serving(Config(**TWO)) as server:
        [loaded] = [entry.loaded for entry in server._servicer.loaded_models()._entries.values()]
        assert loaded is not None
        for replica in loaded.replicas:
            assert (replica.model.fast_forward is not None) == used
            assert replica.model.fast_forward_size == (4 if used else 0)


@pytest.mark.slow
def test_device_that_fails_during_a_load_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        serving(read_config(write(tmp_path, seed=1))) as server,
        grpc.insecure_channel(server.admin_address) as channel,
        patient_client(server.address) as client,
    ):
        loop = server.engines.local[1]._loop

        def failing(steps: Iterator[None]) -> Any:
            done = type(loop).run_between_batches(loop, steps)
            loop._inbox.put(lambda: 1 / 0)  # type: ignore[arg-type]
            return done

        monkeypatch.setattr(loop, "run_between_batches", failing)
        reply = AdminServiceStub(channel).ReloadModel(admin.ReloadModelRequest(model="a"))
        assert reply.model.devices == ["cpu:0"]
        assert client.explain(IMAGE, model="a", method="grad-cam").receipt.device_name == "cpu:0"


@contextmanager
def broken_device(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    """Let the checks of one device fail, as those of a GPU whose context an operation has broken."""

    def check(device: torch.device) -> None:
        if threading.current_thread().name == f"engine-{name}":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patched:
        for module in (engine, steps):
            patched.setattr(module, "check_device", check)
        yield


@pytest.mark.slow
@pytest.mark.parametrize(("step", "broken"), [("load", "cpu:0"), ("copied", "cpu:1"), ("warm_up_steps", "cpu:1")])
def test_device_whose_context_breaks_during_a_load_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, broken: str
) -> None:
    with (
        serving(read_config(write(tmp_path, seed=1))) as server,
        grpc.insecure_channel(server.admin_address) as channel,
        patient_client(server.address) as client,
    ):
        original, calls = getattr(model_pool, step), []

        def failing(*arguments: Any) -> Any:
            calls.append(arguments)
            if len(calls) == (2 if step == "warm_up_steps" else 1):  # the second warm-up is that of the copy
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return original(*arguments)

        def failing_steps(*arguments: Any) -> Iterator[None]:
            yield
            yield from failing(*arguments)

        monkeypatch.setattr(model_pool, step, failing_steps if step == "warm_up_steps" else failing)
        other = "cpu:1" if broken == "cpu:0" else "cpu:0"
        with broken_device(monkeypatch, broken):
            reply = AdminServiceStub(channel).ReloadModel(admin.ReloadModelRequest(model="a"))
        assert reply.model.devices == [other]
        assert client.explain(IMAGE, model="a", method="grad-cam").receipt.device_name == other
        assert states(server.address, SERVICE, broken, other) == [SERVING, NOT_SERVING, SERVING]


@pytest.mark.slow
def test_device_whose_context_breaks_while_weights_are_copied_from_it_is_left_out_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with (
        serving(read_config(write(tmp_path, seed=1))) as server,
        grpc.insecure_channel(server.admin_address) as channel,
        patient_client(server.address) as client,
    ):
        reload = partial(AdminServiceStub(channel).ReloadModel, admin.ReloadModelRequest(model="a"))
        with broken_device(monkeypatch, "cpu:0"):
            with monkeypatch.context() as patched, pytest.raises(grpc.RpcError, match="illegal memory access"):
                patched.setattr(model_pool, "copied", failing)
                reload()
            assert states(server.address, SERVICE, "cpu:0", "cpu:1") == [SERVING, NOT_SERVING, SERVING]
            assert client.explain(IMAGE, model="a", method="grad-cam").receipt.device_name == "cpu:1"
            assert reload().model.devices == ["cpu:1"]


@pytest.mark.slow
def test_copy_that_fails_on_a_device_that_works_fails_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any) -> Any:
        raise TypeError("cannot pickle")

    with (
        serving(read_config(write(tmp_path, seed=1))) as server,
        grpc.insecure_channel(server.admin_address) as channel,
    ):
        monkeypatch.setattr(model_pool, "copied", failing)
        with pytest.raises(grpc.RpcError, match="cannot pickle"):
            AdminServiceStub(channel).ReloadModel(admin.ReloadModelRequest(model="a"))
        assert [engine.working for engine in server.engines.local] == [True, True]


def test_loads_and_copies_make_their_device_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of networks may use the current GPU, which is the first one in a new thread."""
    current: dict[int, torch.device] = {}
    seen: list[tuple[str, torch.device | None]] = []

    def noted(name: str) -> Any:
        work = getattr(model_pool, name)

        def run(*arguments: Any) -> Any:
            seen.append((name, current.pop(threading.get_ident(), None)))
            return work(*arguments)

        return run

    def use(device: torch.device) -> None:
        current[threading.get_ident()] = device

    monkeypatch.setattr(threads, "use_device", use)
    for name in ("load", "copied"):
        monkeypatch.setattr(model_pool, name, noted(name))
    with serving(Config(**TWO)):
        pass
    assert seen == [("load", torch.device("cpu")), ("copied", torch.device("cpu"))]
