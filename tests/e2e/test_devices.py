"""Servers with several devices: two engines on the CPU, each with its own copy of the models."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import skimage.data
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.torch import save_file
from structlog.testing import capture_logs

import camserve
from camserve.receipt import differences
from camserve.v1 import admin_pb2 as admin
from camserve.v1.admin_pb2_grpc import AdminServiceStub
from camserve_server.config import CacheConfig, Config, ModelConfig, TokenConfig, read_config
from camserve_server.engine import batch_runner
from camserve_server.engine.engine import Engine
from camserve_server.engine.lanes.dispatch import BatchSlice, Lane, run_batch
from camserve_server.models.model import Model
from camserve_server.service.listeners import SERVICE
from camserve_server.service.server import Server
from tests import nets
from tests.conftest import serving
from tests.credentials import hashed
from tests.e2e.engines import after_submit, wait_until
from tests.e2e.test_faults import CONFIG as TRICKY
from tests.e2e.test_faults import LETHAL, VALID
from tests.e2e.test_monitoring import Scrape
from tests.processes import LIMIT_S, children, patient_client, served
from tests.support import stopped

IMAGE = skimage.data.chelsea()
SMALL: dict[str, Any] = {"source": "python:tests.nets:tiny_cnn", "input_size": (32, 32), "batch_size": 4}
TWO: dict[str, Any] = {
    "listen": "127.0.0.1:0",
    "metrics_listen": "127.0.0.1:0",
    "device": "cpu:0,1",
    "threads": 1,
    "models": [ModelConfig(name="tiny", **SMALL)],
}
RISE: dict[str, Any] = {"method": "rise", "parameters": {"masks": 400}}
ENDLESS: dict[str, Any] = {"method": "rise", "parameters": {"masks": 100_000}}  # for requests that are cancelled
UNARY_S = 29.0  # the client uses the streaming RPC for longer timeouts
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(Config(**TWO)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[camserve.Client]:
    with patient_client(server.address) as opened:
        yield opened


def owed(server: Server) -> list[int]:
    """Return the rows that each device owes."""
    return [engine.rows_owed() for engine in server.engines.local]


@contextmanager
def open_stream(client: camserve.Client, **arguments: Any) -> Iterator[Iterator[object]]:
    """Send a request that is cancelled at the end of the context."""
    stream = client.explain_stream(IMAGE, **arguments)
    try:
        yield stream
    finally:
        stream.close()


class Waiting:
    """A request on a thread of its own. The device may not run it yet."""

    def __init__(self, client: camserve.Client, **arguments: Any) -> None:
        self._outcome: camserve.Explanation | camserve.CamserveError | None = None
        self._thread = threading.Thread(target=self._run, args=(client, arguments))
        self._thread.start()

    def _run(self, client: camserve.Client, arguments: dict[str, Any]) -> None:
        try:
            self._outcome = client.explain(IMAGE, **arguments)
        except camserve.CamserveError as error:
            self._outcome = error

    def outcome(self) -> camserve.Explanation | camserve.CamserveError:
        self._thread.join(LIMIT_S)
        assert self._outcome is not None
        return self._outcome

    def explanation(self) -> camserve.Explanation:
        outcome = self.outcome()
        assert isinstance(outcome, camserve.Explanation), outcome
        return outcome


def submitted(client: camserve.Client, **arguments: Any) -> Waiting:
    """Send a request, and return when an engine has its plan."""
    jobs: list[Any] = []
    with after_submit(jobs.append):
        request = Waiting(client, **arguments)
        wait_until(lambda: jobs)
    return request


def states(address: str, *services: str) -> list[int]:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return [stub.Check(health_pb2.HealthCheckRequest(service=each)).status for each in services]


def fail(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next batch of an engine end its thread."""
    monkeypatch.setattr(engine._loop, "_run_batch", lambda batch: 1 / 0)


# ---- the choice of the device ----------------------------------------------------------------------------------------


