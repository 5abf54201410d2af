"""The page docs/networks.md and the file with its data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.sweep.examine import SERVED, Examined
from camserve_server.models.cuts import MAX_CUT

_TITLES = {"torchvision": "torchvision", "timm": "timm", "huggingface": "Hugging Face", "monai": "MONAI"}


def read(path: Path, here: Mapping[str, str]) -> dict[str, Examined]:
    """Return the stored results by name; none if they come from another machine or other versions.

    Args:
        path: JSON file; it need not exist.
        here: Facts about this machine (`benchmarks.machine.facts`).
    """
    if not path.exists():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    if _without_dates(data["run"]) != _without_dates(here):
        return {}
    return {each["name"]: Examined(**each) for each in data["networks"]}


def _without_dates(facts: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in facts.items() if key not in ("date", "commit")}


def write(path: Path, here: Mapping[str, str], results: Sequence[Examined]) -> None:
    """Store the results.

    Args:
        path: JSON file.
        here: Facts about this machine.
        results: The results.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"run": dict(here), "networks": [asdict(each) for each in results]}, indent=1)
    part = path.with_suffix(".part")  # an interrupted run leaves a complete file
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def page(here: Mapping[str, str], results: Sequence[Examined], missing: int) -> str:
    """Return the page.

    Args:
        here: Facts about this machine.
        results: The results.
        missing: Number of networks without a result.
    """
    dates = sorted({each.date for each in results})
    versions = ", ".join(
        f"{key} {here[key]}" for key in ("torch", "torchvision", "timm", "transformers", "monai") if key in here
    )
    families: dict[str, list[Examined]] = {}
    for each in results:
        families.setdefault(each.name.partition(":")[0], []).append(each)
    lines = [
        "# Networks",
        "",
        "This page shows what camserve makes of published image classifiers with random weights: all of torchvision, "
        "one of each module of timm, and the families of Hugging Face and MONAI with their default settings. "
        "`python -m benchmarks.sweep` writes it.",
        "",
        f"{here['machine']}, {versions}, {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}."
        if dates
        else "There are no results.",
        *(["", f"{missing} networks have not been examined yet."] if missing else []),
        "",
        "- **cut**: the largest [cut value](configuration.md#layers) of a default layer: 0 if all information in the "
        "logits passes through the layer, 1 if none does.",
        "- **outputs**: the largest difference between the outputs of the served and the original network, as a share "
        "of the largest output.",
        "- **Grad-CAM**: the correlation of the served map with one that is computed with a hook and autograd on the "
        "original network. An almost constant map, as that of Hugging Face's `levit` with random weights, consists "
        "mostly of rounding errors.",
        "- **missing**: methods that are not available.",
        "",
        *_table(
            ["library", "networks", SERVED, "other outcomes", f"cut above {MAX_CUT} without a warning"],
            [_summary(family, networks) for family, networks in families.items()],
        ),
    ]
    for family, networks in families.items():
        rows = [_row(each) for each in networks]
        heading = ["network", "layer", "size", "cut", "outputs", "Grad-CAM", "missing", "remarks"]
        lines += ["", f"## {_TITLES.get(family, family)}", "", *_table(heading, rows)]
    return "\n".join(lines) + "\n"


def _summary(family: str, results: Sequence[Examined]) -> list[str]:
    outcomes = Counter(each.outcome for each in results)
    others = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()) if outcome != SERVED)
    broken = sum(each.breaks_promise for each in results)
    return [_TITLES.get(family, family), f"{len(results)}", f"{outcomes[SERVED]}", others, f"{broken}"]


def _row(result: Examined) -> list[str]:
    network = f"`{result.name.partition(':')[2]}`"
    if result.outcome != SERVED:
        return [network, "", "", "", "", "", "", f"{result.outcome}: {result.reason}"]
    return [
        network,
        f"`{result.layer}`" if result.layer else "none",
        f"{result.size[0]} × {result.size[1]}" if result.layer else "",
        "" if result.worst_cut is None else f"{result.worst_cut:.2f}",
        "" if result.difference is None else f"{result.difference:.0e}",
        "" if result.grad_cam is None else f"{result.grad_cam:.4f}",
        ", ".join(result.missing),
        "; ".join(result.warnings),
    ]


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [heading, ["---"] * len(heading), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return ["| " + " | ".join(row) + " |" for row in cells]
