"""The model pool: models are loaded, reloaded and unloaded while the server answers requests."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import skimage.data
from numpy.typing import NDArray
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

import camserve
from camserve.v1 import admin_pb2 as pb
from camserve.v1.admin_pb2_grpc import AdminServiceStub
from camserve_cli.app import app
from camserve_server import model_pool
from camserve_server.config import read_config
from camserve_server.engines import Engines
from camserve_server.errors import ConfigError
from camserve_server.model_pool import ModelPool
from camserve_server.models.load import load
from camserve_server.service.server import Server
from tests import nets
from tests.conftest import serving
from tests.e2e.engines import engine_of, wait_until
from tests.processes import LIMIT_S, patient_client
from tests.support import stopped

IMAGE = skimage.data.chelsea()
TABLE = """
[[models]]
name = "{name}"
source = "python:tests.nets:tiny_cnn"
weights = "{name}.safetensors"
input_size = [32, 32]
batch_size = 2
"""
LONG: dict[str, Any] = {"method": "rise", "parameters": {"masks": 3000}}
ENDLESS: dict[str, Any] = {"method": "rise", "parameters": {"masks": 1_000_000}}  # for requests that are cancelled


def write(folder: Path, *names: str, **keys: int) -> Path:
    """Write a configuration file with these models, each with its own weights."""
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
    """Run a server, and yield it with a client and a stub of its admin service."""
    with (
        serving(read_config(path)) as server,
        patient_client(server.address) as client,
        grpc.insecure_channel(server.admin_address) as channel,
    ):
        yield server, client, AdminServiceStub(channel)


def gone(weight: weakref.ref[Any]) -> bool:
    """Wait until the weights are freed, and return True."""

    def collected() -> bool:
        gc.collect()
        return weight() is None

    wait_until(collected)
    return True


def states(client: camserve.Client) -> dict[str, str]:
    return {model.name: model.state for model in client.models()}


@pytest.mark.slow
def test_unloading_waits_for_running_requests(tmp_path: Path) -> None:
    with running(write(tmp_path, "a", "b")) as (server, client, admin):
        weight = weakref.ref(next(server.models["b"].module.parameters()))
        stream = client.explain_stream(IMAGE, model="b", **LONG)
        next(event for event in stream if isinstance(event, camserve.Progress))
        with stopped(engine_of(server)):  # so that the request cannot end meanwhile
            command = admin.UnloadModel.future(pb.UnloadModelRequest(model="b"))
            wait_until(lambda: states(client)["b"] != "ready")
            with pytest.raises(camserve.FailedPrecondition, match="an operator has unloaded it") as caught:
                client.explain(IMAGE, model="b", method="grad-cam")
            assert caught.value.reason == "UNLOADED"
            assert not command.done(), "a request still runs"
        *_, explanation = stream
        assert isinstance(explanation, camserve.Explanation)
        command.result(timeout=LIMIT_S)
        assert gone(weight)
        assert states(client) == {"a": "ready", "b": "unloaded"}
        assert client.explain(IMAGE, method="grad-cam").receipt.model == "a"

        loaded = admin.LoadModel(pb.LoadModelRequest(model="b")).model
        assert (loaded.state, loaded.digest) == ("ready", explanation.receipt.model_digest)
        again = client.explain(IMAGE, model="b", **LONG)
        assert np.array_equal(again.saliency, explanation.saliency)


@pytest.mark.slow
def test_requests_before_and_after_a_reload_use_their_own_weights(tmp_path: Path) -> None:
    """Both kinds of requests run at the same time."""
    arguments: dict[str, Any] = {"method": "rise", "parameters": {"masks": 600}}
    with running(write(tmp_path, "a")) as (server, client, admin):
        old = client.explain(IMAGE, **arguments)
        stream = client.explain_stream(IMAGE, **ENDLESS)
        next(event for event in stream if isinstance(event, camserve.Progress))
        weights(tmp_path, "a", seed=7)
        command = admin.ReloadModel.future(pb.ReloadModelRequest(model="a"))
        wait_until(lambda: server.models["a"].digest != old.receipt.model_digest)
        new = client.explain(IMAGE, **arguments)
        assert not command.done(), "a request still uses the old weights"
        stream.close()
        assert command.result(timeout=LIMIT_S).model.digest == new.receipt.model_digest != old.receipt.model_digest
        alone = client.explain(IMAGE, **arguments)
        assert np.array_equal(new.saliency, alone.saliency)
        assert not np.array_equal(new.saliency, old.saliency)


@pytest.mark.slow
def test_a_model_added_to_the_file_can_be_loaded(tmp_path: Path) -> None:
    with running(write(tmp_path, "a")) as (_, client, admin):
        with pytest.raises(grpc.RpcError) as caught:
            admin.LoadModel(pb.LoadModelRequest(model="b"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        write(tmp_path, "a", "b")
        admin.LoadModel(pb.LoadModelRequest(model="b"))
        assert states(client) == {"a": "ready", "b": "ready"}
        assert client.explain(IMAGE, model="b", method="grad-cam").maps


@pytest.mark.slow
def test_failed_reload_keeps_the_loaded_model(tmp_path: Path) -> None:
    with running(write(tmp_path, "a")) as (_, client, admin):
        (tmp_path / "a.safetensors").write_bytes(b"nonsense")
        with pytest.raises(grpc.RpcError, match=r"models\.a\.weights") as caught:
            admin.ReloadModel(pb.ReloadModelRequest(model="a"))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert client.explain(IMAGE, method="grad-cam").maps
        admin.UnloadModel(pb.UnloadModelRequest(model="a"))
        with pytest.raises(grpc.RpcError, match=r"models\.a\.weights"):
            admin.LoadModel(pb.LoadModelRequest(model="a"))
        assert states(client) == {"a": "unloaded"}


@pytest.mark.slow
def test_reload_of_changed_code_asks_for_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    code = tmp_path / "pool_factory.py"
    code.write_text("from tests.nets import tiny_cnn\ndef make():\n    return tiny_cnn()\n", encoding="utf-8")
    path = write(tmp_path, "a")
    path.write_text(path.read_text(encoding="utf-8").replace("tests.nets:tiny_cnn", "pool_factory:make"))
    with running(path) as (_, client, admin):
        admin.ReloadModel(pb.ReloadModelRequest(model="a"))
        code.write_text("from tests.nets import tiny_cnn\ndef make():\n    return tiny_cnn(1)\n", encoding="utf-8")
        with pytest.raises(grpc.RpcError, match=r"models\.a\.source: .* restart the server") as caught:
            admin.ReloadModel(pb.ReloadModelRequest(model="a"))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert client.explain(IMAGE, method="grad-cam").maps


@pytest.mark.slow
def test_least_recently_used_model_is_unloaded(tmp_path: Path) -> None:
    each = sum(value.nbytes for value in nets.tiny_cnn().state_dict().values())
    with running(write(tmp_path, "a", "b", "c", max_model_bytes=2 * each + 10)) as (server, client, _):
        assert states(client) == {"a": "ready", "b": "ready", "c": "waiting"}, "two models fit"
        first = {name: client.explain(IMAGE, model=name, method="grad-cam") for name in "ab"}
        client.explain(IMAGE, model="a", method="grad-cam")
        weight = weakref.ref(next(server.models["b"].module.parameters()))
        first["c"] = client.explain(IMAGE, model="c", method="grad-cam")
        assert states(client) == {"a": "ready", "b": "waiting", "c": "ready"}
        assert gone(weight)
        again = client.explain(IMAGE, model="b", method="grad-cam")
        assert states(client) == {"a": "waiting", "b": "ready", "c": "ready"}
        assert np.array_equal(again.saliency, first["b"].saliency)
        assert len({explanation.receipt.model_digest for explanation in first.values()}) == 3


@pytest.mark.slow
def test_callers_of_more_models_than_fit_are_all_answered(tmp_path: Path) -> None:
    """Only one model fits at a time."""
    each = sum(value.nbytes for value in nets.tiny_cnn().state_dict().values())
    with running(write(tmp_path, "a", "b", "c", max_model_bytes=each)) as (_, client, _):
        maps: dict[str, list[NDArray[np.float32]]] = {"a": [], "b": [], "c": []}

        def explain(name: str) -> None:
            maps[name].append(client.explain(IMAGE, model=name, method="score-cam").saliency)

        threads = [threading.Thread(target=explain, args=(name,)) for name in 4 * "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_S)
        assert [len(found) for found in maps.values()] == [4, 4, 4]
        assert all(np.array_equal(found[0], other) for found in maps.values() for other in found)
        assert sum(state == "ready" for state in states(client).values()) == 1


@pytest.mark.slow
def test_error_of_a_failed_load_hides_file_names_from_callers(tmp_path: Path) -> None:
    each = sum(value.nbytes for value in nets.tiny_cnn().state_dict().values())
    with running(write(tmp_path, "a", "b", max_model_bytes=each)) as (_, client, _):
        (tmp_path / "b.safetensors").unlink()
        with pytest.raises(
            camserve.FailedPrecondition, match="b cannot be loaded; the server's log says why"
        ) as caught:
            client.explain(IMAGE, model="b", method="grad-cam")
        assert caught.value.reason == "LOAD_FAILED"
        weights(tmp_path, "b", seed=1)
        assert client.explain(IMAGE, model="b", method="grad-cam").maps, "the next request loads the model"


@pytest.mark.slow
def test_admin_commands_of_the_command_line(tmp_path: Path) -> None:
    with running(write(tmp_path, "a", "b")) as (server, client, _):

        def admin(command: str, model: str, address: str = server.admin_address) -> Result:
            return CliRunner().invoke(app, ["admin", command, model, "--address", address])

        def outcome(done: Result) -> tuple[int, str]:
            return done.exit_code, done.stdout.splitlines()[-1]  # the log of the server precedes this line

        done = admin("unload", "b")
        assert outcome(done) == (0, "b is unloaded")
        assert states(client) == {"a": "ready", "b": "unloaded"}
        done = admin("load", "b")
        assert outcome(done) == (0, f"b is ready, {server.models['b'].digest}")
        weights(tmp_path, "b", seed=7)
        before = server.models["b"].digest
        done = admin("reload", "b")
        assert outcome(done) == (0, f"b is ready, {server.models['b'].digest}")
        assert server.models["b"].digest != before
        done = admin("load", "c")
        assert done.exit_code == 1
        assert "there is no model 'c'; there are: a, b" in done.stderr
        done = admin("load", "a", server.address)
        assert done.exit_code == 1
        assert "is not the server's admin listener; use the address of admin_listen" in done.stderr


@pytest.mark.slow
def test_failed_load_changes_nothing(tmp_path: Path) -> None:
    """The server uses a new model, or new settings of a model, only after they have loaded."""
    path = write(tmp_path, "a")
    with running(path) as (_, client, admin):
        valid = path.read_text()
        path.write_text(valid + TABLE.format(name="broken").replace("tiny_cnn", "none"))
        with pytest.raises(grpc.RpcError, match=r"models\.broken\.weights"):
            admin.LoadModel(pb.LoadModelRequest(model="broken"))
        assert states(client) == {"a": "ready"}
        path.write_text(valid.replace("tiny_cnn", "none"))
        with pytest.raises(grpc.RpcError, match=r"models\.a\.source"):
            admin.ReloadModel(pb.ReloadModelRequest(model="a"))
        path.write_text(valid)
        assert client.explain(IMAGE, method="grad-cam").maps


@dataclass
class PausedLoad:
    """A load of a model that pauses until `go_on` is set."""

    begun: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def paused_load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], PausedLoad]]:
    """Return a function that pauses the loads that begin after it is called."""
    paused = PausedLoad()

    def pausing(*arguments: Any) -> Any:
        paused.begun.set()
        assert paused.go_on.wait(LIMIT_S)
        return load(*arguments)

    def pause() -> PausedLoad:
        monkeypatch.setattr(model_pool, "load", pausing)
        return paused

    yield pause
    paused.go_on.set()


@pytest.mark.slow
def test_load_continues_after_the_operator_disconnects(tmp_path: Path, paused_load: Callable[[], PausedLoad]) -> None:
    with running(write(tmp_path, "a", "b")) as (_, client, admin):
        admin.UnloadModel(pb.UnloadModelRequest(model="b"))
        paused = paused_load()
        loading = admin.LoadModel.future(pb.LoadModelRequest(model="b"))
        assert paused.begun.wait(LIMIT_S)
        loading.cancel()
        paused.go_on.set()
        wait_until(lambda: states(client)["b"] == "ready")
        assert client.explain(IMAGE, model="b", method="grad-cam").maps


@pytest.mark.slow
def test_model_can_be_unloaded_while_it_is_loaded(tmp_path: Path, paused_load: Callable[[], PausedLoad]) -> None:
    with running(write(tmp_path, "a", "b")) as (_, client, admin):
        admin.UnloadModel(pb.UnloadModelRequest(model="b"))
        paused = paused_load()
        loading = admin.LoadModel.future(pb.LoadModelRequest(model="b"))
        assert paused.begun.wait(LIMIT_S)
        unloading = admin.UnloadModel.future(pb.UnloadModelRequest(model="b"))
        wait_until(lambda: states(client)["b"] == "unloaded")
        paused.go_on.set()
        unloading.result(timeout=LIMIT_S)
        loading.result(timeout=LIMIT_S)
        assert states(client) == {"a": "ready", "b": "unloaded"}


@pytest.mark.slow
def test_admin_calls_require_a_model_name(tmp_path: Path) -> None:
    with running(write(tmp_path, "a")) as (_, client, admin):
        calls: list[tuple[Any, Any]] = [
            (admin.LoadModel, pb.LoadModelRequest()),
            (admin.ReloadModel, pb.ReloadModelRequest()),
            (admin.UnloadModel, pb.UnloadModelRequest()),
        ]
        for call, request in calls:
            with pytest.raises(grpc.RpcError, match="names no model") as caught:
                call(request)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert states(client) == {"a": "ready"}


@pytest.mark.slow
def test_reload_of_a_model_that_was_removed_from_the_file_fails(tmp_path: Path) -> None:
    with running(write(tmp_path, "a", "b")) as (_, client, admin):
        write(tmp_path, "a")
        with pytest.raises(grpc.RpcError) as caught:
            admin.ReloadModel(pb.ReloadModelRequest(model="b"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert client.explain(IMAGE, model="b", method="grad-cam").maps


def test_model_larger_than_the_limit_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a", max_model_bytes=9)
    with pytest.raises(ConfigError, match="max_model_bytes: a alone has"), running(path):
        pass


@pytest.mark.slow
def test_command_line_options_apply_to_models_loaded_later(tmp_path: Path) -> None:
    path = write(tmp_path, "a")
    path.write_text(path.read_text().replace('device = "cpu"', 'device = "cuda:7"'))
    with serving(read_config(path, device="cpu")) as server, grpc.insecure_channel(server.admin_address) as channel:
        assert AdminServiceStub(channel).ReloadModel(pb.ReloadModelRequest(model="a")).model.state == "ready"


@pytest.mark.slow
@pytest.mark.parametrize("ticks", range(8))
def test_cancelled_wait_for_a_model_blocks_no_other(tmp_path: Path, ticks: int) -> None:
    """A task that waits for a model is cancelled before, while and after it gets the model, for each number of ticks.

    Afterwards, another task needs the memory.
    """
    each = sum(value.nbytes for value in nets.tiny_cnn().state_dict().values())
    config = read_config(write(tmp_path, "a", "b", max_model_bytes=each))

    async def use(pool: ModelPool, name: str) -> None:
        async with pool.lease(name) as lease:
            assert lease.model.name == name
            await asyncio.sleep(0)

    async def main() -> None:
        engines = Engines(config)
        engines.start()
        pool = ModelPool(config, engines)
        try:
            await pool.load_all()
            waiting = asyncio.create_task(use(pool, "b"))
            while not pool.loads["b"].done:
                await asyncio.sleep(0)
            for _ in range(ticks):
                await asyncio.sleep(0)
            waiting.cancel()
            async with asyncio.timeout(LIMIT_S):
                await use(pool, "a")
                await use(pool, "b")
        finally:
            engines.close()

    asyncio.run(main())
