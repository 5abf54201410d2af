"""Recordings of CUDA graphs, on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from camserve_server.engine.lanes.cuda_graph import WARM_UP_CALLS, empty_cache, record

GPU = torch.device("cuda")
MIB = 2**20

pytestmark = pytest.mark.gpu


def reserved() -> int:
    """Return the bytes that torch cannot return to the GPU."""
    torch.cuda.synchronize()
    empty_cache()
    return torch.cuda.memory_reserved()


def test_replay_computes_the_recorded_result() -> None:
    x = torch.ones(4, device=GPU)
    graph, doubled = record(lambda: x * 2, GPU)
    x.fill_(3)
    graph.replay()
    assert doubled.tolist() == [6] * 4
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_graphs_with_shared_memory_use_it_twice() -> None:
    x = torch.ones(64 * MIB, device=GPU)  # 256 MiB, as the temporary tensor of each graph

    def total() -> Tensor:
        return (x * 2).sum()

    graph, first = record(total, GPU)
    before = reserved()
    others = [record(total, GPU, graph.pool()) for _ in range(3)]
    assert reserved() < before + 64 * MIB
    x.fill_(2)
    graph.replay()
    assert float(first) == 4 * len(x)
    for each, result in others:
        each.replay()
        assert float(result) == 4 * len(x)


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "own memory"])
def test_failed_recording_leaves_no_trace(shared: bool) -> None:
    x = torch.ones(64 * MIB, device=GPU)
    before, _ = record(lambda: x[:4] + 1, GPU)
    memory = reserved()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            record(lambda: float((x * 2).sum()), GPU, before.pool() if shared else None)
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
    if not shared:  # otherwise the memory belongs to the graph before
        assert reserved() < memory + 64 * MIB
    empty_cache()
    graph, doubled = record(lambda: x[:4] * 2, GPU)
    graph.replay()
    assert doubled.tolist() == [2] * 4


def test_lack_of_memory_is_raised_even_if_the_end_of_the_recording_fails() -> None:
    x, calls = torch.ones(4, device=GPU), []

    def fails() -> None:
        calls.append(1)
        if len(calls) > WARM_UP_CALLS:
            with pytest.raises(RuntimeError):
                x.tolist()  # after this, the recording cannot end without an error
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        record(fails, GPU)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_kernels_of_a_failed_warm_up_end_before_later_ones() -> None:
    x, calls = torch.zeros(4, device=GPU), []

    def fails() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("out of order")
        torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call]
        x.fill_(1)

    with pytest.raises(ValueError, match="out of order"):
        record(fails, GPU)
    x.fill_(2)
    torch.cuda.synchronize()
    assert x.tolist() == [2] * 4
