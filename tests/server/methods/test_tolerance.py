"""Channels that Poly-CAM leaves out for a tolerance: the error is reported and within its bound."""

import pytest
import torch
from torch import Tensor, nn

from camserve_server.maps.channels import select_channels
from camserve_server.models.model import Model
from camserve_server.request_result import RequestResult
from tests import nets
from tests.support import TIMEOUT_S, as_model, call, explained, noise, running, submit

METHODS = ("poly-cam", "poly-cam+", "poly-cam-")
TARGETS = [2, 5]


@pytest.fixture(scope="module")
def model() -> Model:
    """Return a model whose last layer has increasingly weak channels, so that some can be left out."""
    net = nets.tiny_cnn()
    net.fc.weight.mul_(8)
    with torch.no_grad():
        net.c3.weight.mul_(torch.logspace(0, -5, len(net.c3.weight))[:, None, None, None])
        assert net.c3.bias is not None
        net.c3.bias.mul_(torch.logspace(0, -5, len(net.c3.bias)))
    return as_model(net, (37, 29), batch_size=8)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return noise(3, 37, 29)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("tolerance", [0.01, 0.1, 0.5])
def test_error_of_s_is_within_the_reported_bound(
    model: Model, x: Tensor, method: str, variant: str, tolerance: float
) -> None:
    # Hiding one channel may not change an unlikely class. S of PCAM− is then zero, and no channel is negligible.
    targets = 1 if method == "poly-cam-" else 2
    whole = explained(model, x, call(model, method, ["r3"], variant=variant), targets).raw
    result = explained(model, x, call(model, method, ["r3"], variant=variant, tolerance=tolerance), targets)
    (left,) = result.left_out
    assert left.channels > 0 and left.rows == left.channels * (2 if method == "poly-cam" else 1)
    assert result.share == 1
    for S, whole_S, error in zip(result.raw, whole, left.error, strict=True):
        assert error <= tolerance
        assert 0 < (whole_S - S).abs().max() <= error * whole_S.max()


def test_larger_tolerance_leaves_out_more_channels(model: Model, x: Tensor) -> None:
    left = [left_out(model, x, tolerance) for tolerance in (1e-6, 0.01, 0.1, 0.5)]
    assert left == sorted(left) and left[0] < left[-1]


def left_out(model: Model, x: Tensor, tolerance: float) -> int:
    result = explained(model, x, call(model, "poly-cam", tolerance=tolerance), TARGETS)
    return sum(each.channels for each in result.left_out)


def test_channels_left_out_save_rows(model: Model, x: Tensor) -> None:
    def rows(tolerance: float) -> tuple[int, RequestResult]:
        with running() as engine:
            job = submit(engine, model, x, call(model, "poly-cam", tolerance=tolerance), TARGETS)
            result = job.future.result(TIMEOUT_S)
            return job.rows, result

    all_rows, _ = rows(0)
    some_rows, result = rows(0.1)
    saved = sum(each.rows for each in result.left_out)
    # The last batch may contain further rows.
    assert all_rows - saved <= some_rows < all_rows - saved + 3 * model.batch_sizes["forward"]


def test_batches_do_not_change_the_channels_left_out(model: Model, x: Tensor) -> None:
    alone = explained(model, x, call(model, "poly-cam", tolerance=0.1), TARGETS)
    with running() as engine:
        others = [submit(engine, model, noise(3, 37, 29, seed=i), call(model, "rise", masks=50)) for i in range(5)]
        mine = submit(engine, model, x, call(model, "poly-cam", tolerance=0.1), TARGETS)
        amid = mine.future.result(TIMEOUT_S)
        for other in others:
            other.future.result(TIMEOUT_S)
    assert torch.equal(amid.maps, alone.maps) and amid.left_out == alone.left_out


def test_layer_with_negative_activations_leaves_out_nothing(x: Tensor) -> None:
    net = nets.tiny_cnn()
    net.r3 = nn.Identity()  # type: ignore[assignment]
    model = as_model(net, (37, 29))
    result = explained(model, x, call(model, "poly-cam", ["r3"], tolerance=0.5), TARGETS)
    assert result.left_out == ()


def test_constant_channels_are_merged() -> None:
    A = torch.stack([torch.full((4, 4), 2.0), noise(4, 4).abs(), torch.full((4, 4), 3.0), torch.zeros(4, 4)])
    selected = select_channels(A, include_zero=False)
    assert torch.equal(selected.merge(A), torch.stack([torch.full((4, 4), 5.0), A[1]]))


def test_budget_that_cuts_the_map_leaves_out_nothing(model: Model, x: Tensor) -> None:
    with running() as engine:
        result = submit(engine, model, x, call(model, "poly-cam", tolerance=1e-4), TARGETS, budget=8).future.result(
            TIMEOUT_S
        )
    assert result.share < 1 and result.left_out == ()
