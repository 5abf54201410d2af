"""Selection of the channels that methods with one mask per channel have to run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from camserve_server.plan import MapWarning, Plan, Report, Targets

# Largest difference of the weights of a class, relative to the largest, that counts as none.
EQUAL = 1e-3
# Least sum of the channels, relative to the sum of their absolute values. Weights that count as equal then change the
# map by at most EQUAL / NOT_CANCELLED, 1 %, of its maximum.
NOT_CANCELLED = 0.1


@dataclass(frozen=True, eq=False)
class SelectedChannels:
    """Channels of a layer that need rows, and the mapping of their scores to all K channels.

    All constant channels give the same mask, so one of them represents all. It comes first.

    Attributes:
        indices: Indices [n] of the selected channels, the strongest (Σ|A|) first. A method that is cut short has then
            run the channels with the most weight.
        strength: Strength Σ|A| [K] of all channels, float64.
        constant: True [K] for the constant channels that one channel represents.
    """

    indices: Tensor
    strength: Tensor
    constant: Tensor

    def __len__(self) -> int:
        """Return the number n of selected channels."""
        return len(self.indices)

    def to_all_channels(self, values: Tensor, missing: float = 0.0) -> Tensor:
        """Copy the values of selected channels to all channels that they represent.

        Args:
            values: Values [m, T] of the first m selected channels, m ≤ n.
            missing: Value of the channels that none of them represents.

        Returns:
            Values [K, T].
        """
        result = values.new_full((len(self.strength), values.shape[1]), missing)
        indices = self.indices[: len(values)]
        if len(indices) and self.constant[indices[0]]:
            result[self.constant] = values[0]
        result[indices] = values
        return result

    def merge(self, A: Tensor) -> Tensor:
        """Add up the activations that each selected channel represents.

        Args:
            A: Activations [K, h, w].

        Returns:
            Activations [n, h, w].
        """
        merged = A[self.indices]
        if len(self.indices) and self.constant[self.indices[0]]:
            merged[0] = A[self.constant].sum(dim=0)
        return merged

    def share(self, done: int) -> float:
        """Return the share of Σ|A| that the first selected channels represent.

        Args:
            done: Number of selected channels that were run.

        Returns:
            The share, in [0, 1]. It is 1 if all activations are zero, and the share of the channels if some activations
            are not finite.
        """
        ones = torch.ones(done, 1, dtype=self.strength.dtype, device=self.strength.device)
        return share_of(self.to_all_channels(ones)[:, 0], self.strength)


def share_of(done: Tensor, strength: Tensor) -> float:
    """Return the share of the total strength that some channels have.

    Args:
        done: 1 [K] for these channels, 0 for the others.
        strength: Strength [K] of all channels, ≥ 0.

    Returns:
        The share, in [0, 1]. It is 1 if the total is zero, and the share of the channels if the total is not finite.
    """
    total = strength.sum()
    if not total.isfinite():
        return float(done.mean())
    return float((done * strength).sum() / total) if total > 0 else 1.0


def select_channels(A: Tensor, *, include_zero: bool) -> SelectedChannels:
    """Select the channels of a layer that need rows.

    Args:
        A: Activations [K, h, w].
        include_zero: If True, channels that are zero everywhere are represented, too. If False, they need no row.

    Returns:
        The selected channels.
    """
    flat = A.flatten(1)
    strength = flat.abs().sum(dim=1, dtype=torch.float64)
    constant = flat.amin(dim=1) == flat.amax(dim=1)
    order = strength.argsort(descending=True, stable=True)
    varying = order[~constant[order]]  # Includes channels that are not finite: the map must show them.
    if not include_zero:
        constant &= strength > 0
    return SelectedChannels(torch.cat([constant.nonzero()[:1, 0], varying]), strength, constant)


def have_equal_weights(w: Tensor, A: Tensor) -> Tensor:
    """Return True [T] for the classes whose map is nearly the sum of the channels, whatever the class is.

    Args:
        w: Weights [n, T] of different channels, ≥ 0.
        A: Activations [n, h, w] of the same channels.
    """
    if len(w) < 2:
        return torch.zeros(w.shape[1], dtype=torch.bool, device=w.device)
    low, high = w.amin(dim=0), w.amax(dim=0)
    remains = A.sum(dim=0).abs().amax() >= NOT_CANCELLED * A.abs().sum(dim=0).amax()
    return (high > 0) & (high - low <= EQUAL * high) & remains


def report_equal_weights(c: Targets, equal: Tensor) -> Plan[None]:
    """Report the classes that give all channels nearly the same weight.

    Args:
        c: T target classes.
        equal: True [T] for these classes.

    Yields:
        A report with a warning for each of them.
    """
    for index, is_equal in zip(c.index, equal.tolist(), strict=True):
        if is_equal:
            yield from Report(
                MapWarning(
                    f"degenerate: the map of class {index} is the sum of all channels that have a weight and does "
                    "not depend on the class, because their weights are nearly the same"
                )
            )
