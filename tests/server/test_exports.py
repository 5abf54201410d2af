"""Names that third-party methods and metrics can import."""

from __future__ import annotations

import pytest

from camserve_server import plan, registry, rows

ROWS = {
    "Blended",
    "Masked",
    "Part",
    "Perturbed",
    "RepeatInterleaved",
    "Repeated",
    "generator",
    "minmax",
    "normal",
    "resize",
    "resize_minmax",
    "to_device",
}
QUERIES = {
    "Ablate",
    "Ascend",
    "Cached",
    "Capture",
    "CaptureAttention",
    "ClassWeights",
    "Gradient",
    "OnHost",
    "Predict",
    "Randomise",
    "ReleaseRows",
    "Report",
    "Score",
    "Sum",
    "WeightedLayers",
}


def test_plan_exports_all_queries() -> None:
    exported = {name for name in plan.__all__ if isinstance(getattr(plan, name), type)}
    assert {name for name in exported if issubclass(getattr(plan, name), plan.Query)} == QUERIES | {"Query"}


def test_rows_exports_its_classes_and_functions() -> None:
    assert set(rows.__all__) == ROWS


@pytest.mark.parametrize("module", [plan, registry, rows], ids=lambda module: module.__name__)
def test_exported_names_exist_once(module: object) -> None:
    names: list[str] = module.__all__  # type: ignore[attr-defined]
    assert all(hasattr(module, name) for name in names)
    assert len(names) == len(set(names))
