"""Docstrings of the public names that the reference pages of the documentation show."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import griffe
import pytest

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "reference"
MODULES = (
    "camserve",
    "camserve.aio",
    "camserve_dicom",
    "camserve_ray.bulk",
    "camserve_server.registry",
    "camserve_server.plan",
    "camserve_server.rows",
    "camserve_server.maps.boxes",
    "camserve_server.maps.channels",
    "camserve_server.maps.concentration",
    "camserve_server.maps.similarity",
)
# The protocol `camserve_server.plan.Rows` describes this method for all implementations.
PROTOCOL = {"camserve_server.rows": "make"}
START = re.compile(r"(What|Who|Whose|Whether|That|Those|Of|So|With|As|Where|When|Which|How|For|To be|Until|But|And)\b")


def public(module_name: str) -> Iterator[tuple[str, object]]:
    """Yield the public functions and classes of a module, and the public methods of the classes, with their names."""
    module = importlib.import_module(module_name)
    defined = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module_name]
    for name in getattr(module, "__all__", [name for name in defined if not name.startswith("_")]):
        value = getattr(module, name)
        if inspect.isclass(value):
            yield f"{module_name}.{name}", value
            for member, function in inspect.getmembers(value, inspect.isfunction):
                inherited = not any(member in vars(base) for base in value.__mro__ if own(base))
                if not member.startswith("_") and not inherited and PROTOCOL.get(module_name) != member:
                    yield f"{module_name}.{name}.{member}", function
        elif inspect.isfunction(value):
            yield f"{module_name}.{name}", value


def own(value: type) -> bool:
    """Return True for a class of this project that is no generated message."""
    return value.__module__.startswith("camserve") and ".v1." not in value.__module__


ALL = [pytest.param(value, id=name) for module in MODULES for name, value in public(module)]
FUNCTIONS = [each for each in ALL if inspect.isfunction(each.values[0])]
CLASSES = [each for each in ALL if inspect.isclass(each.values[0])]


def sections(value: object) -> dict[str, griffe.DocstringSection]:
    """Return the sections of a Google-style docstring by kind, such as "parameters", "returns" or "yields"."""
    text = inspect.getdoc(value) or ""
    found = griffe.Docstring(text).parse("google", warnings=False)
    return {section.kind.value: section for section in found}


@pytest.mark.parametrize("value", ALL)
def test_public_name_has_a_docstring_with_a_first_line_that_stands_alone(value: object) -> None:
    text = inspect.getdoc(value)
    assert text, "the docstring is missing"
    first = text.splitlines()[0]
    assert not START.match(first), first
    assert first.rstrip("`").endswith((".", ":", "?")), first


@pytest.mark.parametrize("folder", ["client", "server", "benchmarks"])
def test_docstrings_of_all_names_begin_with_a_line_that_stands_alone(folder: str) -> None:
    fragments = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if START.match(text) and "_pb2" not in path.name:
                    fragments.append(f"{path.name}: {text.splitlines()[0]}")
    assert fragments == []


@pytest.mark.parametrize("value", FUNCTIONS)
def test_docstring_describes_every_parameter(value: object) -> None:
    signature = inspect.signature(value)  # type: ignore[arg-type]
    expected = {name for name in signature.parameters if name not in ("self", "cls") and not name.startswith("_")}
    section = sections(value).get("parameters")
    described = {each.name.lstrip("*") for each in section.value} if section else set()
    assert described == expected


@pytest.mark.parametrize("value", FUNCTIONS)
def test_docstring_describes_the_result(value: object) -> None:
    signature = inspect.signature(value)  # type: ignore[arg-type]
    if str(signature.return_annotation) in ("None", "<class 'inspect._empty'>"):
        return
    text = inspect.getdoc(value) or ""
    assert sections(value).keys() & {"returns", "yields"} or text.startswith("Return "), "no section Returns or Yields"


@pytest.mark.parametrize("value", [each for each in CLASSES if dataclasses.is_dataclass(each.values[0])])
def test_docstring_of_a_dataclass_describes_every_field(value: type) -> None:
    expected = {each.name for each in dataclasses.fields(value) if not each.name.startswith("_")}
    described: set[str] = set()
    for base in filter(own, value.__mro__):
        found = sections(base)
        for kind in ("attributes", "parameters"):
            described |= {each.name for each in found[kind].value} if kind in found else set()
    assert expected <= described


def test_reference_pages_show_every_public_name() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES.glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    missing = {
        f"{module}.{name}"
        for module in ("camserve", "camserve.aio")
        for name in importlib.import_module(module).__all__
        if name not in ("aio", "__version__") and f"{module}.{name}" not in shown
    }
    assert not missing
    assert {"camserve_dicom", "camserve_server.registry", "camserve_server.plan", "camserve_server.rows"} <= shown
