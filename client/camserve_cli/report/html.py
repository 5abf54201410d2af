"""Pages: one HTML file each, that needs no other and no network, written in one step."""

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
    """Of the templates beside it; values are escaped."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("camserve_cli.report", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["svg"] = Markup
    return made


def write_page(
    path: str | os.PathLike[str], pages: jinja2.Environment, template: str, content: dict[str, Any], script: str = ""
) -> None:
    """Render the template into the file. The page may run the script, by its name, and nothing else."""
    source = pages.get_template(script).render() if script else ""
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    page = pages.get_template(template).render(content, script=Markup(source), script_digest=digest)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    anew = path.with_name(path.name + ".tmp")
    anew.write_text(page, encoding="utf-8")
    anew.replace(path)
