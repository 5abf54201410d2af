"""Throughput that follows the observed batches."""

from __future__ import annotations

import pytest

from camserve_server.models.throughput import WINDOW_S, Throughput


def test_unknown_before_the_first_observation() -> None:
    throughput = Throughput()
    assert (throughput.average, throughput.best(now=0.0)) == (0, 0)


def test_average_follows_in_both_directions() -> None:
    throughput = Throughput()
    throughput.observe(15, 1.0, now=0.0)
    assert throughput.average == 15
    for rate in (120, 10):
        for second in range(60):
            throughput.observe(rate, 1.0, now=second)
        assert throughput.average == pytest.approx(rate, rel=0.1)


def test_best_rate_is_the_highest_of_the_last_minutes() -> None:
    throughput = Throughput()
    throughput.observe(100, 1.0, now=0.0)
    throughput.observe(40, 1.0, now=1.0)
    assert throughput.best(now=1.0) == 100
    for second in range(2, int(3 * WINDOW_S)):
        throughput.observe(40, 1.0, now=second)
    assert throughput.best(now=3 * WINDOW_S) == 40
    throughput.observe(90, 1.0, now=3 * WINDOW_S)
    assert throughput.best(now=3 * WINDOW_S) == 90


def test_an_old_rate_is_forgotten() -> None:
    throughput = Throughput()
    throughput.observe(15, 1.0, now=0.0)
    assert throughput.best(now=WINDOW_S - 1) == 15
    assert throughput.best(now=2 * WINDOW_S) == 0
    assert throughput.average == 15
