"""Calls through real proxies: each ends with a result or an error that names the cause, and runs at most once."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from torch import Tensor, nn

import camserve
from camserve_server.config import Config, ModelConfig
from camserve_server.engine.job import Job
from camserve_server.service import event_stream
from camserve_server.service.server import Server
from tests import nets
from tests.conftest import serving
from tests.e2e.engines import after_submit
from tests.processes import LIMIT_S, free_port, overloaded_server, served
from tests.proxies import Settings, proxied

pytestmark = pytest.mark.slow

IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
LARGE = np.zeros((700, 700, 3), np.uint8)  # 1.4 MiB
SLEEP_S = 0.1
# 31 batches of four rows: the prediction and the masks.
LONG: dict[str, Any] = {"method": "rise", "parameters": {"masks": 120}}
BRIEF: dict[str, Any] = {"method": "rise", "parameters": {"masks": 40}}
SHORT: dict[str, Any] = {"method": "grad-cam"}
# The client uses the unary RPC for the first timeout and the streaming RPC for the second one.
UNARY_S, STREAMED_S = 29.0, float(LIMIT_S)


class Slow(nn.Module):
    """A network that takes 0.1 s for a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nets.tiny_cnn()

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(SLEEP_S)
        return self.net(x)  # type: ignore[no-any-return]


def slow() -> nn.Module:
    """Return the network; the configuration names this factory."""
    return Slow()


MODEL: dict[str, Any] = {"name": "slow", "source": "python:tests.e2e.test_proxies:slow", "input_size": (32, 32)}

CONFIG = f"""
listen = "127.0.0.1:0"
device = "cpu"

[[models]]
name = "slow"
source = "{MODEL["source"]}"
input_size = [32, 32]
batch_size = 4
"""


