"""Provenance of a study: counts, models, versions, warnings, and the receipts of the maps."""

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
    """Receipts of a method on a model.

    Attributes:
        model: Name of the model.
        method: Label of the method.
        count: Number of receipts.
        common: Entries that all receipts share.
        columns: Names of the entries that differ.
        rows: For each image, its name and its values of these entries.
    """

    model: str
    method: str
    count: int
    common: dict[str, str]
    columns: list[str]
    rows: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Provenance:
    """Provenance of all maps.

    Attributes:
        maps: Number of maps.
        failed: Records of the failures.
        rows: Total number of rows.
        models: Facts about each model.
        versions: Versions of the server's packages.
        warnings: For each warning its text, the number of maps, and the methods of these maps.
        groups: Receipts by model and method.
    """

    maps: int
    failed: Sequence[Record]
    rows: int
    models: dict[str, dict[str, str]]
    versions: dict[str, str]
    warnings: list[tuple[str, int, str]]
    groups: list[Group]


def collect(study: Study, most: int) -> Provenance:
    """Collect the provenance of a study.

    Args:
        study: The study.
        most: Maximum number of images whose own receipt entries are included.
    """
    done = [record for record in study.records if not record.error]
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in done:
        groups.setdefault((record.model, record.method), []).append(record)
    entries = [_entries(record.receipt) for record in done]
    return Provenance(
        maps=len(done),
        failed=study.failed(),
        rows=sum(record.rows for record in done),
        models={model: _model_facts(study, model, done) for model in study.models},
        versions={
            name.removeprefix("versions."): _distinct(each.get(name, "") for each in entries)
            for name in dict.fromkeys(name for each in entries for name in each if name.startswith("versions."))
        },
        warnings=_warnings(done),
        groups=[_group(model, method, records, study.images[:most]) for (model, method), records in groups.items()],
    )


def _model_facts(study: Study, model: str, done: Sequence[Record]) -> dict[str, str]:
    receipts = [record.receipt for record in done if record.model == model]
    facts = {
        name.replace("_", " "): _distinct(str(receipt[name]) for receipt in receipts)
        for name in ("model_digest", "precision", "device", "preprocessing")
    }
    if described := study.models_by_name.get(model):
        source = described.source + (", random weights" if described.random_weights else "")
        facts = {"source": source, **facts}
    return facts


def _distinct(values: Any) -> str:
    """Join the distinct values. There are several if another server continued the study."""
    return ", ".join(dict.fromkeys(values)) or "–"


def _warnings(done: Sequence[Record]) -> list[tuple[str, int, str]]:
    found: dict[str, Counter[str]] = {}
    for record in done:
        warnings = [text for text in record.warnings.split("; ") if text]
        if record.share < 1:
            warnings.append("stopped early because of the budget or deadline: the map contains only a part of its sum")
        for text in warnings:
            found.setdefault(text, Counter())[record.method] += 1
    return [
        (text, by.total(), ", ".join(f"{method} ({count})" for method, count in by.items()))
        for text, by in sorted(found.items(), key=lambda item: -item[1].total())
    ]


def _group(model: str, method: str, records: Sequence[Record], images: Sequence[str]) -> Group:
    entries = [_entries(record.receipt) for record in records]
    names = list(dict.fromkeys(name for each in entries for name in each))
    detailed = set(images)
    different = [name for name in names if len({each.get(name) for each in entries}) > 1]
    return Group(
        model=model,
        method=method,
        count=len(records),
        common={name: entries[0][name] for name in names if name not in different},
        columns=different,
        rows=[
            (record.image, [each.get(name, "") for name in different])
            for record, each in zip(records, entries, strict=True)
            if record.image in detailed
        ],
    )


def _entries(receipt: Mapping[str, Any]) -> dict[str, str]:
    """Flatten a receipt: mappings become several entries, and lists are joined."""
    entries: dict[str, str] = {}
    for name, value in receipt.items():
        if isinstance(value, Mapping):
            entries |= {f"{name}.{key}": _text(each) for key, each in value.items()}
        else:
            entries[name] = ", ".join(map(_text, value)) if isinstance(value, list) else _text(value)
    return entries


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