def test_requests_go_to_the_device_that_owes_the_fewest_rows(server: Server, client: camserve.Client) -> None:
    first, second = server.engines.local
    with ExitStack() as ends:
        ends.enter_context(stopped(first))
        ends.enter_context(stopped(second))
        requests = []
        for masks, expected in [
            (99, [100, 0]),  # the first device, because both owe nothing
            (29, [100, 30]),
            (49, [100, 80]),
            (19, [100, 100]),
            (9, [110, 100]),  # the first one again, because both owe as much
            (4, [110, 105]),
        ]:
            requests.append(submitted(client, method="rise", parameters={"masks": masks}))
            assert owed(server) == expected
        each_s = [engine.seconds_owed() for engine in (first, second)]
        assert server.engines.seconds_owed() == pytest.approx(sum(each_s) / 2), (
            "load reports: the devices share requests"
        )
    names = [each.explanation().receipt.device_name for each in requests]
    assert names == ["cpu:0", "cpu:1", "cpu:1", "cpu:1", "cpu:0", "cpu:1"]
    wait_until(lambda: owed(server) == [0, 0])


def test_all_rows_of_a_request_run_on_one_device(server: Server, client: camserve.Client) -> None:
    before = [engine.counters.rows for engine in server.engines.local]
    cost = client.explain(IMAGE, method="poly-cam", metrics=["insertion", "average-drop"]).cost
    ran = [engine.counters.rows - rows for engine, rows in zip(server.engines.local, before, strict=True)]
    assert sorted(ran) == [0, cost.rows]


@pytest.mark.slow
def test_devices_share_the_limit_of_rows_and_the_quotas() -> None:
    token = TokenConfig(name="anna", sha256=hashed("a"), max_rows_owed=600)
    other = TokenConfig(name="bert", sha256=hashed("b"))
    with (
        serving(Config(**TWO, tokens=[token, other], max_rows_owed=1000)) as server,
        patient_client(server.address, token="a") as anna,
        patient_client(server.address, token="b") as bert,
        stopped(server.engines.local[0]),
        stopped(server.engines.local[1]),
    ):
        requests = [submitted(anna, **RISE)]
        with pytest.raises(camserve.ResourceExhausted) as caught:
            anna.explain(IMAGE, **RISE)
        assert caught.value.reason == "QUOTA_EXCEEDED", "the other device owes no rows"
        requests.append(submitted(bert, **RISE))
        assert owed(server) == [401, 401]
        with pytest.raises(camserve.ResourceExhausted) as caught:
            bert.explain(IMAGE, **RISE)
        assert caught.value.reason == "QUEUE_FULL"
        for request in requests:
            threading.Thread(target=request.outcome).start()


def test_cancelled_request_frees_its_device(server: Server, client: camserve.Client) -> None:
    with stopped(server.engines.local[0]):
        waiting = submitted(client, **RISE)
        with open_stream(client, **ENDLESS) as stream:
            next(iter(stream))
            assert owed(server)[1] > 50_000
        wait_until(lambda: owed(server)[1] == 0)
    assert waiting.explanation().receipt.device_name == "cpu:0"


# ---- results ---------------------------------------------------------------------------------------------------------


@contextmanager
def first_device_busy(server: Server, client: camserve.Client) -> Iterator[None]:
    """Let further requests go to the second device: the first one owes many rows."""
    with stopped(server.engines.local[0]):
        stream = client.explain_stream(IMAGE, **ENDLESS)
        reader = threading.Thread(target=lambda: next(iter(stream), None))
        reader.start()
        wait_until(lambda: owed(server)[0] > 50_000)
        yield
    reader.join(LIMIT_S)
    stream.close()
    wait_until(lambda: owed(server)[0] == 0)


