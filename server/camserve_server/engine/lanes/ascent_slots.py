"""Slots of ascents: the variables of one batch and their constants, stacked in tensors that stay where they are.

A variable owns its state. A batch copies the state into a slot, makes the step there, and copies the new state back. A
batch that fails therefore changes no variable, and a variable that leaves needs no clean-up. Constants are copied
only to variables that are new in their slot.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, as that of new tensors


@dataclass(eq=False)
class Variable:
    """A variable that ascends.

    Attributes:
        state: The variable [K], its first and second moment [K], and its number of updates [], a float32.
        constants: The constants of its steps, each without the dimension of the batch.
        objectives: Objectives before each update, scalars on the device.
        ended: True if the variable takes no further step.
    """

    state: tuple[Tensor, Tensor, Tensor, Tensor]
    constants: tuple[Tensor, ...]
    objectives: list[Tensor] = field(default_factory=list)
    ended: bool = False
    _history: list[float] = field(default_factory=list)

    @property
    def signature(self) -> Hashable:
        """The shapes, strides and types of its tensors, in which variables must agree to be stacked."""
        return tuple((each.shape, each.stride(), each.dtype) for each in (self.state[0], *self.constants))

    def history(self) -> list[float]:
        """Return the objectives so far as numbers. On a GPU, this waits for the steps."""
        new = self.objectives[len(self._history) :]
        if new:
            self._history += torch.stack(new).tolist()
        return self._history


@dataclass(frozen=True)
class SlotGroup:
    """Slots that are computed together.

    Attributes:
        u: Variables [n, K].
        constants: Constants of the variables, each [n, …].
        states: The state of each slot, as in `Variable`.
    """

    u: Tensor
    constants: Sequence[Tensor]
    states: Sequence[tuple[Tensor, ...]]


class AscentSlots:
    """Slots for `size` variables.

    Slots without a variable contain the last one that they had. They start with a copy of the first one, so that their
    values are finite.

    Args:
        size: Number of slots.
        like: A variable that will use them.

    Attributes:
        all: All slots.
        single: Each slot alone.
        batches: Number of batches that have run in these slots.
        recordable: False if a step could not be recorded.
        graph: Recording of a step of all slots, if there is one.
        objectives: Objectives [size] that each replay of the graph overwrites.
    """

    def __init__(self, size: int, like: Variable) -> None:
        state = [_stacked(each, size) for each in like.state]
        constants = [_stacked(each, size) for each in like.constants]
        states = [*zip(*(each.unbind() for each in state), strict=True)]
        self.all = SlotGroup(state[0], constants, states)
        self.single = [
            SlotGroup(state[0][i : i + 1], [each[i : i + 1] for each in constants], states[i : i + 1])
            for i in range(size)
        ]
        self.batches = 0
        self.recordable = True
        self.graph: torch.cuda.CUDAGraph | None = None
        self.objectives = torch.empty(0)
        self._constants = [tuple(each[slot] for each in constants) for slot in range(size)]  # there may be none
        self._variables: list[weakref.ref[Variable] | None] = [None] * size
        self._unused = [*range(size)]  # from the slot that has been unused for the longest time

    def load(self, variables: Sequence[Variable]) -> list[int]:
        """Copy variables into slots, and return the slot of each one."""
        at = {each: slot for slot, variable in enumerate(self._variables) if variable and (each := variable())}
        kept = {at[each] for each in variables if each in at}
        free = iter([slot for slot in self._unused if slot not in kept])
        slots = [at[each] if each in at else next(free) for each in variables]
        new = [(slot, each) for slot, each in zip(slots, variables, strict=True) if each not in at]
        used = {*slots}
        self._unused = [*(slot for slot in self._unused if slot not in used), *slots]
        for slot, _ in new:
            self._variables[slot] = None  # until its constants have been copied, which can fail
        _copy([self._constants[slot] for slot, _ in new], [each.constants for _, each in new])
        for slot, each in new:
            self._variables[slot] = weakref.ref(each)
        _copy([self.all.states[slot] for slot in slots], [each.state for each in variables])
        return slots

    def replay(self) -> Tensor:
        """Make the recorded step of all slots, and return their objectives [size]."""
        assert self.graph is not None, "a step has been recorded"
        self.graph.replay()
        return self.objectives.clone()  # the next replay overwrites them

    def store(self, variables: Sequence[Variable], slots: Sequence[int]) -> None:
        """Copy the state of slots back to their variables."""
        _copy([each.state for each in variables], [self.all.states[slot] for slot in slots])


def _stacked(like: Tensor, size: int) -> Tensor:
    """Return `size` copies of a tensor, each with its strides and its alignment, because kernels depend on both."""
    strides = torch.empty_like(like).stride()
    bytes_ = like.numel() * like.element_size()
    distance = -(-bytes_ // ALIGNMENT) * ALIGNMENT // like.element_size()
    stacked = torch.empty_strided((size, *like.shape), (distance, *strides), dtype=like.dtype, device=like.device)
    return stacked.copy_(like.expand_as(stacked))


def _copy(to: Sequence[Sequence[Tensor]], values: Sequence[Sequence[Tensor]]) -> None:
    """Copy tuples of tensors. Tensors at one place of the tuples are copied by one kernel."""
    for targets, sources in zip(zip(*to, strict=True), zip(*values, strict=True), strict=True):
        torch._foreach_copy_(targets, sources)
