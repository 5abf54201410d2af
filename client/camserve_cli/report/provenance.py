"""What was run, in full: counts, models, versions, warnings, and the receipts of all maps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from camserve_cli.report.records import Record, Study

__all__ = ["Group", "Provenance", "collect"]


@dataclass(frozen=True)
class Group:
    """The receipts of a method on a model: entries that are `common` to all, and a row of the others for each image."""

    model: str
    method: str
    count: int
    common: dict[str, str]
    columns: list[str]
    rows: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Provenance:
    """Counts and sums over all maps; `warnings` are (warning, how many maps, of which methods)."""

    maps: int
    failed: Sequence[Record]
    rows: int
    models: dict[str, dict[str, str]]
    versions: dict[str, str]
    warnings: list[tuple[str, int, str]]
    groups: list[Group]


def collect(study: Study, most: int) -> Provenance:
    """What is known of the run; of the first images, at most so many, also their own receipts."""
    done = [record for record in study.records if not record.error]
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in done:
        groups.setdefault((record.model, record.method), []).append(record)
    entries = [_entries(record.receipt) for record in done]
    return Provenance(
        maps=len(done),
        failed=study.failed(),
        rows=sum(record.rows for record in done),
        models={model: _of_model(study, model, done) for model in study.models},
        versions={
            name.removeprefix("versions."): _all(each.get(name, "") for each in entries)
            for name in dict.fromkeys(name for each in entries for name in each if name.startswith("versions."))
        },
        warnings=_warnings(done),
        groups=[_group(model, method, records, study.images[:most]) for (model, method), records in groups.items()],
    )


def _of_model(study: Study, model: str, done: Sequence[Record]) -> dict[str, str]:
    receipts = [record.receipt for record in done if record.model == model]
    said = {
        name.replace("_", " "): _all(str(receipt[name]) for receipt in receipts)
        for name in ("model_digest", "precision", "device", "preprocessing")
    }
    if known := study.models_by_name.get(model):
        said = {"source": known.source + (", random weights" if known.random_weights else ""), **said}
    return said


def _all(values: Any) -> str:
    """Each once: more than one where a run was resumed elsewhere."""
    return ", ".join(dict.fromkeys(values)) or "–"


def _warnings(done: Sequence[Record]) -> list[tuple[str, int, str]]:
    found: dict[str, Counter[str]] = {}
    for record in done:
        warnings = [text for text in record.warnings.split("; ") if text]
        if record.share < 1:
            warnings.append("cut short by the budget: the map has not all of its method's sum")
        for text in warnings:
            found.setdefault(text, Counter())[record.method] += 1
    return [
        (text, by.total(), ", ".join(f"{method} ({count})" for method, count in by.items()))
        for text, by in sorted(found.items(), key=lambda item: -item[1].total())
    ]


def _group(model: str, method: str, records: Sequence[Record], images: Sequence[str]) -> Group:
    entries = [_entries(record.receipt) for record in records]
    names = list(dict.fromkeys(name for each in entries for name in each))
    shown = set(images)
    own = [name for name in names if len({each.get(name) for each in entries}) > 1]
    return Group(
        model=model,
        method=method,
        count=len(records),
        common={name: entries[0][name] for name in names if name not in own},
        columns=own,
        rows=[
            (record.image, [each.get(name, "") for name in own])
            for record, each in zip(records, entries, strict=True)
            if record.image in shown
        ],
    )


def _entries(receipt: Mapping[str, Any]) -> dict[str, str]:
    """Mappings are taken apart, lists are joined."""
    entries: dict[str, str] = {}
    for name, value in receipt.items():
        if isinstance(value, Mapping):
            entries |= {f"{name}.{key}": _text(each) for key, each in value.items()}
        else:
            entries[name] = ", ".join(map(_text, value)) if isinstance(value, list) else _text(value)
    return entries


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
