"""The page docs/simulation.md, its charts, and the file with its data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.page import table_text, wrapped
from benchmarks.results import Table
from benchmarks.simulation.plots import Lines, draw

HEAD = """# Capacity

This page answers questions about many replicas with a simulation. It runs the scheduler and the admission control of
the server (`camserve_server.engine.scheduler` and `camserve_server.engine.admission`) in simulated time, with measured
durations of batches. `python -m benchmarks.simulation` writes the page; equal seeds give equal results.

Simulated on {machine}, Python {python}.
"""


@dataclass(frozen=True)
class Section:
    """Section of the page.

    Attributes:
        title: Heading.
        text: Paragraphs, separated by empty lines.
        tables: Tables.
        lines: Charts.
        made: Date and commit.
        seconds: Duration of the command for this section.
    """

    title: str
    text: str
    tables: Sequence[Table] = ()
    lines: Sequence[Lines] = ()
    made: str = ""
    seconds: float = 0.0

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Section:
        """Create a section from its JSON values."""
        tables, lines = [Table(**each) for each in data["tables"]], [Lines(**each) for each in data["lines"]]
        return Section(**{**data, "tables": tables, "lines": lines})


def read(path: Path) -> tuple[dict[str, str], dict[str, Section]]:
    """Return the facts about the last run and the sections in a JSON file; nothing if there is none."""
    if not path.exists():
        return {}, {}
    data = json.loads(path.read_text(encoding="utf-8"))
    return data["facts"], {name: Section.from_json(section) for name, section in data["sections"].items()}


def write(path: Path, facts: Mapping[str, str], sections: Mapping[str, Section]) -> None:
    """Write the sections to a JSON file, to which another run can add sections."""
    data = {"facts": dict(facts), "sections": {name: dataclasses.asdict(each) for name, each in sections.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def page(facts: Mapping[str, str], sections: Mapping[str, Section], missing: Sequence[str], pictures: Path) -> str:
    """Return the text of the page and draw its charts into a folder."""
    parts = [HEAD.format(**facts)]
    for name, section in sections.items():
        parts.append(f"## {section.title}\n")
        parts += [f"{wrapped(paragraph)}\n" for paragraph in section.text.split("\n\n")]
        parts.append(f"{section.made}\n")
        parts += [table_text(table) for table in section.tables]
        for number, chart in enumerate(section.lines, 1):
            file = f"simulation-{name}{'' if number == 1 else f'-{number}'}.svg"
            pictures.mkdir(parents=True, exist_ok=True)
            draw(chart, pictures / file)
            parts.append(f"![{chart.title}]({pictures.name}/{file})\n")
    if missing:
        parts.append(
            f"Not simulated yet: {', '.join(missing)} (`python -m benchmarks.simulation {' '.join(missing)}`).\n"
        )
    return "\n".join(parts)
