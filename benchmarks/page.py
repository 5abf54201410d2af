"""`docs/benchmarks.md` and its pictures, out of the results that a JSON file keeps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import plots
from benchmarks.results import Claim, Result, Table

HEAD = """# Benchmarks

{machine}, {threads} threads, torch {torch}, Python {python}, fp32; date and commit stand with each section. Made by

```console
{commands}
```

in {minutes:.0f} minutes. Everything is a ratio of two rates of the same run: same inputs, weights, threads and
precision, in turn (A B A B …), each side with the machine to itself, the median of the rounds. Peers run as their users
have them, in a process with glibc's defaults; and, as a second figure, in ours, where they profit from
[what the server sets](decisions/0008-allocator.md). EfficientNet-Lite0 has its ImageNet weights; ResNet50 and VGG16
have random ones, with logits of a trained network's scale. Ratios move by some hundredths from run to run.{gpu}
"""


def read(path: Path, facts: Mapping[str, str]) -> dict[str, Result]:
    """The results that were made on the same machine by the same software but ours; none if there are others."""
    if not path.exists():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    same = all(data["facts"].get(key) == value for key, value in facts.items() if key not in ("date", "commit"))
    return {name: Result.from_json(result) for name, result in data["results"].items()} if same else {}


def write(path: Path, facts: Mapping[str, str], results: Mapping[str, Result]) -> None:
    """Keeps the results, to be added to by another run."""
    data = {"facts": dict(facts), "results": {name: result.as_json() for name, result in results.items()}}
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def page(facts: Mapping[str, str], results: Mapping[str, Result], missing: Sequence[str], pictures: Path) -> str:
    """The whole text; draws the pictures into the folder beside it."""
    commands = dict.fromkeys(f"$ {result.command}" for result in results.values())
    minutes = sum(result.seconds for result in results.values()) / 60
    gpu = "" if facts["device"] == "cuda" else "\n\nNo GPU has been measured yet."
    parts = [HEAD.format(**facts, commands="\n".join(commands), minutes=max(1, minutes), gpu=gpu)]
    claims = [claim for result in results.values() for claim in result.claims]
    if claims:
        parts.append("## In short\n\n" + _claims(claims))
        missed = [claim for claim in claims if not claim.reached]
        if missed:
            parts.append("What is missed, and where the time goes:\n\n" + "\n".join(_reasons(missed)) + "\n")
    for name, result in results.items():
        parts.append(f"## {result.title}\n\n{wrapped(result.text)}\n\n{result.made}\n")
        parts += [_table(table) for table in result.tables]
        for number, chart in enumerate(result.charts, 1):
            file = f"bench-{name}{'' if number == 1 else f'-{number}'}.svg"
            pictures.mkdir(parents=True, exist_ok=True)
            plots.draw(chart, pictures / file)
            parts.append(f"![{chart.title}, {chart.unit}]({pictures.name}/{file})\n")
    if missing:
        commands_left = f"`python -m benchmarks {' '.join(missing)}`"
        parts.append(f"Not measured: {', '.join(missing)} ({commands_left}).\n")
    return "\n".join(parts)


def _claims(claims: Iterable[Claim]) -> str:
    rows = [
        [
            claim.what,
            claim.peer,
            f"**{_figure(claim, claim.figure)}**",
            "–" if claim.aim is None else _figure(claim, claim.aim),
            "" if claim.aim is None else "reached" if claim.reached else "MISSED",
            claim.agree or "–",
        ]
        for claim in claims
    ]
    return _table(Table("", ["what", "against", "figure", "aim", "", "outputs agree"], rows))


def _figure(claim: Claim, value: float) -> str:
    if claim.unit == "×":
        return f"{value:.0f}×" if value >= 20 else f"{value:.2g}×" if value >= 10 else f"{value:.2f}×"
    return f"{value:.2f}"


def _reasons(missed: Sequence[Claim]) -> list[str]:
    """A point for each reason, with all that it explains."""
    points = []
    for reason in dict.fromkeys(claim.because for claim in missed):
        them = [f"{c.what}, against {c.peer} ({_figure(c, c.figure)})" for c in missed if c.because == reason]
        points.append(wrapped(f"- {'; '.join(them)}: {reason or 'not known'}.", indent="  "))
    return points


def _table(table: Table) -> str:
    lines = [f"| {' | '.join(table.columns)} |", "|" + " --- |" * len(table.columns)]
    lines += [f"| {' | '.join(row)} |" for row in table.rows]
    return (f"{wrapped(table.text)}\n\n" if table.text else "") + "\n".join(lines) + "\n"


def wrapped(text: str, width: int = 120, indent: str = "") -> str:
    """In lines of at most `width` characters; links stay whole."""
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = indent + word
        else:
            line = f"{line} {word}" if line else word
    return "\n".join([*lines, line])
