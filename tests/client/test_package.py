"""Size and imports of the client package."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import camserve
from tests.processes import completed

PACKAGE = Path(camserve.__file__).parent
OTHER_PACKAGES = {
    "camserve_cli",
    "camserve_dicom",
    "camserve_server",
    "camserve_ui",
    "torch",
    "typer",
    "rich",
    "pydicom",
}


def test_import_loads_no_other_package() -> None:
    code = "import camserve, sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = completed([sys.executable, "-c", code]).stdout
    assert "camserve" in loaded.split()
    assert not OTHER_PACKAGES & set(loaded.split())


def code_lines(path: Path) -> int:
    """Return the number of lines without docstrings. Comments and blank lines count."""
    text = path.read_text(encoding="utf-8")
    docstring_lines = 0
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            docstring = node.body[0]
            docstring_lines += (docstring.end_lineno or 0) - docstring.lineno + 1
    return len(text.splitlines()) - docstring_lines


def test_client_has_at_most_3000_lines_of_code() -> None:
    modules = [path for path in PACKAGE.rglob("*.py") if "v1" not in path.parts]
    lines = {path.name: code_lines(path) for path in modules}
    assert sum(lines.values()) <= 3000, lines
