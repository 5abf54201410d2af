"""Fills the tables of docs/results.md from the CSV of `camserve evaluate`, and keeps its scores in docs/results.csv.

    camserve serve
    camserve evaluate PHOTOGRAPHS... --method ... --metric ... --csv run.csv --npz run.npz
    python examples/results_page.py run.csv --levels PHOTOGRAPHS...

Without a CSV the tables are made anew from docs/results.csv. With --levels the server scores every level of PCAM± on
those photographs, which takes about 5,000 rows each.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.progress import track

import camserve
from camserve_cli.report import records, scores, statistics
from camserve_cli.report.records import Study
from camserve_cli.study import score_csv

DOCS = Path(__file__).parent.parent / "docs"
PAGE, SCORES, LEVELS = DOCS / "results.md", DOCS / "results.csv", DOCS / "results-levels.csv"
AGAINST = "grad-cam"
METHODS = [
    "poly-cam",
    "score-cam",
    "layer-cam",
    "grad-cam",
    "grad-cam++",
    "opti-cam",
    "integrated-gradients",
    "center-gaussian",
    "random",
    "fake-cam",
]
METRICS = ["insertion-deletion", "insertion", "deletion", "average-drop", "average-increase", "average-gain"]


def main() -> None:
    """Reads the command line, writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="?", help="default: docs/results.csv")
    parser.add_argument("--levels", type=Path, nargs="+", metavar="PHOTOGRAPH")
    parser.add_argument("--address", default="127.0.0.1:50051")
    given = parser.parse_args()
    with camserve.Client(given.address, timeout=3000) as client:
        if given.levels:
            score_levels(client, given.levels)
        if given.csv:
            slim(given.csv)
        run = records.read_study(
            SCORES, models=client.models(), methods=client.methods(), metrics=client.metrics(), against=AGAINST
        )
    page = PAGE.read_text(encoding="utf-8")
    page = put(page, "scores", score_table(run))
    page = put(page, "levels", level_table(run))
    PAGE.write_text(page, encoding="utf-8")


def slim(source: Path) -> None:
    """Keeps what the tables need: names without folders, no receipts, no curves, no times."""
    csv.field_size_limit(2**27)
    with source.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.update(image=Path(row["image"]).name, receipt=f'{{"method": "{row["method"]}"}}')
        row.update(dict.fromkeys(["curves", "queue_ms", "compute_ms", "left_out", "boxes"], ""))
        row.update({metric: f"{float(row[metric]):.6g}" for metric in METRICS})
    score_csv.ScoreCsv(SCORES, METRICS).write(rows)


def score_levels(client: camserve.Client, photographs: Sequence[Path]) -> None:
    """Scores what PCAM± has after each of its levels, the coarsest first."""
    with LEVELS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "level", "layer", *METRICS])
        for photograph in track(photographs, description="levels"):
            *levels, e = client.explain_stream(photograph, method="poly-cam")
            assert isinstance(e, camserve.Explanation), "the last event"
            for level in levels:
                if isinstance(level, camserve.Level):
                    found = client.evaluate(
                        photograph, saliency=level.saliency, target=e.target.index, metrics=METRICS
                    ).scores
                    values = [f"{float(found[metric]):.6g}" for metric in METRICS]
                    writer.writerow([photograph.name, level.index, level.layer, *values])
                    file.flush()


def score_table(run: Study) -> Iterator[str]:
    """Methods by metrics: means, the best in bold, those that differ from Grad-CAM marked, intervals below."""
    (model,) = run.models
    cells = scores.cells(run, model)
    metrics = [metric for name in METRICS for metric in run.metrics if metric.name == name]
    yield "| method | rows | " + " | ".join(heading(metric) for metric in metrics) + " |"
    yield "| --- | " + "--- | " * (1 + len(metrics))
    for method in METHODS:
        rows = np.mean([record.rows for record in run.of(model, method).values()])
        line = [f"`{method}`" + (" (control)" if run.is_control(method) else ""), f"{rows:,.0f}"]
        for metric in metrics:
            cell = cells[method, metric.name]
            assert cell.mean is not None, "every method was run"
            ends = (cell.mean.value, cell.mean.low, cell.mean.high)
            mean, low, high = (scores.number(value, metric) for value in ends)
            mark = " †" if cell.comparison and cell.comparison.significant else ""
            line.append(f"**{mean}**{mark}<br>{low} to {high}" if cell.best else f"{mean}{mark}<br>{low} to {high}")
        yield "| " + " | ".join(line) + " |"


def level_table(run: Study) -> Iterator[str]:
    """Levels by metrics: the means, and on how many photographs each is better than the one before."""
    with LEVELS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    images = sorted({row["image"] for row in rows})
    by_level = {int(row["level"]): row["layer"] for row in rows}
    of = {
        (int(row["level"]), metric): [float(each[metric]) for each in rows if each["level"] == row["level"]]
        for row in rows
        for metric in METRICS
    }
    metrics = [metric for name in METRICS for metric in run.metrics if metric.name == name]
    first, last = min(by_level), max(by_level)
    yield "| levels | finest layer | " + " | ".join(heading(metric) for metric in metrics) + " |"
    yield "| --- | --- | " + "--- | " * len(metrics)
    for level, layer in by_level.items():
        means = [scores.number(float(np.mean(of[level, metric.name])), metric) for metric in metrics]
        yield f"| {level + 1} | `{layer}` | " + " | ".join(means) + " |"
    line = ["all against one", "p of no difference"]
    for metric in metrics:
        differences = np.array(of[last, metric.name]) - np.array(of[first, metric.name])
        line.append(f"{statistics.sign_flip(differences):.3f}")
    yield "| " + " | ".join(line) + " |"
    yield ""
    yield f"*Means of {len(images)} photographs.*"


def heading(metric: camserve.Metric) -> str:
    """The metric's name, and which way is better."""
    return f"{metric.name} {'↑' if metric.higher_is_better else '↓'}"


def put(page: str, name: str, lines: Iterator[str]) -> str:
    """The page with those lines between its marks."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, rest = page.split(begin)
    return before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1]


if __name__ == "__main__":
    main()