@pytest.mark.slow
@pytest.mark.parametrize("front_ends", [1, 2])
def test_each_device_gives_the_bits_of_a_server_with_one(front_ends: int) -> None:
    requests: list[dict[str, Any]] = [
        {"method": "grad-cam"},
        {"method": "poly-cam", "metrics": ["insertion", "average-drop"]},
        {"method": "opti-cam", "parameters": {"steps": 5}},
        {"method": "rise", "parameters": {"masks": 50}, "seed": 3, "metrics": ["average-gain"]},
        {"method": "grad-cam", "metrics": ["randomisation-ssim"]},
    ]
    with serving(Config(**{**TWO, "device": "cpu"})) as server, patient_client(server.address) as client:
        [model], expected = client.models(), [client.explain(IMAGE, **each) for each in requests]
        assert (model.device, model.devices) == ("cpu", ())
    assert {each.receipt.device_name for each in expected} == {""}
    with serving(Config(**TWO, frontends=front_ends)) as server, patient_client(server.address) as client:
        [model], first = client.models(), [client.explain(IMAGE, **each) for each in requests]
        assert (model.device, model.devices) == ("cpu", ("cpu:0", "cpu:1"))
        with first_device_busy(server, client):
            second = [client.explain(IMAGE, **each) for each in requests]
            replayed = client.replay(expected[1].receipt, IMAGE)
        assert {each.receipt.device_name for each in first} == {"cpu:0"}
        assert {each.receipt.device_name for each in (*second, replayed.explanation)} == {"cpu:1"}
    for results in zip(expected, first, second, strict=True):
        for each in results[1:]:
            assert np.array_equal(each.saliency, results[0].saliency)
            assert each.scores == results[0].scores
            assert differences(each.receipt, results[0].receipt) == {}
    assert (replayed.same, replayed.differences) == (True, {}), "a replay ignores the names of devices"


@pytest.mark.slow
def test_result_cache_serves_the_requests_of_all_devices() -> None:
    with serving(Config(**TWO, cache=CacheConfig())) as server, patient_client(server.address) as client:
        computed = client.explain(IMAGE, method="grad-cam")
        with first_device_busy(server, client):
            stored = client.explain(IMAGE, method="grad-cam")
            assert client.explain(IMAGE, method="score-cam").receipt.device_name == "cpu:1"
    assert (computed.cost.cached, stored.cost.cached) == (False, True)
    assert stored.receipt.device_name == "cpu:0", "the device that has computed the response"


@pytest.mark.slow
def test_lack_of_memory_on_one_device_changes_the_batch_size_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()

    def fails_once(model: Model, lane: Lane, slices: Sequence[BatchSlice], size: int) -> None:
        if threading.current_thread().name == "engine-cpu:1" and size == 4 and not failed.is_set():
            failed.set()
            raise torch.OutOfMemoryError("no memory")
        run_batch(model, lane, slices, size)

    with serving(Config(**TWO)) as server, patient_client(server.address) as client:
        before = client.explain(IMAGE, **RISE).receipt
        monkeypatch.setattr(batch_runner, "run_batch", fails_once)
        with first_device_busy(server, client):
            halved = client.explain(IMAGE, **RISE).receipt
        assert failed.is_set()
        after = client.explain(IMAGE, **RISE).receipt
    assert [each.device_name for each in (before, halved, after)] == ["cpu:0", "cpu:1", "cpu:0"]
    assert [each.batch_sizes["forward"] for each in (before, after)] == [4, 2]


