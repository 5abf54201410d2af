"""Rows are made in slices, as batches have room for them: the slice must not show in the bits."""

from __future__ import annotations

import pytest
import torch

from camserve_server.rows import resize
from tests.support import noise


@pytest.mark.parametrize(
    "sides", [((18, 14), (37, 29)), ((9, 7), (37, 29)), ((7, 7), (224, 224)), ((28, 28), (56, 56))]
)
def test_a_map_is_resized_the_same_whatever_comes_with_it(sides: tuple[tuple[int, int], tuple[int, int]]) -> None:
    small, large = sides
    A = noise(16, *small)
    alone = torch.stack([resize(A_k, large) for A_k in A])
    for n in range(1, 17):
        for start in range(0, 17 - n):
            assert torch.equal(resize(A[start : start + n], large), alone[start : start + n])
    assert torch.equal(resize(A.view(4, 4, *small), large), alone.view(4, 4, *large))
