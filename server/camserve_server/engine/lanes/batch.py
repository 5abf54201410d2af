"""The input of a batch, and the place of each query's rows in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from camserve_server.engine.lanes.lane_query import BatchSlice
from camserve_server.errors import Unservable
from camserve_server.models.model import Model


def padded_batch(model: Model, rows: list[Tensor], size: int) -> Tensor:
    """Concatenate rows and padding rows into the input of one batch.

    Args:
        model: Model that the batch is for; it sets the device and the data type.
        rows: Rows of each query, [n, C, H, W].
        size: Number of rows of the batch, at least the number of `rows`.

    Returns:
        The batch [size, C, H, W] in the memory format of the model. The padding rows are zeros and come last.
    """
    if any(each.requires_grad for each in rows):  # an ascent differentiates its rows
        missing = size - sum(map(len, rows))
        parts = [*rows, rows[0].new_zeros(missing, *rows[0].shape[1:])] if missing else rows
        together = torch.cat(parts) if len(parts) > 1 else parts[0]
        return together.to(model.device, model.compute_dtype, memory_format=model.memory_format)
    batch = torch.empty(  # one pass over the rows, without an intermediate batch in another memory format
        (size, *rows[0].shape[1:]),
        dtype=model.compute_dtype,
        device=model.device,
        memory_format=model.memory_format,
    )
    start = 0
    for each in rows:
        batch[start : start + len(each)] = each
        start += len(each)
    batch[start:] = 0
    return batch


def batch_spans(slices: Sequence[BatchSlice]) -> list[tuple[int, int]]:
    """Return the place (start, stop) of each slice's rows in the batch."""
    spans, at = [], 0
    for each in slices:
        spans.append((at, at + each.stop - each.start))
        at = spans[-1][1]
    return spans


def check_differentiable(model: Model, differentiable: bool) -> None:
    """Raise Unservable if the logits do not depend differentiably on the layer or input of the query."""
    if not differentiable:
        raise Unservable(
            f"no gradient of the logits of {model.name} reaches the requested layer: the network computes it under "
            "no_grad or does not use it; name another layer or choose a method without gradients"
        )


def check_replaceable(model: Model, layers: Sequence[str]) -> None:
    """Raise Unservable if the network does not go on with a changed output of one of the layers.

    Args:
        model: Model of the query.
        layers: Names of layers, or "<input>".
    """
    for name in layers:
        if name in model.spatial and model.spatial[name].read_only:
            raise Unservable(
                f"{name} of {model.name} is an output of a remote server, which can be read but not changed or "
                "differentiated; choose a method that needs only scores and activations",
                field="method.name",
            )
