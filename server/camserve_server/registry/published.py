"""Published properties of a function: sections of its docstring, and parameters of its signature."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from camserve_server.registry.entries import REQUEST_KEYWORDS, Parameter, Range, Value

_TYPES: dict[type, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}


def _sections(plan: Callable[..., object]) -> dict[str, str]:
    """Return the sections of a Google-style docstring by name. The text before the first section has the name ""."""
    sections = {"": ""}
    section = ""
    for line in (inspect.getdoc(plan) or "").splitlines():
        if re.fullmatch(r"[A-Z]\w+:", line):
            section = line[:-1]
            sections[section] = ""
        else:
            sections[section] += line.removeprefix("    ") + "\n"
    return sections


def texts(plan: Callable[..., object]) -> tuple[str, str, str]:
    """Return the published sections of a docstring.

    Args:
        plan: Function with a docstring.

    Returns:
        The summary, the equations and the advice.
    """
    sections = _sections(plan)
    return (
        sections[""].partition("\n")[0],
        sections.get("Equations", "").rstrip(),
        sections.get("Advice", "").strip(),
    )


def _descriptions(plan: Callable[..., object]) -> dict[str, str]:
    """Return the descriptions of the arguments in the section `Args:` of a docstring."""
    descriptions: dict[str, str] = {}
    name = ""
    for line in _sections(plan).get("Args", "").splitlines():
        if entry := re.match(r"\*{0,2}(\w+)(?: \(.*?\))?: (.*)", line):
            name, text = entry.groups()
            descriptions[name] = text
        elif name:
            descriptions[name] = f"{descriptions[name]} {line.strip()}".strip()
    return descriptions


def parameters(plan: Callable[..., object]) -> tuple[Parameter, ...]:
    """Return the parameters of a method or metric: its keyword-only arguments without those that the request supplies.

    Args:
        plan: Function with annotated arguments.

    Returns:
        The parameters, in the order of the signature.
    """
    signature = inspect.signature(plan, eval_str=True)
    descriptions = _descriptions(plan)
    return tuple(
        _parameter(p.name, p.annotation, p.default, descriptions.get(p.name, ""))
        for p in signature.parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in REQUEST_KEYWORDS
    )


def _parameter(name: str, hint: Any, default: Value, description: str) -> Parameter:
    extras: Sequence[object] = ()
    if get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    return Parameter(
        name,
        _TYPES[type(default)],
        default,
        description=next((e for e in extras if isinstance(e, str)), description),
        range=next((e for e in extras if isinstance(e, Range)), None),
        choices=choices,
    )
