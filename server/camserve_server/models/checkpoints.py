"""Weights files: which state dict of a checkpoint is loaded, and how its keys are fitted to those of the network."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor, nn

from camserve_server.errors import ConfigError

log = structlog.get_logger()

State = Mapping[str, Any]

# Entries of checkpoints that training scripts use for the weights, in the order in which they are looked for.
ENTRIES = ("state_dict", "model_state_dict", "model", "net", "network", "params", "weights")
# Parts of a key that wrappers such as DataParallel, torch.compile or a training module put before the network's key.
PREFIXES = ("module", "model", "net", "network", "backbone", "_orig_mod")
_EMA = re.compile(r"(^|[._])(ema|swa|averaged)([._]|$)", re.IGNORECASE)
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
MOST_LISTED = 10  # keys that a message lists


def load_weights(module: nn.Module, path: Path, key: str | None, where: str) -> None:
    """Load the weights of a file into a network, in place, and log what was loaded.

    Args:
        module: Network.
        path: File with a state dict or a checkpoint that contains one.
        key: Entry of the checkpoint, or first part of its keys, that holds the weights; chosen if None.
        where: Configuration key of the model, for errors.

    Raises:
        ConfigError: The file cannot be read, contains no such state dict, or does not fit the network.
    """
    states = dict(_state_dicts(_read(path, where)))
    if not states:
        raise ConfigError(
            f"{where}.weights: {path} contains no state dict; save one with torch.save(model.state_dict(), FILE) or "
            "safetensors"
        )
    name, first = _choose(states, path, key, where)
    state, steps = states[name], [f"took the entry {name}"] if name else []
    try:
        module.load_state_dict(state)
    except Exception as error:  # modules with a loading function of their own can raise anything
        fitted = _fitted(state, module.state_dict(), first)
        if fitted is None:
            raise ConfigError(_mismatch(state, module, path, where, error)) from error
        state, done = fitted
        steps += done
        try:
            module.load_state_dict(state)
        except Exception as again:
            raise ConfigError(_mismatch(state, module, path, where, again)) from again
    if steps:
        log.info("loaded weights from a checkpoint", model=where.partition(".")[2], file=path.name, steps=steps)


def _read(path: Path, where: str) -> object:
    """Return the contents of a file without running code from it."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        remedy = "save the weights alone: torch.save(model.state_dict(), FILE), or a safetensors file"
        reason = str(error).partition("\n")[0]
        found = _GLOBAL.search(str(error))
        if "TorchScript" in str(error):
            reason = "it is a TorchScript archive, which contains code"
        elif found or "weights_only" in str(error):
            reason = f"it contains the Python object {found[1]}" if found else "it contains Python objects"
            reason += ", and camserve does not unpickle objects because they can run code"
        else:
            reason = f"{type(error).__name__}: {reason}"
        raise ConfigError(f"{where}.weights: {path} cannot be read: {reason}; {remedy}") from error


# ---- the state dict in a checkpoint ----------------------------------------------------------------------------------


def _state_dicts(contents: object, name: str = "", depth: int = 2) -> Iterator[tuple[str, State]]:
    """Yield the state dicts of a checkpoint by the dotted name of their entry; the name of the file itself is empty."""
    if not isinstance(contents, Mapping):
        return
    inner = {
        key: value
        for key, value in contents.items()
        if isinstance(key, str) and isinstance(value, Mapping) and not key.endswith("_extra_state")
    }
    below = [
        found
        for key, value in inner.items()
        if depth
        for found in _state_dicts(value, f"{name}.{key}".removeprefix("."), depth - 1)
    ]
    if below:
        yield from below
    elif any(isinstance(value, Tensor) for value in contents.values()) and all(isinstance(k, str) for k in contents):
        yield name, contents


def _choose(states: Mapping[str, State], path: Path, key: str | None, where: str) -> tuple[str, tuple[str, ...]]:
    """Return the name of the state dict to load, and the first parts of its keys if the configuration names them."""
    names = list(states)
    if key is not None:
        for name in names:
            if name == key or name.startswith(f"{key}."):
                return name, ()
        for name in names:
            if any(each.startswith(f"{key}.") for each in states[name]):
                return name, tuple(key.split("."))
        raise ConfigError(
            f"{where}.weights_key: {path} has no entry {key!r}; expected the name of an entry or the first part of its "
            f"keys; the entries with weights are: {_listed([each or 'the whole file' for each in names])}"
        )
    plain = [name for name in names if not _EMA.search(name)]
    usual = [found for entry in ENTRIES if (found := [name for name in plain if name.split(".")[0] == entry])]
    candidates = usual[0] if usual else plain or names
    if len(candidates) > 1:
        raise ConfigError(
            f"{where}.weights_key: {path} contains several state dicts; set weights_key to one of: {_listed(names)}"
        )
    [name] = candidates
    averaged = {each for each in (*names, *(k.partition(".")[0] for k in states[name])) if _EMA.search(each)} - {name}
    if averaged:
        log.warning(
            "the checkpoint also contains averaged weights, which are not used; set weights_key to load them",
            model=where.partition(".")[2],
            file=path.name,
            averaged=sorted(averaged),
        )
    return name, ()


