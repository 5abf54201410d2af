"""Rows are recipes: what is alive at once is bounded by the batch, however many rows are owed. Counted in bytes."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.nets import tiny_cnn
from tests.support import as_model, call, noise, running, submit

SIZE = (64, 64)
BATCH = 8
ROW = 4 * 3 * 64 * 64  # bytes of one input

# Thousands of rows each; all of them at once would be as many times ROW.
LONG: list[tuple[str, dict[str, Any], int]] = [
    ("rise", {"masks": 6000}, 6000),
    ("ss-cam", {"samples": 100}, 100 * 18),
    ("is-cam", {"steps": 100}, 100 * 18),
    ("smooth-grad", {"samples": 500}, 500),
    ("gradient-shap", {"samples": 500}, 500),
    ("integrated-gradients", {"steps": 500}, 500),
    ("occlusion", {"stride": 1, "window": 30}, 35 * 35),
]


class Counting(nn.Module):
    """Notes how many bytes of tensors are alive whenever a batch arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_cnn()
        self.most = 0
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        if self.rows // len(x) % 37 == 1:  # looking at every object takes its time
            self.most = max(self.most, alive())
        return self.net(x)


def alive() -> int:
    """Bytes of all tensors, each storage once."""
    storages = {}
    for each in gc.get_objects():
        if type(each) in (Tensor, nn.Parameter):  # a compiler's fakes, which have no memory, may be about
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize(("method", "parameters", "rows"), LONG, ids=[method for method, *_ in LONG])
def test_memory_is_bounded_by_the_batch(method: str, parameters: dict[str, Any], rows: int) -> None:
    model = as_model(Counting(), SIZE, batch_size=BATCH)
    assert isinstance(model.module, Counting)
    x = noise(3, *SIZE)
    gc.collect()
    before = alive()
    with running() as engine:
        model.module.most = model.module.rows = 0
        job = submit(engine, model, x, call(model, method, **parameters), [1])
        job.future.result(timeout=240)
    assert job.rows > 0.8 * rows, "constant channels share theirs"
    grown = model.module.most - before
    assert 0 < grown < 12 * BATCH * ROW, "a few batches: rows, masks, activations and what is summed up"
    assert rows * ROW / 4 > 12 * BATCH * ROW, "far less than all rows would take"


def test_the_count_would_notice() -> None:
    before = alive()
    kept = torch.zeros(1000, 3, *SIZE)
    assert alive() - before == kept.numel() * 4
