"""Entries of the cache: the requests that have one, and the responses that it accepts."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from camserve.v1 import explain_pb2 as pb
from camserve_server.config import CacheConfig, Config, ModelConfig
from camserve_server.engine.job import Job
from camserve_server.models.model import Model
from camserve_server.service.codec import CodecThreads
from camserve_server.service.requests import parse_explain
from camserve_server.service.result_cache.cache import Entry, ResultCache
from camserve_server.service.result_cache.key import Keys
from tests.nets import tiny_cnn
from tests.support import TIMEOUT_S, Clock, as_model, call, noise, running, submit

SETTINGS = ModelConfig(name="model", source="python:tests.nets:tiny_cnn")
REQUEST = pb.ExplainRequest(
    image=pb.Image(pixels=pb.Pixels(height=8, width=8, data=bytes(192))), method=pb.MethodSpec(name="rise")
)
X = noise(3, 32, 32)


@pytest.fixture(scope="module")
def model() -> Model:
    return as_model(tiny_cnn())


def looked_up(
    model: Model,
    remote: object = None,
    owner: tuple[str, ...] = ("", "", ""),
    *,
    certificates: bool = False,
    shared: bool = False,
    **fields: Any,
) -> Entry | None:
    """Return the entry of a request in an empty cache."""

    async def run() -> Entry | None:
        keys = Keys(Config(), torch.device("cpu"))
        cache = ResultCache(CacheConfig(shared=shared), keys, CodecThreads(), certificates=certificates)
        request = pb.ExplainRequest(**fields)
        request.MergeFrom(REQUEST)
        lease: Any = SimpleNamespace(model=SimpleNamespace(remote=remote), settings=SETTINGS)
        parsed = parse_explain(request, model, Config())
        return await cache.look_up(request, parsed, lease, pb.ExplainResponse, owner, randomised=False)

    return asyncio.run(run())


def test_replays_and_remote_models_have_no_entry(model: Model) -> None:
    assert looked_up(model, batch_sizes={"forward": 4}) is None
    assert looked_up(model, remote=object()) is None
    entry = looked_up(model)
    assert entry is not None
    assert entry.value is None


def test_callers_whose_certificates_have_no_name_have_no_entry(model: Model) -> None:
    """They cannot be told from each other."""
    assert looked_up(model, certificates=True) is None
    assert looked_up(model, certificates=True, shared=True) is not None
    assert looked_up(model, owner=("", "", "anna"), certificates=True) is not None
    assert looked_up(model, owner=("anna", "hash", ""), certificates=True) is not None


def finished(model: Model, masks: int = 20, **limits: Any) -> Job[Any]:
    with running() as engine:
        job = submit(engine, model, X, call(model, "rise", masks=masks), **limits)
        job.future.result(TIMEOUT_S)
    return job


def test_complete_responses_are_accepted(model: Model) -> None:
    entry = looked_up(model)
    assert entry is not None
    assert entry.accepts(finished(model))
    assert entry.accepts(finished(model, deadline=time.monotonic() + 1e6))


def test_responses_within_a_budget_are_accepted(model: Model) -> None:
    """The budget is a part of the request, so the same request always stops there."""
    entry, job = looked_up(model), finished(model, budget=10, deadline=time.monotonic() + 1e6)
    assert entry is not None
    assert job.rows_at_early_stop
    assert entry.accepts(job)


@pytest.mark.parametrize("budget", [0, 10_000])
def test_responses_that_a_deadline_has_shortened_are_not_accepted(
    model: Model, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    clock = Clock().install(monkeypatch)
    entry = looked_up(model)
    model.throughput["forward"].observe(1000, 1.0)
    module = model.module

    class Slow(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            clock.advance(0.1)
            return module(x)  # type: ignore[no-any-return]

    monkeypatch.setattr(model, "module", Slow())
    job = finished(model, masks=100_000, deadline=time.monotonic() + 3, budget=budget)
    assert entry is not None
    assert job.rows_at_early_stop
    assert not entry.accepts(job)


def test_responses_of_smaller_batches_are_not_accepted(model: Model) -> None:
    """Memory ran out while the request was running."""
    entry, job = looked_up(model), finished(model)
    assert entry is not None
    job.batch_sizes["forward"] //= 2
    assert not entry.accepts(job)
