"""Interruption of batches that another server runs."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from camserve_server.engine.batch_runner import BatchRunner
from camserve_server.engine.interruption import Interruption
from camserve_server.engine.job import Job, Limits
from camserve_server.engine.lanes.dispatch import BatchSlice, start_query
from camserve_server.errors import CamserveError, Cancelled, Expired, RemoteFailed, Unavailable
from camserve_server.plan import Predict
from tests import nets
from tests.support import as_model, noise


class Remote:
    """Runner that records what it is told."""

    def __init__(self) -> None:
        self.deadlines: list[float | None] = []
        self.errors: list[CamserveError] = []
        self.batches = 0

    def begin(self, deadline: float | None) -> None:
        self.deadlines.append(deadline)
        self.batches += 1

    def interrupt(self, error: CamserveError) -> None:
        self.errors.append(error)

    def end(self) -> None:
        self.batches -= 1


@pytest.fixture
def remote() -> Remote:
    return Remote()


@pytest.fixture
def interruption(remote: Remote) -> Interruption:
    return Interruption(remote)


def job(deadline: float | None = None) -> Job[Any]:
    made: Any = Job.__new__(Job)
    made.limits, made.cancelled = Limits(deadline=deadline), False
    return made  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("deadlines", "expected"), [((3.0, 5.0, 4.0), 5.0), ((3.0, None), None), ((None,), None), ((2.0,), 2.0)]
)
def test_batch_may_run_until_the_latest_deadline(
    remote: Remote, interruption: Interruption, deadlines: tuple[float | None, ...], expected: float | None
) -> None:
    with interruption.running([job(deadline) for deadline in deadlines]):
        pass
    assert remote.deadlines == [expected]


def test_batch_is_interrupted_when_the_last_of_its_jobs_is_cancelled(
    remote: Remote, interruption: Interruption
) -> None:
    a, b, other = job(), job(), job()
    with interruption.running([a, b]):
        interruption.cancel(a)
        interruption.cancel(other)
        assert not remote.errors
        interruption.cancel(b)
        [error] = remote.errors
        assert isinstance(error, Cancelled)
    assert not remote.batches


def test_jobs_that_were_cancelled_before_the_batch_count(remote: Remote, interruption: Interruption) -> None:
    a, b = job(), job()
    interruption.cancel(a)
    assert not remote.errors
    with interruption.running([a]):
        assert len(remote.errors) == 1
    with interruption.running([a, b]):
        assert len(remote.errors) == 1


def test_close_interrupts_the_running_batch_and_later_ones(remote: Remote, interruption: Interruption) -> None:
    with interruption.running([job()]):
        interruption.close()
    with interruption.running([job()]):
        pass
    assert len(remote.errors) == 2
    assert all(isinstance(error, Unavailable) for error in remote.errors)


def test_batch_ends_for_the_remote_runner_after_an_error(remote: Remote, interruption: Interruption) -> None:
    with pytest.raises(ZeroDivisionError), interruption.running([job()]):
        raise ZeroDivisionError
    assert not remote.batches


class Failing(nn.Module):
    """Network that fails and counts its calls."""

    def __init__(self, error: CamserveError) -> None:
        super().__init__()
        self.error, self.calls = error, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        raise self.error


@pytest.mark.parametrize(("kind", "calls"), [(Unavailable, 1), (Expired, 1), (Cancelled, 1), (RemoteFailed, 3)])
def test_batch_is_repeated_in_parts_only_if_a_part_may_be_the_reason(kind: type[CamserveError], calls: int) -> None:
    model = as_model(nets.tiny_cnn(), batch_size=2)
    model.module = network = Failing(kind("it fails"))
    queries = [start_query(Predict(model.image(noise(3, 32, 32))), model, model.batch_sizes) for _ in range(2)]
    slices = [BatchSlice(query, 0, 1) for _, query in queries]
    failures = BatchRunner(padded=True, on_halved=lambda *args: None).run(model, queries[0][0], slices)
    assert network.calls == calls
    assert [failures[id(each)] for each in slices] == [network.error] * 2
