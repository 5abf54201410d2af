"""Tensors of simulated GPUs, and recordings of their operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from tests.simulated_gpu import DEVICE

aten = torch.ops.aten
NAN = float("nan")
CPU = torch.device("cpu")

# Operations whose result the host needs, so that it waits for the GPU.
WAITING = {"_local_scalar_dense", "equal", "masked_select", "nonzero", "_unique2", "unique_consecutive", "unique_dim"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


@dataclass
class Recording:
    """Operations of a CUDA graph.

    Attributes:
        calls: Each operation with its arguments and, unless it works in place, the tensors for its result.
        changed: The memory that operations change in place, and what it contained before the recording.
        made: Tensors that operations have made.
        error: The error that has ended the recording.
    """

    calls: list[tuple[Callable[..., Any], Any, Any, Any]] = field(default_factory=list)
    changed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    made: list[Tensor] = field(default_factory=list)
    error: RuntimeError | None = None

    def keep(self, tensor: Tensor) -> None:
        """Remember the memory of a tensor, which an operation is about to change."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.changed:
            memory = torch.empty(0, dtype=torch.uint8).set_(storage)
            self.changed[storage._cdata] = memory, memory.clone()

    def end(self) -> None:
        """Undo what the operations have computed, because a GPU does not run them while it records them."""
        for memory, before in self.changed.values():
            memory.copy_(before)
        for tensor in self.made:
            if tensor.is_floating_point():
                tensor.fill_(NAN)
        if self.error is not None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    @torch.no_grad()
    def replay(self) -> None:
        """Run the operations on the memory that they used during the recording."""
        for function, args, kwargs, results in self.calls:
            for old, new in zip(tree_leaves(results), tree_leaves(function(*args, **kwargs)), strict=False):
                if isinstance(old, Tensor):
                    old.copy_(new)


recordings: dict[int, Recording] = {}  # of the GPUs that record at the moment


def index_of(device: torch.device | None) -> int:
    """Return the number of a GPU: that of the current one if the device has none."""
    return DEVICE.current_device() if device is None or device.index is None else device.index


def wait(gpu: int, what: str) -> None:
    """Let the host wait for a GPU, which ends a recording."""
    if (recording := recordings.get(gpu)) is not None:
        recording.error = RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")
        raise recording.error


