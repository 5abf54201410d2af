"""Write the tables of docs/results.md from a CSV file of `camserve evaluate`, and save its scores in docs/results.csv.

    camserve serve
    camserve evaluate PHOTOGRAPHS... --method ... --metric ... --csv run.csv --npz run.npz
    python examples/results_page.py run.csv --levels PHOTOGRAPHS...

Without a CSV file, the tables are made from docs/results.csv. With --levels, the server scores every level of PCAM± on
these photographs, which takes about 5,000 rows for each.
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
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="?", help="default: docs/results.csv")
    parser.add_argument(
        "--levels", type=Path, nargs="+", metavar="PHOTOGRAPH", help="score the levels of PCAM± on these"
    )
    parser.add_argument("--address", default="127.0.0.1:50051", help="address of the server")
    options = parser.parse_args()
    with camserve.Client(options.address, timeout=3000) as client:
        if options.levels:
            score_levels(client, options.levels)
        if options.csv:
            slim(options.csv)
        run = records.read_study(
            SCORES, models=client.models(), methods=client.methods(), metrics=client.metrics(), against=AGAINST
        )
    page = PAGE.read_text(encoding="utf-8")
    page = put(page, "scores", score_table(run))
    page = put(page, "levels", level_table(run))
    PAGE.write_text(page, encoding="utf-8")


def slim(source: Path) -> None:
    """Save the columns that the tables need: file names without folders, and no receipts, curves and times."""
    csv.field_size_limit(2**27)
    with source.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.update(image=Path(row["image"]).name, receipt=f'{{"method": "{row["method"]}"}}')
        row.update(dict.fromkeys(["curves", "queue_ms", "compute_ms", "left_out", "boxes"], ""))
        row.update({metric: f"{float(row[metric]):.6g}" for metric in METRICS})
    score_csv.ScoreCsv(SCORES, METRICS).write(rows)


def score_levels(client: camserve.Client, photographs: Sequence[Path]) -> None:
    """Score the intermediate map of PCAM± after each level, the coarsest first."""
    with LEVELS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "level", "layer", *METRICS])
        for photograph in track(photographs, description="levels"):
            *levels, e = client.explain_stream(photograph, method="poly-cam")
            assert isinstance(e, camserve.Explanation), "the last event is the explanation"
            for level in levels:
                if isinstance(level, camserve.Level):
                    level_scores = client.evaluate(
                        photograph, saliency=level.saliency, target=e.target.index, metrics=METRICS
                    ).scores
                    values = [f"{float(level_scores[metric]):.6g}" for metric in METRICS]
                    writer.writerow([photograph.name, level.index, level.layer, *values])
                    file.flush()


def score_table(run: Study) -> Iterator[str]:
    """Yield the lines of the table of methods by metrics.

    A cell contains the mean, which is bold if it is the best and marked if it differs significantly from Grad-CAM, and
    the confidence interval.
    """
    (model,) = run.models
    cells = scores.cells(run, model)
    metrics = [metric for name in METRICS for metric in run.metrics if metric.name == name]
    yield "| method | rows | " + " | ".join(heading(metric) for metric in metrics) + " |"
    yield "| --- | " + "--- | " * (1 + len(metrics))
    for method in METHODS:
        rows = np.mean([record.rows for record in run.finished(model, method).values()])
        line = [f"`{method}`" + (" (control)" if run.is_control(method) else ""), f"{rows:,.0f}"]
        for metric in metrics:
            cell = cells[method, metric.name]
            assert cell.mean is not None, "the CSV file contains every method"
            ends = (cell.mean.value, cell.mean.low, cell.mean.high)
            mean, low, high = (scores.number(value, metric) for value in ends)
            mark = " †" if cell.comparison and cell.comparison.significant else ""
            line.append(f"**{mean}**{mark}<br>{low} to {high}" if cell.best else f"{mean}{mark}<br>{low} to {high}")
        yield "| " + " | ".join(line) + " |"


def level_table(run: Study) -> Iterator[str]:
    """Yield the lines of the table of levels by metrics: means, and the p-value of the difference of last and first."""
    with LEVELS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    images = sorted({row["image"] for row in rows})
    by_level = {int(row["level"]): row["layer"] for row in rows}
    values = {
        (int(row["level"]), metric): [float(each[metric]) for each in rows if each["level"] == row["level"]]
        for row in rows
        for metric in METRICS
    }
    metrics = [metric for name in METRICS for metric in run.metrics if metric.name == name]
    first, last = min(by_level), max(by_level)
    yield "| levels | finest layer | " + " | ".join(heading(metric) for metric in metrics) + " |"
    yield "| --- | --- | " + "--- | " * len(metrics)
    for level, layer in by_level.items():
        means = [scores.number(float(np.mean(values[level, metric.name])), metric) for metric in metrics]
        yield f"| {level + 1} | `{layer}` | " + " | ".join(means) + " |"
    line = ["all levels against one", "p-value"]
    for metric in metrics:
        differences = np.array(values[last, metric.name]) - np.array(values[first, metric.name])
        line.append(f"{statistics.sign_flip(differences):.3f}")
    yield "| " + " | ".join(line) + " |"
    yield ""
    yield f"*Means of {len(images)} photographs.*"


def heading(metric: camserve.Metric) -> str:
    """Return the name of a metric with an arrow in the direction of better scores."""
    return f"{metric.name} {'↑' if metric.higher_is_better else '↓'}"


def put(page: str, name: str, lines: Iterator[str]) -> str:
    """Replace the lines between two markers of the page."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, rest = page.split(begin)
    return before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1]


if __name__ == "__main__":
    main()