# ---- keys ------------------------------------------------------------------------------------------------------------


def _fitted(state: State, expected: State, chosen: tuple[str, ...]) -> tuple[State, list[str]] | None:
    """Return the state dict with the keys that the network expects, and what was done; None if no way matches all keys.

    Args:
        state: State dict of the file.
        expected: State dict of the network.
        chosen: First parts of the keys to use, if the configuration names them.
    """
    wrapped = any("_orig_mod." in key for key in state)
    plain = _renamed(state, lambda key: key.replace("_orig_mod.", "")) if wrapped else state
    done = ["removed _orig_mod. from the keys"] if wrapped else []
    if not chosen and _match(plain, expected):
        return plain, done
    for prefix in sorted(_prefixes(plain, PREFIXES, chosen), key=len):
        part = {key: value for key, value in plain.items() if key.startswith(prefix)}
        stripped = _renamed(_with_metadata(part, plain), partial(_strip, prefix))
        if _match(stripped, expected):
            others = [key for key in plain if not key.startswith(prefix)]
            ignored = [f"ignored {len(others)} other keys: {_listed(others)}"] if others else []
            return stripped, [*done, f"removed {prefix} from the keys", *ignored]
    for prefix in sorted(_prefixes(expected, PREFIXES, ()), key=len):
        added = _renamed(plain, partial(_add, prefix))
        if not chosen and _match(added, expected):
            return added, [*done, f"added {prefix} to the keys"]
    return None


def _prefixes(state: State, parts: Collection[str], first: tuple[str, ...]) -> set[str]:
    """Return the prefixes of keys that consist of `first` and then of some of `parts`, such as "model.net."."""
    found = set[str]()
    for key in state:
        pieces = key.split(".")[:-1]
        if tuple(pieces[: len(first)]) != first:
            continue
        for length in range(len(first), len(pieces) + 1):
            if length and all(piece in parts for piece in pieces[len(first) : length]):
                found.add(".".join(pieces[:length]) + ".")
    return found


def _match(state: State, expected: State) -> bool:
    """Return True if the keys are the same, except for counters of batch norm that old files do not contain."""
    missing = expected.keys() - state.keys()
    return not state.keys() - expected.keys() and all(key.endswith("num_batches_tracked") for key in missing)


def _renamed(state: State, rename: Callable[[str], str]) -> State:
    """Return the state dict with other keys. The versions of modules (`_metadata`) are kept under their new names."""
    renamed = OrderedDict((rename(key), value) for key, value in state.items())
    versions = {rename(key): value for key, value in getattr(state, "_metadata", {}).items()}
    if versions:
        renamed._metadata = versions  # type: ignore[attr-defined]
    return renamed


def _with_metadata(part: State, state: State) -> State:
    kept = OrderedDict(part)
    kept._metadata = getattr(state, "_metadata", {})  # type: ignore[attr-defined]
    return kept


def _add(prefix: str, key: str) -> str:
    return f"{prefix}{key}" if key else prefix[:-1]


def _strip(prefix: str, key: str) -> str:
    """Remove a prefix from a key. The prefix without its dot is the name of the network itself."""
    return "" if key == prefix[:-1] else key.removeprefix(prefix)


def _mismatch(state: State, module: nn.Module, path: Path, where: str, error: Exception) -> str:
    """Return the message of weights that do not fit, with at most `MOST_LISTED` keys of each kind."""
    expected = module.state_dict()
    shapes = [
        f"{key} is {list(value.shape)} in the file and {list(expected[key].shape)} in the network"
        for key, value in state.items()
        if isinstance(value, Tensor) and isinstance(expected.get(key), Tensor) and value.shape != expected[key].shape
    ]
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    problems = [
        f"{len(keys)} {what}: {_listed(keys, separator)}"
        for what, keys, separator in (
            ("keys of the network are missing from the file", missing, ", "),
            ("keys of the file are not in the network", unexpected, ", "),
            ("tensors have another shape", shapes, "; "),
        )
        if keys
    ]
    problem = ". ".join(problems) or f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return (
        f"{where}.weights: {path} does not fit the network. {problem}. Correct source or weights; for another number "
        "of classes, set classes"
    )


def _listed(names: Collection[str], separator: str = ", ") -> str:
    shown = separator.join(list(names)[:MOST_LISTED])
    return shown + (f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else "")
