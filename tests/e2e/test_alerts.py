"""The alert rules in deploy/prometheus agree with the exported metrics, the configuration and the documentation."""

from __future__ import annotations

import re
import shutil
from typing import Any

import grpc
import pytest
import yaml

from camserve.v1 import explain_pb2
from camserve_dicom.gateway.config import Config as GatewayConfig
from camserve_dicom.gateway.config import PacsConfig
from camserve_dicom.gateway.spool import Stage
from tests.processes import ROOT, completed
from tests.promql import PROCESS_METRICS, documented, matched_labels, metrics_in, named_labels, series

REPOSITORY = "https://github.com/camserve/camserve/blob/main/"
FOLDER = ROOT / "deploy" / "prometheus"
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool, of Debian's package prometheus"
)
Rule = dict[str, Any]


def loaded(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    return content


RULES: dict[str, Rule] = {rule["alert"]: rule for group in loaded("alerts.yml")["groups"] for rule in group["rules"]}
# Prometheus adds `job` and `instance` to each series.
TARGET = {"job", "instance"}
SERIES = {
    **series(documented()),
    **series(documented("pacs.md")),
    **{name: set() for name in PROCESS_METRICS},
    "up": set(),
}
# The values that the labels can have. The server's tests cover those of `result`.
VALUES = {
    "code": {code.name for code in grpc.StatusCode},
    "rpc": {method.name for method in explain_pb2.DESCRIPTOR.services_by_name["ExplainService"].methods},
    "stage": {stage.value for stage in Stage},
    "result": {"ok", "failed"},
    "job": {".*camserve.*"},
}


@pytest.mark.parametrize("name", RULES)
def test_alerts_use_exported_metrics_and_labels(name: str) -> None:
    query = RULES[name]["expr"]
    used = metrics_in(query)
    assert used
    assert {*used} <= SERIES.keys()
    labels = TARGET.union(*(SERIES[metric] for metric in used))
    assert named_labels(query) | matched_labels(query).keys() <= labels
    for label, values in matched_labels(query).items():
        assert values <= VALUES[label]


@pytest.mark.parametrize("name", RULES)
def test_texts_of_alerts_use_labels_that_the_alerts_have(name: str) -> None:
    query = RULES[name]["expr"]
    labels = TARGET | SERIES[metrics_in(query)[0]]
    if query.startswith("absent("):
        labels = set()
    elif " by (" in query:
        labels = named_labels(query) - {"le"}
    assert {*re.findall(r"\$labels\.(\w+)", str(RULES[name]["annotations"]))} <= labels


@pytest.mark.parametrize("name", RULES)
def test_alerts_say_what_happened_and_link_to_the_documentation(name: str) -> None:
    assert RULES[name]["labels"].keys() == {"severity"}
    annotations = RULES[name]["annotations"]
    assert annotations.keys() == {"summary", "description", "runbook_url"}
    assert annotations["summary"].endswith(".")
    page, _, anchor = annotations["runbook_url"].removeprefix(REPOSITORY).partition("#")
    headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert anchor in {heading.lower().replace(" ", "-") for heading in headings}


def test_documentation_lists_the_alerts_with_their_severity() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(Camserve\w+)` \| (\w+) \|", page, re.MULTILINE)
    assert listed == [(name, rule["labels"]["severity"]) for name, rule in RULES.items()]


def test_thresholds_fit_the_defaults_of_the_configuration() -> None:
    gateway, pacs = GatewayConfig.model_fields, PacsConfig.model_fields
    for name, threshold in {
        "CamserveGatewayInboxFilling": 0.5 * gateway["max_waiting"].default,
        "CamserveGatewayDiskFilling": 2 * gateway["min_free_bytes"].default,
        "CamserveGatewayCommitmentOverdue": 2 * pacs["commitment_timeout_s"].default,
    }.items():
        assert float(RULES[name]["expr"].split()[-1]) == threshold, name


def test_each_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    cases = [case for test in loaded("alerts_test.yml")["tests"] for case in test["promql_expr_test"]]
    for name in RULES:
        query = f'ALERTS{{alertname="{name}", alertstate="firing"}}'
        assert {bool(case["exp_samples"]) for case in cases if case["expr"] == query} == {True, False}, name


@needs_promtool
@pytest.mark.slow
def test_promtool_accepts_the_rules() -> None:
    ran = completed(["promtool", "check", "rules", "--lint=all", "--lint-fatal", str(FOLDER / "alerts.yml")])
    assert ran.returncode == 0, ran.stdout + ran.stderr


@needs_promtool
@pytest.mark.slow
def test_alerts_fire_on_their_conditions_and_not_otherwise() -> None:
    ran = completed(["promtool", "test", "rules", str(FOLDER / "alerts_test.yml")])
    assert ran.returncode == 0, ran.stdout + ran.stderr