@pytest.fixture(scope="module", params=[1, 2], ids=["plain", "front ends"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    config = Config(listen="127.0.0.1:0", frontends=request.param, models=[ModelConfig(**MODEL, batch_size=4)])
    with serving(config) as running:
        yield running


@pytest.fixture(params=["nginx", "haproxy"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def jobs() -> Iterator[list[Job[Any]]]:
    """The jobs that a server in this process has started."""
    started: list[Job[Any]] = []
    with after_submit(started.append):
        yield started


def test_proxy_that_refuses_large_requests_is_named(
    server: Server, kind: str, jobs: list[Job[Any]], tmp_path: Path
) -> None:
    with (
        proxied(kind, [server.address], tmp_path, Settings(max_body=1 << 20)) as address,
        camserve.Client(address) as client,
    ):
        for timeout in (UNARY_S, STREAMED_S):
            with pytest.raises(
                camserve.TooLarge, match=r"proxy .* HTTP status 413: the request is too large"
            ) as caught:
                client.explain(LARGE, **SHORT, timeout=timeout)
            assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert (caught.value.reason, caught.value.retry_after_s) == ("TOO_LARGE", None)
        assert not jobs
        assert client.explain(IMAGE, **SHORT).maps


@pytest.mark.parametrize("timeout", [UNARY_S, STREAMED_S])
def test_call_that_a_proxy_ends_is_not_repeated(
    server: Server, kind: str, jobs: list[Job[Any]], tmp_path: Path, timeout: float
) -> None:
    with (
        proxied(kind, [server.address], tmp_path, Settings(timeout_s=1)) as address,
        camserve.Client(address, timeout=timeout) as client,
    ):
        with pytest.raises(camserve.Unavailable, match="increase its read timeout") as caught:
            client.explain(IMAGE, **LONG, request_id="case-1")
        assert (caught.value.reason, caught.value.request_id) == ("INTERRUPTED", "case-1")
        assert len(jobs) == 1

        async def ask() -> None:
            async with camserve.aio.Client(address, timeout=timeout) as aio_client:
                await aio_client.explain(IMAGE, **LONG)

        with pytest.raises(camserve.Unavailable, match="does not repeat a call"):
            asyncio.run(ask())
        [result] = client.explain_many([IMAGE], **LONG, timeout=timeout)
        assert isinstance(result.error, camserve.Unavailable)
        assert len(jobs) == 3


def test_heartbeats_keep_long_calls_alive(
    server: Server, kind: str, jobs: list[Job[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy ends calls after three seconds without data. The calls take longer.

    Heartbeats are much more frequent, so that a pause of a busy machine does not end a call.
    """
    monkeypatch.setattr(event_stream, "HEARTBEAT_S", 0.1)
    limit_s = 3
    longer: dict[str, Any] = {"method": "rise", "parameters": {"masks": 160}}
    with (
        proxied(kind, [server.address], tmp_path, Settings(timeout_s=limit_s)) as address,
        camserve.Client(address, timeout=STREAMED_S) as client,
    ):
        assert client.explain(IMAGE, **longer).cost.rows == 161
        assert client.evaluate(IMAGE, **longer, metrics="average-drop").cost.rows > 161
        assert [result.cost.rows for result in client.explain_many([IMAGE], **longer)] == [161]
        assert len(jobs) == 3

        async def ask() -> camserve.Explanation:
            async with camserve.aio.Client(address, timeout=STREAMED_S) as aio_client:
                return await aio_client.explain(IMAGE, **longer)

        assert asyncio.run(ask()).cost.rows == 161
        # Each batch of four rows takes `SLEEP_S` at least, so without heartbeats the proxy would end the calls.
        assert limit_s < 161 / 4 * SLEEP_S


@pytest.mark.parametrize("status", [403, 404, 502])
def test_proxy_that_refuses_watch_is_no_obstacle(
    server: Server, kind: str, tmp_path: Path, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def ask(address: str) -> camserve.Explanation:
        async with camserve.aio.Client(address, timeout=STREAMED_S) as aio_client:
            return await aio_client.explain(IMAGE, **SHORT)

    with proxied(kind, [server.address], tmp_path, Settings(watch=status)) as address:
        with camserve.Client(address) as client:
            assert client.explain(IMAGE, **SHORT).maps
            assert [*client.explain_stream(IMAGE, **SHORT)]
            assert [result.error for result in client.explain_many([IMAGE], **SHORT)] == [None]
        with camserve.Client(address) as client:
            assert [*client.explain_stream(IMAGE, **SHORT)]
        assert asyncio.run(ask(address)).maps
        named = [record.message for record in caplog.records if "/grpc.health.v1.Health/Watch" in record.message]
        assert bool(named) == (status != 404)  # gRPC itself stops watching if the status is UNIMPLEMENTED
        caplog.clear()
        with camserve.Client(address, health_checks=False) as client:
            assert client.models()
        # Several event loops in one process disturb the poller of gRPC, which asyncio logs.
        assert not [record for record in caplog.records if record.name != "asyncio"]


def test_tls_proxy_forwards_calls_and_streams(server: Server, kind: str, jobs: list[Job[Any]], tmp_path: Path) -> None:
    """The events of a stream arrive while the request runs."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    tls = issued.private_key_pem.bytes(), b"".join(each.bytes() for each in issued.cert_chain_pems)
    with (
        proxied(kind, [server.address], tmp_path, Settings(tls=tls, timeout_s=1, max_body=1 << 20)) as address,
        camserve.Client(address, ca=authority.cert_pem.bytes()) as client,
    ):
        event = next(stream := client.explain_stream(IMAGE, **LONG))
        assert isinstance(event, camserve.Progress)
        assert not jobs[0].future.done()
        assert isinstance([*stream][-1], camserve.Explanation)
        with pytest.raises(camserve.TooLarge):
            client.explain(LARGE, **SHORT)
        with pytest.raises(camserve.Unavailable, match="does not repeat a call"):
            client.explain(IMAGE, **LONG)
        assert len(jobs) == 2


def test_proxy_without_a_server_is_named(kind: str, tmp_path: Path) -> None:
    """Many calls at once, because nginx then closes about one stream in ten before gRPC has read the HTTP status."""
    with proxied(kind, [f"127.0.0.1:{free_port()}"], tmp_path, Settings()) as address:

        def call(_: int) -> str:
            with camserve.Client(address, timeout=STREAMED_S) as client, pytest.raises(camserve.Unavailable) as failure:
                client.explain(IMAGE, **SHORT)
            return str(failure.value)

        with ThreadPoolExecutor(40) as threads:
            messages = {*threads.map(call, range(40))}
    (message,) = messages
    assert re.match(r"a proxy .* HTTP status 50[23]: .*check that the server runs", message)


def test_killed_server_fails_only_calls_that_it_had_started(kind: str, tmp_path: Path) -> None:
    """The other server runs the other calls, and none of those that failed."""
    paths = [tmp_path / "a.toml", tmp_path / "b.toml"]
    for path in paths:
        path.write_text(CONFIG)
    outcomes: dict[str, Any] = {}

    def call(client: camserve.Client, name: str) -> None:
        try:
            outcomes[name] = client.explain(IMAGE, **BRIEF, request_id=name, timeout=STREAMED_S)
        except camserve.CamserveError as error:
            outcomes[name] = error

    with (
        served(paths[0]) as victim,
        served(paths[1]) as survivor,
        proxied(kind, [victim.address, survivor.address], tmp_path, Settings()) as address,
        camserve.Client(address) as client,
    ):
        threads = [threading.Thread(target=call, args=(client, f"early-{i}")) for i in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(3 * SLEEP_S)
        victim.process.kill()
        threads += [threading.Thread(target=call, args=(client, f"late-{i}")) for i in range(4)]
        for thread in threads[6:]:
            thread.start()
        for thread in threads:
            thread.join(LIMIT_S)
        log = re.sub(r"\x1b\[\d*m", "", survivor.stderr())
    assert len(outcomes) == len(threads)
    failed = {name for name, outcome in outcomes.items() if isinstance(outcome, camserve.CamserveError)}
    assert failed < set(outcomes)
    for name, outcome in outcomes.items():
        runs = len(re.findall(rf"^call .*request_id={name} ", log, re.MULTILINE))
        if name in failed:
            assert isinstance(outcome, camserve.Unavailable)
            assert "lost" in outcome.message or "proxy" in outcome.message
            assert runs == 0
        else:
            assert runs == 1, log


def test_lost_connection_is_not_a_refused_watch(caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise, a client would no longer check the health of servers once one of them has ended."""
    with overloaded_server() as address, camserve.Client(address) as client, pytest.raises(camserve.Unavailable):
        client.explain(IMAGE, **SHORT)
    assert not [record for record in caplog.records if "refuses" in record.message]