class GpuTensor(Tensor):
    """Tensor of a simulated GPU. Its values are in a tensor of the CPU."""

    on_cpu: Tensor
    gpu: int

    @staticmethod
    def __new__(cls, values: Tensor, gpu: int) -> GpuTensor:
        """Return a tensor with these values, without a copy."""
        make: Any = Tensor._make_wrapper_subclass
        tensor: GpuTensor = make(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device("cuda", gpu),
        )
        tensor.on_cpu, tensor.gpu = values, gpu
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(function, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GpuTensor({self.on_cpu!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copy: Any = GpuTensor(self.on_cpu.detach().clone(), self.gpu)
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if is_parameter else copy
        return memo[id(self)]

    def data_ptr(self) -> int:
        return self.on_cpu.data_ptr()

    def is_pinned(self, device: object = None) -> bool:
        return False

    def tolist(self) -> Any:
        return self.cpu().tolist()


# ---- operations ------------------------------------------------------------------------------------------------------


def run(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operation of torch that has a tensor of a GPU among its arguments.

    Raises:
        RuntimeError: The tensors are on several devices, or the host would wait for a GPU that records.
    """
    name = function._schema.name.removeprefix("aten::")
    if name == "copy_":
        return _copy(args[0], args[1], waits=not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])))
    if name == "_to_copy":
        return _to_copy(args[0], **kwargs)
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    gpu = next(each.gpu for each in tensors if isinstance(each, GpuTensor))
    _check_devices(name, args, tensors, gpu)
    if name in WAITING:
        wait(gpu, name)
    device = kwargs.get("device")
    kwargs = {key: value for key, value in kwargs.items() if key not in {"device", "pin_memory"}}
    own_args, own_kwargs = tree_map(_values, (args, kwargs))
    if device is not None:
        own_kwargs["device"] = CPU
        if torch.device(device).type == "cpu":
            return function(*own_args, **own_kwargs)
        gpu = index_of(torch.device(device))
    result = _run(function, own_args, own_kwargs, recordings.get(gpu))
    wrapped = tree_map(lambda each: GpuTensor(each, gpu) if isinstance(each, Tensor) else each, result)
    if not function._schema.returns:  # such as the fused step of Adam
        return wrapped
    alias: Any = return_and_correct_aliasing
    return alias(function, args, kwargs, wrapped)


def _check_devices(name: str, args: Sequence[Any], tensors: Sequence[Tensor], gpu: int) -> None:
    on_host = [each for each in tensors if not isinstance(each, GpuTensor) and each.dim()]
    if name in INDEXING:
        if any(each.dtype in (torch.bool, torch.uint8) for each in tree_leaves(args[1]) if isinstance(each, Tensor)):
            wait(gpu, f"{name} with a mask")
        if on_host and isinstance(args[0], GpuTensor):
            wait(gpu, f"{name} with indices of the CPU")
            on_host = []
    others = {each.gpu for each in tensors if isinstance(each, GpuTensor)} - {gpu}
    if on_host or others:
        other = "cpu" if on_host else f"cuda:{others.pop()}"
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:{gpu} and {other}! (in {name})"
        )


def _run(function: Any, args: Any, kwargs: dict[str, Any], recording: Recording | None) -> Any:
    """Run an operation on the values, and record it."""
    if recording is None:
        return function(*args, **kwargs)
    schema = function._schema
    written = [each.alias_info is not None and each.alias_info.is_write for each in schema.arguments]
    is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in schema.returns)
    for i, argument in enumerate(schema.arguments):
        if written[i]:
            for each in tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name)):
                if isinstance(each, Tensor):
                    recording.keep(each)
    result = function(*args, **kwargs)
    if not is_view:
        recording.calls.append((function, args, kwargs, None if any(written) else result))
        if not any(written):
            recording.made += [each for each in tree_leaves(result) if isinstance(each, Tensor)]
    return result


def _values(each: Any) -> Any:
    return each.on_cpu if isinstance(each, GpuTensor) else each


def _copy(target: Tensor, source: Tensor, waits: bool) -> Tensor:
    if isinstance(source, GpuTensor) and not isinstance(target, GpuTensor) and waits:
        wait(source.gpu, "copy to the CPU")
    if isinstance(target, GpuTensor) and not isinstance(source, GpuTensor):
        wait(target.gpu, "copy of memory that is not pinned")
    recording = recordings.get(target.gpu) if isinstance(target, GpuTensor) else None
    if recording is None:
        _values(target).copy_(_values(source))
    else:
        _run(aten.copy_.default, (_values(target), _values(source)), {}, recording)
    return target


def _to_copy(source: Tensor, **options: Any) -> Tensor:
    device = torch.device(options.pop("device", None) or source.device)
    for each in ("non_blocking", "pin_memory"):
        options.pop(each, None)
    if isinstance(source, GpuTensor) and device.type == "cpu":
        wait(source.gpu, "copy to the CPU")
        return aten._to_copy.default(source.on_cpu, **options)  # type: ignore[no-any-return]
    gpu = index_of(device)
    return GpuTensor(_run(aten._to_copy.default, (_values(source),), options, recordings.get(gpu)), gpu)


# ---- new tensors -----------------------------------------------------------------------------------------------------


def _new(values: Tensor, device: torch.device | None) -> GpuTensor:
    """Return a tensor without defined values."""
    gpu = index_of(device)
    if values.is_floating_point():
        values.fill_(NAN)
    if (recording := recordings.get(gpu)) is not None:
        recording.made.append(values)
    return GpuTensor(values, gpu)


def empty(size: Any, *, dtype: Any = None, device: Any = None, memory_format: Any = None, **_: object) -> GpuTensor:
    values = torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format)
    return _new(values, device)


def empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: object) -> GpuTensor:
    return _new(torch.empty_strided(size, stride, dtype=dtype), device)


def eye(n: int, m: int | None = None, *, dtype: Any = None, device: Any = None, **_: object) -> GpuTensor:
    return GpuTensor(torch.eye(n, n if m is None else m, dtype=dtype), index_of(device))


def install() -> Any:
    """Let torch make these tensors on the device "cuda", until the returned object is deleted."""
    make: Any = torch.library.Library
    library = make("aten", "IMPL", "CUDA")
    library.impl("empty.memory_format", empty)
    library.impl("empty_strided", empty_strided)
    library.impl("eye", eye)
    library.impl("eye.m", eye)
    library.impl("copy_", lambda target, source, non_blocking=False: _copy(target, source, not non_blocking))
    return library
