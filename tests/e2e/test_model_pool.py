"""Models come and go while others are served."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import skimage.data
import torch
from click.testing import Result
from safetensors.torch import save_file
from typer.testing import CliRunner

import camserve
from camserve.v1 import admin_pb2 as pb
from camserve.v1.admin_pb2_grpc import AdminServiceStub
from camserve_cli.app import app
from camserve_server import model_pool
from camserve_server.config import read_config
from camserve_server.errors import ConfigError
from camserve_server.model_pool import ModelPool
from camserve_server.service.server import Server
from tests import nets
from tests.conftest import serving
from tests.support import running as engine_running

PICTURE = skimage.data.chelsea()
TABLE = """
[[models]]
name = "{name}"
source = "python:tests.nets:tiny_cnn"
weights = "{name}.safetensors"
input_size = [32, 32]
batch_size = 2
"""
LONG = {"method": "rise", "parameters": {"masks": 6000}}
ENDLESS = {"method": "rise", "parameters": {"masks": 1_000_000}}  # to be cancelled


def write(folder: Path, *names: str, **keys: int) -> Path:
    """A configuration file with those models, each with weights of its own."""
    for seed, name in enumerate(names):
        weights(folder, name, seed)
    path = folder / "camserve.toml"
    server = 'listen = "127.0.0.1:0"\nadmin_listen = "127.0.0.1:0"\ndevice = "cpu"\n'
    path.write_text(
        server + "".join(f"{k} = {v}\n" for k, v in keys.items()) + "".join(TABLE.format(name=n) for n in names)
    )
    return path


def weights(folder: Path, name: str, seed: int) -> None:
    save_file(nets.tiny_cnn(seed=seed).state_dict(), folder / f"{name}.safetensors")


@contextmanager
def running(path: Path) -> Iterator[tuple[Server, camserve.Client, AdminServiceStub]]:
    """A server, somebody who asks it, and its operator."""
    with (
        serving(read_config(path)) as server,
        camserve.Client(server.address) as client,
        grpc.insecure_channel(server.admin_address) as channel,
    ):
        yield server, client, AdminServiceStub(channel)


def gone(weight: weakref.ref[object]) -> bool:
    """Whether the weights are freed, once those who have had them are collected."""
    for _ in range(100):
        gc.collect()
        if weight() is None:
            return True
        time.sleep(0.05)
    return False


def states(client: camserve.Client) -> dict[str, str]:
    return {model.name: model.state for model in client.models()}


def test_what_runs_is_finished_before_a_model_goes(tmp_path: Path) -> None:
    with running(write(tmp_path, "a", "b")) as (server, client, admin):
        weight = weakref.ref(next(server.models["b"].module.parameters()))
        stream = client.explain_stream(PICTURE, model="b", **LONG)  # type: ignore[arg-type]
        next(event for event in stream if isinstance(event, camserve.Progress))
        going = admin.UnloadModel.future(pb.UnloadModelRequest(model="b"))
        while states(client)["b"] == "ready":
            time.sleep(0.01)
        with pytest.raises(camserve.FailedPrecondition, match="an operator has unloaded it") as caught:
            client.explain(PICTURE, model="b", method="grad-cam")
        assert caught.value.reason == "UNLOADED"
        assert not going.done(), "it runs still"
        *_, explanation = stream
        assert isinstance(explanation, camserve.Explanation)
        going.result(timeout=30)
        assert gone(weight)
        assert states(client) == {"a": "ready", "b": "unloaded"}
        assert client.explain(PICTURE, method="grad-cam").receipt.model == "a"

        loaded = admin.LoadModel(pb.LoadModelRequest(model="b")).model
        assert (loaded.state, loaded.digest) == ("ready", explanation.receipt.model_digest)
        again = client.explain(PICTURE, model="b", **LONG)  # type: ignore[arg-type]
        assert np.array_equal(again.saliency, explanation.saliency)


def test_a_reload_mixes_no_weights(tmp_path: Path) -> None:
    """Requests of before it and of after it run at the same time, each on its own weights."""
    asked = {"method": "rise", "parameters": {"masks": 3000}}
    with running(write(tmp_path, "a")) as (server, client, admin):
        old = client.explain(PICTURE, **asked)  # type: ignore[arg-type]
        stream = client.explain_stream(PICTURE, **ENDLESS)  # type: ignore[arg-type]
        next(event for event in stream if isinstance(event, camserve.Progress))
        weights(tmp_path, "a", seed=7)
        going = admin.ReloadModel.future(pb.ReloadModelRequest(model="a"))
        while server.models["a"].digest == old.receipt.model_digest:
            time.sleep(0.01)
        new = client.explain(PICTURE, **asked)  # type: ignore[arg-type]
        assert not going.done(), "the old one is in use"
        stream.close()
        assert going.result(timeout=30).model.digest == new.receipt.model_digest != old.receipt.model_digest
        alone = client.explain(PICTURE, **asked)  # type: ignore[arg-type]
        assert np.array_equal(new.saliency, alone.saliency)
        assert not np.array_equal(new.saliency, old.saliency)


def test_a_model_added_to_the_file_can_be_loaded(tmp_path: Path) -> None:
    with running(write(tmp_path, "a")) as (_, client, admin):
        with pytest.raises(grpc.RpcError) as caught:
            admin.LoadModel(pb.LoadModelRequest(model="b"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        write(tmp_path, "a", "b")
        admin.LoadModel(pb.LoadModelRequest(model="b"))
        assert states(client) == {"a": "ready", "b": "ready"}
        assert client.explain(PICTURE, model="b", method="grad-cam").maps


def test_a_reload_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    with running(write(tmp_path, "a")) as (_, client, admin):
        (tmp_path / "a.safetensors").write_bytes(b"nonsense")
        with pytest.raises(grpc.RpcError, match=r"models\.a\.weights") as caught:
            admin.ReloadModel(pb.ReloadModelRequest(model="a"))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert client.explain(PICTURE, method="grad-cam").maps
        admin.UnloadModel(pb.UnloadModelRequest(model="a"))
        with pytest.raises(grpc.RpcError, match=r"models\.a\.weights"):
            admin.LoadModel(pb.LoadModelRequest(model="a"))
        assert states(client) == {"a": "unloaded"}


def test_the_least_recently_used_makes_room(tmp_path: Path) -> None:
    each = sum(value.nbytes for value in nets.tiny_cnn().state_dict().values())
    with running(write(tmp_path, "a", "b", "c", max_model_bytes=2 * each + 10)) as (server, client, _):
        assert states(client) == {"a": "ready", "b": "ready", "c": "waiting"}, "no room at the start"
        first = {name: client.explain(PICTURE, model=name, method="grad-cam") for name in "ab"}
        client.explain(PICTURE, model="a", method="grad-cam")
        weight = weakref.ref(next(server.models["b"].module.parameters()))
        first["c"] = client.explain(PICTURE, model="c", method="grad-cam")
        assert states(client) == {"a": "ready", "b": "waiting", "c": "ready"}
        assert gone(weight)
        again = client.explain(PICTURE, model="b", method="grad-cam")
        assert states(client) == {"a": "waiting", "b": "ready", "c": "ready"}
        assert np.array_equal(again.saliency, first["b"].saliency)
        assert len({explanation.receipt.model_digest for explanation in first.values()}) == 3


def test_many_callers_of_more_models_than_there_is_room_for(tmp_path: Path) -> None:
    """Everybody is answered, and rightly, though only one model fits at a time."""
    each = sum(value.nbytes for value in nets.tiny_cnn().state_dict().values())
    with running(write(tmp_path, "a", "b", "c", max_model_bytes=each)) as (_, client, _):
        maps: dict[str, list[np.ndarray]] = {"a": [], "b": [], "c": []}

        def ask(name: str) -> None:
            maps[name].append(client.explain(PICTURE, model=name, method="score-cam").saliency)

        threads = [threading.Thread(target=ask, args=(name,)) for name in 4 * "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [len(found) for found in maps.values()] == [4, 4, 4]
        assert all(np.array_equal(found[0], other) for found in maps.values() for other in found)
        assert sum(state == "ready" for state in states(client).values()) == 1


def test_a_model_that_cannot_be_loaded_names_no_file_to_callers(tmp_path: Path) -> None:
    each = sum(value.nbytes for value in nets.tiny_cnn().state_dict().values())
    with running(write(tmp_path, "a", "b", max_model_bytes=each)) as (_, client, _):
        (tmp_path / "b.safetensors").unlink()
        with pytest.raises(
            camserve.FailedPrecondition, match="b cannot be loaded; the server's log says why"
        ) as caught:
            client.explain(PICTURE, model="b", method="grad-cam")
        assert caught.value.reason == "LOAD_FAILED"
        weights(tmp_path, "b", seed=1)
        assert client.explain(PICTURE, model="b", method="grad-cam").maps, "the next request tries again"


def test_the_command_line_of_operators(tmp_path: Path) -> None:
    with running(write(tmp_path, "a", "b")) as (server, client, _):

        def ask(command: str, model: str, address: str = server.admin_address) -> Result:
            return CliRunner().invoke(app, ["admin", command, model, "--address", address])

        def said(done: Result) -> tuple[int, str]:
            return done.exit_code, done.stdout.splitlines()[-1]  # the server's log stands before it

        done = ask("unload", "b")
        assert said(done) == (0, "b is unloaded")
        assert states(client) == {"a": "ready", "b": "unloaded"}
        done = ask("load", "b")
        assert said(done) == (0, f"b is ready, {server.models['b'].digest}")
        weights(tmp_path, "b", seed=7)
        before = server.models["b"].digest
        done = ask("reload", "b")
        assert said(done) == (0, f"b is ready, {server.models['b'].digest}")
        assert server.models["b"].digest != before
        done = ask("load", "c")
        assert done.exit_code == 1
        assert "there is no model 'c'; there are: a, b" in done.stderr
        done = ask("load", "a", server.address)
        assert done.exit_code == 1
        assert "is not the server's admin listener; use the address of admin_listen" in done.stderr


def test_a_load_that_fails_changes_nothing(tmp_path: Path) -> None:
    """Neither a new model nor other settings of an old one are taken over before they have proved good."""
    path = write(tmp_path, "a")
    with running(path) as (_, client, admin):
        good = path.read_text()
        path.write_text(good + TABLE.format(name="broken").replace("tiny_cnn", "none"))
        with pytest.raises(grpc.RpcError, match=r"models\.broken\.weights"):
            admin.LoadModel(pb.LoadModelRequest(model="broken"))
        assert states(client) == {"a": "ready"}
        path.write_text(good.replace("tiny_cnn", "none"))
        with pytest.raises(grpc.RpcError, match=r"models\.a\.source"):
            admin.ReloadModel(pb.ReloadModelRequest(model="a"))
        path.write_text(good)
        assert client.explain(PICTURE, method="grad-cam").maps


def test_what_an_operator_began_is_finished_without_him(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(write(tmp_path, "a", "b")) as (_, client, admin):
        admin.UnloadModel(pb.UnloadModelRequest(model="b"))
        slowly(monkeypatch, 1.0)
        with pytest.raises(grpc.RpcError) as caught:
            admin.LoadModel(pb.LoadModelRequest(model="b"), timeout=0.3)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        until = time.monotonic() + 20
        while states(client)["b"] != "ready":
            assert time.monotonic() < until
            time.sleep(0.02)
        assert client.explain(PICTURE, model="b", method="grad-cam").maps


def test_a_model_is_unloaded_even_while_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(write(tmp_path, "a", "b")) as (_, client, admin):
        admin.UnloadModel(pb.UnloadModelRequest(model="b"))
        slowly(monkeypatch, 0.5)
        loading = admin.LoadModel.future(pb.LoadModelRequest(model="b"))
        time.sleep(0.2)
        admin.UnloadModel(pb.UnloadModelRequest(model="b"))
        loading.result(timeout=20)
        assert states(client) == {"a": "ready", "b": "unloaded"}


def test_nothing_is_unloaded_for_want_of_a_name(tmp_path: Path) -> None:
    with running(write(tmp_path, "a")) as (_, client, admin):
        for call, request in [
            (admin.LoadModel, pb.LoadModelRequest()),
            (admin.ReloadModel, pb.ReloadModelRequest()),
            (admin.UnloadModel, pb.UnloadModelRequest()),
        ]:
            with pytest.raises(grpc.RpcError, match="names no model") as caught:
                call(request)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert states(client) == {"a": "ready"}


def test_a_model_whose_table_is_gone_cannot_be_loaded_anew(tmp_path: Path) -> None:
    with running(write(tmp_path, "a", "b")) as (_, client, admin):
        write(tmp_path, "a")
        with pytest.raises(grpc.RpcError) as caught:
            admin.ReloadModel(pb.ReloadModelRequest(model="b"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert client.explain(PICTURE, model="b", method="grad-cam").maps


def test_a_model_larger_than_the_bound_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a", max_model_bytes=9)
    with pytest.raises(ConfigError, match="max_model_bytes: a alone has"), running(path):
        pass


def test_flags_hold_for_models_that_are_loaded_later(tmp_path: Path) -> None:
    path = write(tmp_path, "a")
    path.write_text(path.read_text().replace('device = "cpu"', 'device = "cuda:7"'))
    with serving(read_config(path, device="cpu")) as server, grpc.insecure_channel(server.admin_address) as channel:
        assert AdminServiceStub(channel).ReloadModel(pb.ReloadModelRequest(model="a")).model.state == "ready"


def slowly(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Loads take so much longer from now on."""
    load = model_pool.load

    def slow(*given: Any) -> Any:
        time.sleep(seconds)
        return load(*given)

    monkeypatch.setattr(model_pool, "load", slow)


@pytest.mark.parametrize("ticks", range(8))
def test_who_gives_up_at_any_moment_holds_nobody_up(tmp_path: Path, ticks: int) -> None:
    """A caller that waits for a model is cancelled before, while and after it gets it; then another needs the room."""
    each = sum(value.nbytes for value in nets.tiny_cnn().state_dict().values())
    config = read_config(write(tmp_path, "a", "b", max_model_bytes=each))

    async def use(pool: ModelPool, name: str) -> None:
        async with pool.lease(name) as lease:
            assert lease.model.name == name
            await asyncio.sleep(0)

    async def main() -> None:
        with engine_running() as engine:
            pool = ModelPool(config, engine, torch.device("cpu"))
            await pool.load_all()
            waiting = asyncio.create_task(use(pool, "b"))
            while not pool.loads["b"].done:
                await asyncio.sleep(0)
            for _ in range(ticks):
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait_for(use(pool, "a"), 20)
            await asyncio.wait_for(use(pool, "b"), 20)

    asyncio.run(main())
