"""Lanes of the kind "ascend": iterations of Adam through the network, for several variables at once.

On a GPU, a step of a whole batch (the rows, the forward and the backward pass, and Adam) is one CUDA graph, because the
launches of its kernels one by one would take longer than their run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import structlog
import torch
from torch import Tensor
from torch.optim.adam import adam

from camserve_server.engine.lanes.ascent_slots import AscentSlots, SlotGroup, Variable
from camserve_server.engine.lanes.batch import check_differentiable, padded_batch
from camserve_server.engine.lanes.cuda_graph import record
from camserve_server.engine.lanes.lane_query import BatchSlice, Lane
from camserve_server.models.model import Model
from camserve_server.plan import Ascend, Ascent

log = structlog.get_logger()

# Each batch size of a lane has slots, and on a GPU a graph, of its own. Callers choose layers, options and batch sizes,
# so only the slots that were used last are kept.
KEPT_SLOTS = 4


class AscendQuery:
    """Ascent of T variables, which take their steps together. Row i·T + t is step i of variable t.

    Attributes:
        layers: Names of the layers to hook: none.
        query: The query of the plan.
        min_rows: Number of rows after which the query may be answered early; None if it needs all of them.
        rows: Number of rows in all: steps × T.
        max_per_batch: Largest number of rows that one batch may contain: T, because a step needs the one before it.
        lane_key: Properties that queries in one batch share: the step, the rate, the type of the constants, and
            the shapes of their tensors.
    """

    layers: tuple[str, ...] = ()

    def __init__(self, query: Ascend[Any], model: Model) -> None:
        self.query = query
        self.min_rows = query.min_rows
        self.max_per_batch = len(query.u0)
        self.rows = query.steps * self.max_per_batch
        self._variables = [_variable(query, t) for t in range(self.max_per_batch)]
        self.lane_key = (query.step, query.rate, type(query.constants), self._variables[0].signature)

    def variable(self, row: int) -> Variable:
        """Return the variable whose step the row is."""
        return self._variables[row % self.max_per_batch]

    def is_step_done(self, row: int) -> bool:
        """Return True if the row needs no update.

        Either its variable has ended, or the update has been made and the batch is run again.
        """
        variable = self.variable(row)
        return variable.ended or len(variable.objectives) > row // self.max_per_batch

    def is_stopped(self, row: int, objective: Tensor) -> bool:
        """Return True if the query's `stop` callback ends the ascent of the row's variable at this objective."""
        stop = self.query.stop
        if stop is None or row // self.max_per_batch % self.query.stop_period:
            return False
        return stop([*self.variable(row).history(), float(objective)])

    def record_step(self, row: int, objective: Tensor, stopped: bool) -> None:
        """Record that the step of the row is over; `stopped` ends the ascent of its variable."""
        variable = self.variable(row)
        variable.objectives.append(objective)
        variable.ended = stopped or len(variable.objectives) == self.query.steps

    def is_complete(self) -> bool:
        """Return True if the ascent of every variable has ended."""
        return all(variable.ended for variable in self._variables)

    def answer(self) -> Ascent:
        """Return the variables [T, K], their objectives before each update, and which ascents have ended."""
        history = tuple(tuple(variable.history()) for variable in self._variables)
        u = torch.stack([variable.state[0] for variable in self._variables])
        return Ascent(u, history, tuple(variable.ended for variable in self._variables))


def _variable(query: Ascend[Any], t: int) -> Variable:
    u = query.u0[t].detach().clone()
    updates = torch.zeros((), dtype=torch.float32, device=u.device)
    return Variable((u, torch.zeros_like(u), torch.zeros_like(u), updates), tuple(each[t] for each in query.constants))


class AscentLanes:
    """The slots and graphs that the lanes of the kind "ascend" of a model keep from batch to batch.

    Attributes:
        recordable: False once a step of the network could not be recorded as a CUDA graph.
    """

    def __init__(self) -> None:
        self.recordable = True
        self._slots: dict[Hashable, AscentSlots] = {}  # in the order of their last use

    def slots(self, lane: Lane, size: int, like: Variable) -> AscentSlots:
        """Return the slots of batches of `size` rows of a lane, new ones for variables like this one if necessary."""
        key = lane, size
        slots = self._slots.pop(key, None)
        if slots is None:
            while len(self._slots) >= KEPT_SLOTS:
                self._slots.pop(next(iter(self._slots)))
            slots = AscentSlots(size, like)
        self._slots[key] = slots
        return slots

    def forget(self) -> None:
        """Free the memory of all slots and graphs. Variables lose nothing."""
        self._slots.clear()

    def should_record(self, slots: AscentSlots) -> bool:
        """Return True if a step of the slots should be recorded: after a first step, which shows that it can run."""
        return slots.graph is None and slots.batches > 0 and slots.recordable and self.recordable

    def record(self, model: Model, slots: AscentSlots, step: Callable[[], Tensor]) -> None:
        """Record a step of the slots as a CUDA graph. If this fails, steps run kernel by kernel."""
        # Graphs do not run at the same time, so they can share the memory of their temporary tensors.
        pool = next((each.graph.pool() for each in self._slots.values() if each.graph is not None), None)
        try:
            slots.graph, slots.objectives = record(step, model.device, pool)
        except Exception as error:  # a network may contain code that cannot be recorded
            slots.recordable = False
            self.recordable &= isinstance(error, torch.OutOfMemoryError)  # more may be free later
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            log.warning("the steps of an ascent are not recorded as a CUDA graph", model=model.name, reason=reason)


def forget_slots(model: Model) -> None:
    """Free the memory of all slots and graphs of ascents with a model."""
    if isinstance(model.ascents, AscentLanes):
        model.ascents.forget()


def computes_together(model: Model) -> bool:
    """Return True if the masks of all slots are computed together, False if one by one.

    On a CPU, the number of slots would change the bits: MKL multiplies a batch of matrices in another way than one.
    """
    return model.device.type != "cpu"


def run_ascend(model: Model, lane: Lane, slices: Sequence[BatchSlice], size: int) -> None:
    """Run one batch of a lane of the kind "ascend": a forward pass, a backward pass and an update of Adam for each row.

    Args:
        model: Network to run.
        lane: Lane of all the slices.
        slices: Rows of one or more queries.
        size: Number of rows of the batch; padding rows fill it up.

    Raises:
        Unservable: No gradient of the logits reaches the input.
    """
    rows: list[tuple[AscendQuery, int]] = []
    for each in slices:
        assert isinstance(each.query, AscendQuery)
        rows += [(each.query, row) for row in range(each.start, each.stop)]
    if not isinstance(model.ascents, AscentLanes):
        model.ascents = AscentLanes()
    variables = [query.variable(row) for query, row in rows]
    slots = model.ascents.slots(lane, size, variables[0])
    at = slots.load(variables)
    together = computes_together(model)
    groups = [slots.all] if together else [slots.single[slot] for slot in at]
    step = partial(_make_step, model, rows[0][0].query, groups, size)
    if together and size == lane.size and model.ascents.should_record(slots):
        model.ascents.record(model, slots, step)
        slots.load(variables)  # the recording has made steps
    objectives = slots.replay() if slots.graph else step()
    slots.batches += 1
    by_row = objectives.unbind()
    if together:
        by_row = tuple(by_row[slot] for slot in at)
    due = [
        (query, row, slot, objective)
        for (query, row), slot, objective in zip(rows, at, by_row, strict=True)
        if not query.is_step_done(row)
    ]
    stopped = [query.is_stopped(row, objective) for query, row, _, objective in due]
    # No query has changed up to here: a batch that fails before this line is run again from the same state.
    moving = [each for each, stops in zip(due, stopped, strict=True) if not stops]
    slots.store([query.variable(row) for query, row, _, _ in moving], [slot for _, _, slot, _ in moving])
    for (query, row, _, objective), stops in zip(due, stopped, strict=True):
        query.record_step(row, objective, stops)


def _make_step(model: Model, query: Ascend[Any], groups: Sequence[SlotGroup], size: int) -> Tensor:
    """Make a step of Adam in slots, in place.

    Args:
        model: Network to run.
        query: One of the queries of the lane.
        groups: The slots, in the order of their rows.
        size: Number of rows of the batch.

    Returns:
        The objectives of the rows before the step.
    """
    kind = type(query.constants)
    pack = getattr(kind, "_make", kind)  # a named tuple cannot be called with a list
    with torch.enable_grad():
        leaves = [group.u.detach().requires_grad_() for group in groups]
        constants = [pack(group.constants) for group in groups]
        rows = [query.step.rows(u, of) for u, of in zip(leaves, constants, strict=True)]
        logits = model.module(padded_batch(model, rows, size)).to(model.dtype)
        check_differentiable(model, logits.requires_grad)
        counts = [len(each) for each in rows]
        if size > sum(counts):
            counts.append(size - sum(counts))  # padding rows
        ys = logits.split_with_sizes(counts)[: len(rows)]
        objectives = [query.step.objectives(y, of) for y, of in zip(ys, constants, strict=True)]
        gradients = torch.autograd.grad(objectives, leaves, [torch.ones_like(each) for each in objectives])
    adam_ascent_step(
        query.rate,
        [
            (gradient, *state)
            for group, gradients_of_group in zip(groups, gradients, strict=True)
            for gradient, state in zip(gradients_of_group.unbind(), group.states, strict=True)
        ],
    )
    return torch.cat([each.detach() for each in objectives]) if len(objectives) > 1 else objectives[0].detach()


def adam_ascent_step(rate: float, variables: Sequence[Sequence[Tensor]]) -> None:
    """Make one step of Adam upwards, in place, in one kernel for all variables.

    The update is algorithm 1 of Kingma and Ba, 2015 (arXiv:1412.6980), with β₁ = 0.9, β₂ = 0.999 and ε = 1e-8.

    Args:
        rate: Learning rate.
        variables: For each variable its gradient, value, first moment and second moment, all [K], and its number of
            updates so far, a float32 scalar.
    """
    gradients, us, ms, vs, steps = ([*values] for values in zip(*variables, strict=True))
    adam(
        us,
        gradients,
        ms,
        vs,
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=0.9,
        beta2=0.999,
        lr=rate,
        weight_decay=0.0,
        eps=1e-8,
        maximize=True,
    )