# ---- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("front_ends", [1, 2])
@pytest.mark.parametrize("failing", [0, 1])
def test_device_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, failing: int, front_ends: int
) -> None:
    config = Config(**TWO, health_listen="127.0.0.1:0", frontends=front_ends)
    broken, other = f"cpu:{failing}", f"cpu:{1 - failing}"
    with serving(config) as server, patient_client(server.address) as client:
        addresses = (server.address, server.health_address)
        for address in addresses:
            assert states(address, SERVICE, "cpu:0", "cpu:1") == [SERVING] * 3
        alone = client.explain(IMAGE, **RISE)
        with ExitStack() as ends:
            for engine in server.engines.local:
                ends.enter_context(stopped(engine))
            requests = [submitted(client, **RISE) for _ in range(4)]
            fail(server.engines.local[failing], monkeypatch)
        outcomes = [each.outcome() for each in requests]
        for number, outcome in enumerate(outcomes):
            if number % 2 == failing:
                assert isinstance(outcome, camserve.InternalError)
                assert "the engine failed" in str(outcome)
            else:
                assert isinstance(outcome, camserve.Explanation)
                assert np.array_equal(outcome.saliency, alone.saliency)
        wait_until(lambda: all(states(address, broken) == [NOT_SERVING] for address in addresses))
        for address in addresses:
            assert states(address, SERVICE, other) == [SERVING] * 2
        now = Scrape(server)
        assert now.sum("camserve_ready") == 1
        assert now.sum("camserve_device_working", device=broken) == 0
        assert now.sum("camserve_device_working", device=other) == 1
        assert now.sum("camserve_queue_rows") == now.sum("camserve_device_queue_rows") == 0
        for _ in range(3):
            assert client.explain(IMAGE, method="grad-cam").receipt.device_name == other
        assert not server.engines.failed.done()
        fail(server.engines.local[1 - failing], monkeypatch)
        with pytest.raises(camserve.InternalError):
            client.explain(IMAGE, method="grad-cam")
        assert isinstance(server.engines.failed.exception(LIMIT_S), ZeroDivisionError)
        with pytest.raises(camserve.Unavailable):
            client.explain(IMAGE, method="grad-cam", timeout=UNARY_S)


