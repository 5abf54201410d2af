"""Infidelity of maps that predict the effect of the noise exactly."""

import pytest

from tests import nets
from tests.support import TIMEOUT_S, as_model, metric, noise, running, submit


def test_infidelity_of_a_single_sample_is_zero_and_never_negative() -> None:
    model, S = as_model(nets.tiny_cnn()), noise(32, 32).abs() / 5
    metrics = [metric("infidelity", seed=seed, samples=1) for seed in range(20)]
    with running() as engine:
        result = submit(engine, model, noise(3, 32, 32), S.clamp(max=1), [1], metrics).future.result(TIMEOUT_S)
    values = [score.value for score in result.scores[0]]
    assert min(values) >= 0
    assert values == pytest.approx([0.0] * 20, abs=1e-12)
