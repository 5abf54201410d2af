"""Networks from Python factories: their import, a copy of the network without wrappers, and changes of their code."""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import sys
import sysconfig
import types
import weakref
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from camserve_server.config import ModelConfig
from camserve_server.errors import ConfigError, describe

# Files that the code of each factory consists of, with their SHA-256 when the factory was first used.
_imported: dict[str, dict[Path, str]] = {}
# Networks that could not be copied. Each may be used once.
_used: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Scripted(nn.Module):
    """Network of TorchScript in a module that runs hooks."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> Any:
        """Run the network."""
        return self.net(x)


def check_module(name: str, where: str) -> None:
    """Check that the module of a factory exists. Raises ConfigError."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise ConfigError(f"{where}.source: no module {name}; expected python:package.module:factory on PYTHONPATH")


def call_factory(path: str, where: str) -> nn.Module:
    """Call a factory and return a copy of its network.

    The copy is independent of later calls, because a factory may return the same object each time. It contains the
    modules inside wrappers of torch.compile, because a compiled module does not run the hooks that read layers.

    Args:
        path: Factory as "package.module:factory".
        where: Configuration key of the model, for errors.

    Raises:
        ConfigError: The factory does not exist or returns no network, or a network that can be used once only.
    """
    module_name, _, factory_name = path.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}.source: {error}; expected python:package.module:factory on PYTHONPATH") from error
    files = _imported.setdefault(module_name, {})
    for file in _code_files(module_name):
        files.setdefault(file, _sha256(file))
    made = factory()
    if "torch.export" in sys.modules and isinstance(made, torch.export.ExportedProgram):
        made = made.module()
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{where}.source: python:{path} returned a {type(made).__name__}; expected a torch.nn.Module")
    return _copied(made, path, where)


def check_code(config: ModelConfig) -> None:
    """Check that the code of a model's factory is the code that this process runs.

    Python imports a module once, so a load after a change of its file would silently use the old code.

    Args:
        config: Configuration of the model.

    Raises:
        ConfigError: A file has changed since its import.
    """
    kind, _, path = config.source.partition(":")
    if kind != "python":
        return
    files = _imported.get(path.partition(":")[0], {})
    changed = [str(file) for file, digest in files.items() if _sha256(file) != digest]
    if changed:
        raise ConfigError(
            f"models.{config.name}.source: {', '.join(changed[:3])} changed after this server imported it, and Python "
            "does not import it again; restart the server to use the new code"
        )


def code_digest(config: ModelConfig) -> str:
    """Return a SHA-256 of the code of a network that has been loaded, or an empty string if camserve contains it.

    That is the code of a factory as it was imported, or the file of a source that describes the network itself.

    Args:
        config: Configuration of the model.
    """
    kind, _, path = config.source.partition(":")
    if kind == "python":
        files = _imported.get(path.partition(":")[0], {})
        return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
    return _sha256(config.source_file) if config.source_file else ""


# ---- copies ----------------------------------------------------------------------------------------------------------


def _copied(made: nn.Module, path: str, where: str) -> nn.Module:
    try:
        module = _deep_copy(made)
    except Exception as error:  # an attribute such as a lock or a file cannot be copied
        if made in _used:
            raise ConfigError(
                f"{where}.source: python:{path} returns the same network each time, and the network cannot be copied "
                f"({describe(error)}); create a new network in each call"
            ) from error
        _used.add(made)
        module = made
    for each in module.modules():
        _use_plain_forward(each)
    return Scripted(module) if isinstance(module, torch.jit.ScriptModule) else module


@torch.no_grad()  # a copy of TorchScript with gradients would be a function of the original
def _deep_copy(made: nn.Module) -> nn.Module:
    """Return a deep copy in which the module inside each wrapper of torch.compile takes the place of the wrapper."""
    memo: dict[int, Any] = {}
    for each in made.modules():
        for value in vars(each).values():
            # Only leaves can be copied; torch.nn.utils.weight_norm keeps the product of its parameters, for example.
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    wrappers = [each for each in made.modules() if type(each).__name__ == "OptimizedModule"]
    for wrapper in reversed(wrappers):  # inner wrappers come last
        memo[id(wrapper)] = copy.deepcopy(wrapper._orig_mod, memo)
    copied: nn.Module = copy.deepcopy(made, memo)
    return copied


def _use_plain_forward(module: nn.Module) -> None:
    """Undo `module.compile()`, and a compiled `forward` of the class or the object, in place."""
    if module.__dict__.get("_compiled_call_impl") is not None:
        module._compiled_call_impl = None
    forward = vars(module).get("forward", getattr(type(module), "forward", None))
    plain = getattr(forward, "_torchdynamo_orig_callable", None)
    # torch.compile puts a function of its own around methods of torch's modules.
    if isinstance(plain, types.FunctionType) and plain.__globals__["__name__"].startswith("torch._dynamo."):
        plain = plain.__wrapped__  # type: ignore[attr-defined]
    if plain is not None:
        module.forward = types.MethodType(getattr(plain, "__func__", plain), module)


# ---- code ------------------------------------------------------------------------------------------------------------


def _code_files(name: str) -> Iterator[Path]:
    """Yield the Python files of a module, of its package, and of other modules that they refer to.

    Files of the standard library and of installed packages are left out, unless the module belongs to the package.
    """
    top = name.partition(".")[0]
    todo = [each for each in sys.modules if each == name or each.startswith(f"{top}.")]
    seen = set(todo)
    while todo:
        module = sys.modules.get(todo.pop())
        file = getattr(module, "__file__", None)
        if module is None or file is None or not file.endswith(".py"):
            continue
        if module.__name__.partition(".")[0] != top and _is_installed(file):
            continue
        yield Path(file)
        for value in list(vars(module).values()):
            if isinstance(value, types.ModuleType):
                other = value.__name__
            elif isinstance(value, (type, types.FunctionType)):
                other = value.__module__
            else:
                continue
            if other not in seen:
                seen.add(other)
                todo.append(other)


def _is_installed(file: str) -> bool:
    return any(Path(file).is_relative_to(folder) for folder in _installed_folders())


@cache  # sysconfig computes the paths anew in each call
def _installed_folders() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    return (*(Path(paths[kind]) for kind in kinds), Path(__file__).parents[1])


def _sha256(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""
