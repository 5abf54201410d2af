"""Memory of long requests. Rows are made batch by batch, so the batch size bounds the bytes that are alive at once."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.nets import tiny_cnn
from tests.support import TIMEOUT_S, as_model, call, noise, running, submit

SIZE = (64, 64)
BATCH = 8
ROW_BYTES = 4 * 3 * 64 * 64  # one input in float32

# Requests of hundreds to thousands of rows. All rows at once would take as many times ROW_BYTES.
LONG: list[tuple[str, dict[str, Any], int]] = [
    ("rise", {"masks": 1500}, 1500),
    ("ss-cam", {"samples": 40}, 40 * 18),
    ("is-cam", {"steps": 40}, 40 * 18),
    ("smooth-grad", {"samples": 500}, 500),
    ("gradient-shap", {"samples": 500}, 500),
    ("integrated-gradients", {"steps": 500}, 500),
    ("occlusion", {"stride": 1, "window": 30}, 35 * 35),
]


class MemoryProbe(nn.Module):
    """Network that measures the bytes of all live tensors when a batch arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_cnn()
        self.max_bytes = 0
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        if self.rows // len(x) % 37 == 1:  # gc.get_objects() is slow, so not every batch is measured
            self.max_bytes = max(self.max_bytes, live_bytes())
        logits: Tensor = self.net(x)
        return logits


def live_bytes() -> int:
    """Return the bytes of all live tensors; a storage that several tensors share counts once."""
    storages = {}
    for each in gc.get_objects():
        if type(each) in (Tensor, nn.Parameter):  # not the fake tensors of a compiler, which have no memory
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.slow
@pytest.mark.parametrize(("method", "parameters", "rows"), LONG, ids=[method for method, *_ in LONG])
def test_memory_is_bounded_by_the_batch(method: str, parameters: dict[str, Any], rows: int) -> None:
    model = as_model(MemoryProbe(), SIZE, batch_size=BATCH)
    assert isinstance(model.module, MemoryProbe)
    x = noise(3, *SIZE)
    gc.collect()
    before = live_bytes()
    with running() as engine:
        model.module.max_bytes = model.module.rows = 0
        job = submit(engine, model, x, call(model, method, **parameters), [1])
        job.future.result(TIMEOUT_S)
    assert job.rows > 0.8 * rows, "constant channels share their rows"
    grown = model.module.max_bytes - before
    assert 0 < grown < 12 * BATCH * ROW_BYTES, "the rows, masks, activations and sums of a few batches"
    assert rows * ROW_BYTES / 4 > 12 * BATCH * ROW_BYTES, "the bound must be far below the size of all rows"


def test_live_bytes_counts_a_new_tensor() -> None:
    gc.collect()  # otherwise, garbage of other tests could go in between
    before = live_bytes()
    kept = torch.zeros(1000, 3, *SIZE)
    assert live_bytes() - before == kept.numel() * 4
