"""HTML pages that need no other file and no network."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

__all__ = ["environment", "write_page"]


def environment() -> jinja2.Environment:
    """Return the environment of the page templates, which escape all values."""
    result = jinja2.Environment(
        loader=jinja2.PackageLoader("camserve_cli.report", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    result.filters["svg"] = Markup
    return result


def write_page(
    path: str | os.PathLike[str], pages: jinja2.Environment, template: str, content: dict[str, Any], script: str = ""
) -> None:
    """Render a page and write it atomically.

    Args:
        path: The file to write.
        pages: The environment of the templates.
        template: Name of the template.
        content: Values of the template.
        script: Name of the only script that the page may run, or "" for none.

    Raises:
        OSError: The file cannot be written.
    """
    source = pages.get_template(script).render() if script else ""
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    page = pages.get_template(template).render(content, script=Markup(source), script_digest=digest)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page, encoding="utf-8", errors="backslashreplace")  # for names of files
    temporary.replace(path)
