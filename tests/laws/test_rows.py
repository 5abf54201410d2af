"""Laws for rows: batches make rows in slices, and a slice must not change the bits."""

from __future__ import annotations

import pytest
import torch

from camserve_server.rows import resize
from tests.support import noise


@pytest.mark.parametrize(
    "sides", [((18, 14), (37, 29)), ((9, 7), (37, 29)), ((7, 7), (224, 224)), ((28, 28), (56, 56))]
)
def test_resized_map_does_not_depend_on_other_maps(sides: tuple[tuple[int, int], tuple[int, int]]) -> None:
    small, large = sides
    A = noise(16, *small)
    alone = torch.stack([resize(A_k, large) for A_k in A])
    for n in range(1, 17):
        for start in range(0, 17 - n):
            assert torch.equal(resize(A[start : start + n], large), alone[start : start + n])
    assert torch.equal(resize(A.view(4, 4, *small), large), alone.view(4, 4, *large))
