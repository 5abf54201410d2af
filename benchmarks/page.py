"""Page docs/benchmarks.md and its charts, written from the results in a JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import plots
from benchmarks.results import Claim, Result, Table

HEAD = """# Benchmarks

Machine: {machine}, {threads} threads, torch {torch}, Python {python}, {precision}. Commands ({minutes:.0f} minutes):

```console
{commands}
```

Each ratio compares two rates of the same run with equal inputs, {equal}. The sides alternate
(A B A B …), nothing else runs, and the result is the median of the rounds. It varies by a few hundredths between runs.
{others} EfficientNet-Lite0 has ImageNet weights. ResNet50 and
VGG16 have random weights, with logits scaled like those of a trained network.{gpu}
"""
# How other implementations run, by the type of the device.
OTHERS = {
    "cpu": """Other implementations run in a separate process with the default allocator, and again with
[camserve's allocator settings](decisions/0008-allocator.md).""",
    "cuda": """Other implementations run in float32 with torch's defaults, which use TF32 for convolutions, and again at
camserve's precision.""",
}


def load(path: Path) -> tuple[dict[str, str], dict[str, Result]]:
    """Return the facts about the machine and the results in a JSON file."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return data["facts"], {name: Result.from_json(result) for name, result in data["results"].items()}


def read(path: Path, facts: Mapping[str, str]) -> dict[str, Result]:
    """Return the stored results, or none if they belong to another machine or to other versions of torch or Python."""
    if not path.exists():
        return {}
    stored, results = load(path)
    same = all(stored.get(key) == value for key, value in facts.items() if key not in ("date", "commit"))
    return results if same else {}


def write(path: Path, facts: Mapping[str, str], results: Mapping[str, Result]) -> None:
    """Write the results to a JSON file, to which another run can add sections."""
    data = {"facts": dict(facts), "results": {name: result.as_json() for name, result in results.items()}}
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def page(facts: Mapping[str, str], results: Mapping[str, Result], missing: Sequence[str], pictures: Path) -> str:
    """Return the text of the page and draw its charts into a folder."""
    commands = dict.fromkeys(f"$ {result.command}" for result in results.values())
    minutes = sum(result.seconds for result in results.values()) / 60
    on_gpu = facts["device"] == "cuda"
    head = HEAD.format(
        **facts,
        commands="\n".join(commands),
        minutes=max(1, minutes),
        equal="weights and threads" if on_gpu else "weights, threads and precision",
        others=OTHERS["cuda" if on_gpu else "cpu"],
        gpu="" if on_gpu else "\n\nMeasurements on a GPU: [Benchmarks on a GPU](benchmarks-gpu.md).",
    )
    parts = [head]
    claims = [claim for result in results.values() for claim in result.claims]
    if claims:
        parts.append("## Summary\n\n" + _claims(claims))
        missed = [claim for claim in claims if not claim.reached]
        if missed:
            parts.append("Reasons for missed targets:\n\n" + "\n".join(_reasons(missed)) + "\n")
    for name, result in results.items():
        parts.append(f"## {result.title}\n\n{wrapped(result.text)}\n\n{result.made}\n")
        parts += [table_text(table) for table in result.tables]
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
            "" if claim.aim is None else "met" if claim.reached else "missed",
            claim.agree or "–",
        ]
        for claim in claims
    ]
    return table_text(
        Table("", ["measurement", "compared with", "ratio", "target", "result", "agreement of outputs"], rows)
    )


def _figure(claim: Claim, value: float) -> str:
    if claim.unit == "×":
        return f"{value:.0f}×" if value >= 20 else f"{value:.2g}×" if value >= 10 else f"{value:.2f}×"
    return f"{value:.2f}"


def _reasons(missed: Sequence[Claim]) -> list[str]:
    """Return one list item for each reason, with all claims that it explains."""
    points = []
    for reason in dict.fromkeys(claim.because for claim in missed):
        explained = [
            f"{c.what}, compared with {c.peer} ({_figure(c, c.figure)})" for c in missed if c.because == reason
        ]
        points.append(wrapped(f"- {'; '.join(explained)}: {reason or 'unknown'}.", indent="  "))
    return points


def table_text(table: Table) -> str:
    """Return a table in Markdown, with its paragraph above it."""
    lines = [f"| {' | '.join(table.columns)} |", "|" + " --- |" * len(table.columns)]
    lines += [f"| {' | '.join(row)} |" for row in table.rows]
    return (f"{wrapped(table.text)}\n\n" if table.text else "") + "\n".join(lines) + "\n"


def wrapped(text: str, width: int = 120, indent: str = "") -> str:
    """Wrap text at `width` characters without breaking words or links."""
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = indent + word
        else:
            line = f"{line} {word}" if line else word
    return "\n".join([*lines, line])