@pytest.mark.slow
def test_request_whose_image_is_decoded_while_its_device_fails_gets_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plan has not begun, but the server has announced the call, so that the client does not send it again."""
    with serving(Config(**TWO)) as server, patient_client(server.address) as client:
        engine, submit = server.engines.local[0], server.engines.local[0]._loop.submit

        def fail_first(job: Any) -> None:
            engine._loop._inbox.put(lambda: 1 / 0)  # type: ignore[arg-type]
            wait_until(engine.ended.done)
            submit(job)

        monkeypatch.setattr(engine._loop, "submit", fail_first)
        with pytest.raises(camserve.Unavailable):
            client.explain(IMAGE, method="grad-cam", timeout=UNARY_S)
        assert engine.rows_owed() == 0
        assert client.explain(IMAGE, method="grad-cam").receipt.device_name == "cpu:1"


@pytest.mark.slow
def test_process_goes_on_with_one_device_and_ends_without_any(tmp_path: Path) -> None:
    config = tmp_path / "camserve.toml"
    config.write_text(TRICKY.replace('device = "cpu"', 'device = "cpu:0,1"\nthreads = 1'))
    with served(config) as server, patient_client(server.address) as client:
        for name in ("cpu:0", "cpu:1"):
            assert client.explain(VALID, method="grad-cam").receipt.device_name == name
            with pytest.raises(camserve.InternalError):
                client.explain(LETHAL, method="grad-cam")
        assert server.process.wait(LIMIT_S) == 1
        log = server.stderr()
    assert log.count("a device failed; the others go on") == 1
    assert log.count("the engine's thread failed; the server ends") == 1


# ---- operation -------------------------------------------------------------------------------------------------------


def write(folder: Path, seed: int) -> Path:
    """Write a configuration file with two models, of which one fits into memory, and weights from this seed."""
    for name in ("a", "b"):
        save_file(nets.tiny_cnn(seed=seed).state_dict(), folder / f"{name}.safetensors")
    bytes_of_one = sum(value.nbytes for value in nets.tiny_cnn().state_dict().values())
    path = folder / "camserve.toml"
    path.write_text(
        'listen = "127.0.0.1:0"\nadmin_listen = "127.0.0.1:0"\ndevice = "cpu:0,1"\nthreads = 1\n'
        f"max_model_bytes = {bytes_of_one}\n"
        + "".join(
            f'[[models]]\nname = "{name}"\nsource = "python:tests.nets:tiny_cnn"\nweights = "{name}.safetensors"\n'
            "input_size = [32, 32]\nbatch_size = 4\n"
            for name in ("a", "b")
        )
    )
    return path


@pytest.mark.slow
def test_models_are_reloaded_swapped_and_unloaded_on_all_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, seed=1)
    with (
        capture_logs() as log,
        serving(read_config(path)) as server,
        patient_client(server.address) as client,
        grpc.insecure_channel(server.admin_address) as channel,
    ):
        operator = AdminServiceStub(channel)

        def explained_by_both(model: str) -> list[camserve.Explanation]:
            client.explain(IMAGE, model=model, method="grad-cam")  # loads the model if it is not loaded
            with ExitStack() as ends:
                for engine in server.engines.local:
                    ends.enter_context(stopped(engine))
                requests = [submitted(client, model=model, **RISE) for _ in range(2)]
            results = [each.explanation() for each in requests]
            assert [each.receipt.device_name for each in results] == ["cpu:0", "cpu:1"]
            assert np.array_equal(results[0].saliency, results[1].saliency)
            return results

        [before, _] = explained_by_both("a")
        write(tmp_path, seed=2)
        reply = operator.ReloadModel(admin.ReloadModelRequest(model="a"))
        assert reply.model.devices == ["cpu:0", "cpu:1"]
        [after, _] = explained_by_both("a")
        assert after.receipt.model_digest == reply.model.digest != before.receipt.model_digest
        explained_by_both("b")  # "a" makes room for it
        operator.UnloadModel(admin.UnloadModelRequest(model="b"))
        explained_by_both("a")
        operator.LoadModel(admin.LoadModelRequest(model="b"))
        explained_by_both("b")
        fail(server.engines.local[0], monkeypatch)
        with pytest.raises(camserve.InternalError):
            client.explain(IMAGE, model="b", method="grad-cam")
        write(tmp_path, seed=3)
        reply = operator.ReloadModel(admin.ReloadModelRequest(model="b"))
        assert reply.model.devices == ["cpu:1"], "the device that still works"
        assert client.explain(IMAGE, model="b", method="grad-cam").receipt.model_digest == reply.model.digest
        assert client.explain(IMAGE, model="a", method="grad-cam").receipt.device_name == "cpu:1"
    assert {line["device"] for line in log if line["event"] == "loaded"} == {"cpu:0, cpu:1", "cpu:1"}
    calls = {line["device"] for line in log if line["event"] == "call" and "rows" in line}
    assert calls == {"cpu:0", "cpu:1"}


@pytest.mark.slow
@pytest.mark.parametrize("front_ends", [1, 2])
def test_requests_of_all_devices_are_finished_when_the_server_drains(tmp_path: Path, front_ends: int) -> None:
    config = tmp_path / "camserve.toml"
    config.write_text(
        f'listen = "127.0.0.1:0"\ndevice = "cpu:0,1"\nthreads = 1\ngrace_s = {LIMIT_S}\nfrontends = {front_ends}\n'
        '[[models]]\nname = "tiny"\nsource = "python:tests.nets:tiny_cnn"\ninput_size = [32, 32]\nbatch_size = 4\n'
    )
    with served(config) as server, patient_client(server.address) as client:
        assert len(children(server.process.pid)) >= (front_ends if front_ends > 1 else 0)
        longer: dict[str, Any] = {
            "method": "rise",
            "parameters": {"masks": 1500},
        }  # no request ends before the next one arrives
        streams = [client.explain_stream(IMAGE, **longer) for _ in range(4)]
        for stream in streams:
            next(stream)
        server.process.terminate()
        results = [[*stream][-1] for stream in streams]
        assert server.process.wait(LIMIT_S) == 0
    explanations = [each for each in results if isinstance(each, camserve.Explanation)]
    assert len(explanations) == 4
    assert {each.receipt.device_name for each in explanations} == {"cpu:0", "cpu:1"}


def test_metrics_name_the_devices(server: Server, client: camserve.Client) -> None:
    rows = client.explain(IMAGE, method="grad-cam").cost.rows
    assert rows > 0
    now = Scrape(server)
    assert now.sum("camserve_device_rows_total") == now.sum("camserve_rows_total")
    for name in ("cpu:0", "cpu:1"):
        assert now.sum("camserve_device_working", device=name) == 1
        assert now.sum("camserve_model_info", device=name) == 1
