"""The exported Prometheus metrics, and the Grafana dashboard that uses them."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from prometheus_client.parser import text_string_to_metric_families

import camserve
from camserve_server.config import Config, ModelConfig, TokenConfig, read_config
from camserve_server.errors import ConfigError
from camserve_server.service.server import Server
from tests.conftest import serving
from tests.e2e.engines import engine_of, wait_until
from tests.processes import LIMIT_S, patient_client
from tests.promql import PROCESS_METRICS, documented, named_labels, series
from tests.support import full_batches, stopped

ROOT = Path(__file__).parents[2]
CAT = skimage.data.chelsea()
TINY = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)


@pytest.fixture(scope="module")
def watched() -> Iterator[Server]:
    """Run a server with a small model and a listener for Prometheus."""
    config = Config(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", models=[TINY])
    with full_batches(), serving(config) as server:
        yield server


@pytest.fixture
def client(watched: Server) -> Iterator[camserve.Client]:
    with patient_client(watched.address) as client:
        yield client


class Scrape(dict[tuple[str, frozenset[tuple[str, str]]], float]):
    """The values that Prometheus reads, by name and labels."""

    def __init__(self, server: Server) -> None:
        with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=LIMIT_S) as answer:
            self.families = [*text_string_to_metric_families(answer.read().decode())]
        super().__init__(
            ((sample.name, frozenset(sample.labels.items())), sample.value)
            for family in self.families
            for sample in family.samples
        )

    def sum(self, name: str, **labels: str) -> float:
        """Return the sum of all samples with this name and these labels."""
        return sum(value for (each, has), value in self.items() if each == name and labels.items() <= has)


IDLE = (
    "camserve_requests_in_flight",
    "camserve_requests_oldest_seconds",
    "camserve_queue_rows",
    "camserve_queue_requests",
    "camserve_queue_oldest_seconds",
)


def idle(server: Server) -> bool:
    now = Scrape(server)
    return all(now.sum(name) == 0 for name in IDLE)


# ---- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_metrics_of_one_request(watched: Server, client: camserve.Client) -> None:
    wait_until(lambda: idle(watched))
    before = Scrape(watched)
    cost = client.explain(CAT, method="score-cam").cost
    after = Scrape(watched)

    def more(name: str, **labels: str) -> float:
        return after.sum(name, **labels) - before.sum(name, **labels)

    forward = {"model": "tiny", "precision": "fp32", "lane": "forward"}
    assert more("camserve_rows_total", **forward) == more("camserve_rows_total") == cost.rows
    batches = more("camserve_batch_seconds_count", **forward)
    assert batches == more("camserve_batch_seconds_bucket", **forward, le="+Inf") == cost.batches
    assert more("camserve_padding_rows_total", **forward) == 4 * batches - cost.rows
    assert 0 < more("camserve_batch_seconds_sum", **forward) <= 1e-3 * cost.compute_ms
    assert more("camserve_requests_total", rpc="ExplainStream", method="score-cam", code="OK") == 1
    assert more("camserve_request_queue_seconds_sum", method="score-cam") == pytest.approx(1e-3 * cost.queue_ms)
    assert more("camserve_request_compute_seconds_sum", method="score-cam") == pytest.approx(1e-3 * cost.compute_ms)
    took = more("camserve_request_duration_seconds_sum", rpc="ExplainStream", method="score-cam")
    assert took > 1e-3 * (cost.queue_ms + cost.compute_ms)


def test_labels_never_contain_unknown_names(watched: Server, client: camserve.Client) -> None:
    """Names that a caller invents must not create time series."""
    before = Scrape(watched)
    with pytest.raises(camserve.NotFound):
        client.explain(CAT, method="made-up")
    with pytest.raises(camserve.NotFound):
        client.explain(CAT, method="grad-cam", model="made-up")
    with pytest.raises(camserve.InvalidArgument):
        client.evaluate(CAT, saliency=np.zeros((4, 4), np.float32), metrics={"insertion": {"steps": -1}})
    client.models()
    after = Scrape(watched)
    for labels in (
        {"rpc": "ExplainStream", "method": "other", "code": "NOT_FOUND"},
        {"rpc": "ExplainStream", "method": "grad-cam", "code": "NOT_FOUND"},
        {"rpc": "EvaluateStream", "method": "", "code": "INVALID_ARGUMENT"},
        {"rpc": "ListModels", "method": "", "code": "OK"},
    ):
        assert after.sum("camserve_requests_total", **labels) == 1 + before.sum("camserve_requests_total", **labels)
    assert not [labels for _, labels in after if "made-up" in dict(labels).values()]


@pytest.mark.slow
def test_expired_requests_are_not_counted_as_cancelled(
    watched: Server, client: camserve.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    # gRPC reports an expired deadline to the server as a cancellation, which can arrive before the server's own
    # deadline. How much earlier depends on the delay with which the call arrived, and so on the machine.
    monkeypatch.setattr("camserve_server.service.call.EXPIRED_SHARE", 1.0)

    def ended(code: str) -> float:
        return Scrape(watched).sum("camserve_requests_total", rpc="Explain", method="occlusion", code=code)

    def explain(timeout: float) -> bool:
        try:
            return bool(client.explain(CAT, method="occlusion", parameters={"stride": 1}, timeout=timeout).maps)
        except camserve.DeadlineExceeded:
            return False

    assert explain(LIMIT_S)
    before = {code: ended(code) for code in ("OK", "DEADLINE_EXCEEDED", "CANCELLED")}
    late, timeout = 0, 0.5
    # A call whose deadline passes before it is sent does not reach the server, which then does not count it.
    while ended("DEADLINE_EXCEEDED") == before["DEADLINE_EXCEEDED"]:
        with stopped(engine_of(watched)), ThreadPoolExecutor(24) as pool:
            assert not any(pool.map(explain, [timeout] * 24)), "the device runs nothing"
        late += 24
        wait_until(lambda: idle(watched))
        timeout *= 2
    assert ended("DEADLINE_EXCEEDED") <= before["DEADLINE_EXCEEDED"] + late
    assert ended("OK") == before["OK"]
    assert ended("CANCELLED") == before["CANCELLED"]


def test_gauges_return_to_zero_after_load(watched: Server, client: camserve.Client) -> None:
    """The load consists of answered, failed and cancelled requests and of closed connections."""
    before = Scrape(watched)
    forever = {"steps": 10_000}
    streams = [client.explain_stream(CAT, method="opti-cam", parameters=forever) for _ in range(3)]
    for stream in streams:
        next(event for event in stream if isinstance(event, camserve.Progress) and event.rows_done > 1)
    loaded = Scrape(watched)
    assert loaded.sum("camserve_requests_in_flight") == 3
    assert loaded.sum("camserve_queue_rows") > 20_000
    assert loaded.sum("camserve_queue_max_rows") == Config().max_rows_owed
    assert loaded.sum("camserve_requests_oldest_seconds") > 0
    with pytest.raises(camserve.InvalidArgument):
        client.explain(CAT, method="opti-cam", target=7)
    client.explain(CAT, method="grad-cam")
    for stream in streams[1:]:
        stream.close()
    with patient_client(watched.address) as other:
        next(other.explain_stream(CAT, method="opti-cam", parameters=forever))
    streams[0].close()
    wait_until(lambda: idle(watched))
    after = Scrape(watched)
    stopped = {"rpc": "ExplainStream", "method": "opti-cam", "code": "CANCELLED"}
    assert after.sum("camserve_requests_total", **stopped) == 4 + before.sum("camserve_requests_total", **stopped)
    ended = "camserve_request_queue_seconds_count"
    assert after.sum(ended, method="opti-cam") == 4 + before.sum(ended, method="opti-cam"), (
        "the engine has ended all of them"
    )


def test_metrics_of_models_and_readiness(watched: Server) -> None:
    now = Scrape(watched)
    model = watched.models["tiny"]
    assert (now.sum("camserve_ready"), now.sum("camserve_draining")) == (1, 0)
    assert (now.sum("camserve_models", state="ready"), now.sum("camserve_models")) == (1, 1)
    assert now.sum("camserve_model_info", model="tiny", precision="fp32", digest=model.digest, device="cpu") == 1
    assert now.sum("camserve_model_weight_bytes", model="tiny") == model.weight_bytes > 0
    assert now.sum("camserve_batch_size", model="tiny", lane="gradient") == 4
    assert (
        now.sum("camserve_model_loads_total", model="tiny", result="ok") == now.sum("camserve_model_loads_total") == 1
    )
    assert now.sum("camserve_model_load_seconds_total", model="tiny") > 0
    assert now.sum("process_resident_memory_bytes") > 1e8


@pytest.mark.slow
def test_unauthenticated_calls_are_counted() -> None:
    token = TokenConfig(name="someone", sha256=64 * "0")
    config = Config(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0", models=[TINY], tokens=[token])
    with serving(config) as server, patient_client(server.address) as client:
        with pytest.raises(camserve.Unauthenticated):
            client.models()
        assert Scrape(server).sum("camserve_requests_total", rpc="ListModels", code="UNAUTHENTICATED") == 1


def test_all_metrics_are_documented(watched: Server, client: camserve.Client) -> None:
    client.explain(CAT, method="grad-cam")
    described = documented()
    exported = {}
    for family in Scrape(watched).families:
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels if label != "le"}
        exported[name] = (family.type, labels)
    process_metrics = {name for name in exported if name.startswith("process_")}
    assert process_metrics >= PROCESS_METRICS
    assert exported.keys() - process_metrics <= described.keys()
    assert {name: described[name] for name in exported if name in described} == {
        name: exported[name] for name in exported if name in described
    }
    missing = {
        name
        for name in described.keys() - exported.keys()
        if not name.startswith(("camserve_device_", "camserve_frontend", "camserve_cache"))
    }
    assert not missing
    assert torch.cuda.is_available() or not [name for name in exported if "device_memory" in name]


@pytest.mark.gpu
def test_metrics_of_gpu_memory() -> None:
    config = Config(
        listen="127.0.0.1:0",
        metrics_listen="127.0.0.1:0",
        models=[TINY.model_copy(update={"compile": False})],
        device="cuda",
    )
    with serving(config) as server:
        now = Scrape(server)
        used, held, total = (
            now.sum(f"camserve_device_memory_{what}_bytes", device="cuda:0")
            for what in ("allocated", "reserved", "total")
        )
        assert server.models["tiny"].weight_bytes <= used <= held <= total


def test_metrics_beyond_loopback_require_insecure() -> None:
    with pytest.raises(ConfigError, match=r"metrics_listen: .* insecure = true"):
        read_config(metrics_listen="0.0.0.0:9464")
    assert read_config(metrics_listen="0.0.0.0:9464", insecure=True).metrics_listen


def test_metrics_port_in_use_names_the_key(watched: Server) -> None:
    config = Config(listen="127.0.0.1:0", metrics_listen=watched.metrics_address, models=[TINY])

    async def start() -> None:
        server = Server(config)
        try:
            await server.start()
        finally:
            await server.stop(0)

    with pytest.raises(ConfigError, match=f"metrics_listen: cannot bind {watched.metrics_address}"):
        asyncio.run(start())


# ---- the dashboard ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dashboard_uses_each_exported_metric_and_no_other() -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "camserve.json").read_text(encoding="utf-8"))
    assert dashboard["title"]
    assert dashboard["schemaVersion"] >= 39
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    queries = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    queries += [
        variable["query"]["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"
    ]
    described = documented()
    used = {name for text in queries for name in re.findall(r"\b(?:camserve|process)_\w+", text)}
    assert used <= series(described).keys() | PROCESS_METRICS
    assert {name for name in described if not any(each.startswith(name) for each in used)} == set()
    for text in queries:  # each query groups by labels of the metrics that it uses
        known = {label for name, (_, has) in described.items() if name in text for label in has} | {"le", "instance"}
        assert named_labels(text) <= known, text


@pytest.mark.slow
def test_dashboard_panels_do_not_overlap() -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "camserve.json").read_text(encoding="utf-8"))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        for target in panel.get("targets", ()):
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
