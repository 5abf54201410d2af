"""Tests of the manifests that all charts render for the values in their ci/."""

from __future__ import annotations

import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from camserve.version import __version__
from tests.helm.charts import (
    CHARTS,
    CUSTOM,
    VALUES,
    container,
    helm,
    needs_helm,
    of,
    pod,
)

pytestmark = needs_helm
with_values = pytest.mark.parametrize("values", VALUES, ids=lambda path: f"{path.parent.parent.name}-{path.stem}")


@with_values
def test_lint_finds_nothing(values: Path) -> None:
    checked = helm("lint", "--strict", values.parent.parent, "--values", values)
    assert checked.returncode == 0, checked.stdout
    assert "[WARNING]" not in checked.stdout


@with_values
def test_manifests_match_the_api(values: Path) -> None:
    manifests = of(values)
    for kind in manifests.keys() - CUSTOM:
        for manifest in manifests[kind]:
            kubernetes_validate.validate(manifest, "1.37", strict=True)
    names = [(kind, each["metadata"]["name"]) for kind, same in manifests.items() for each in same]
    assert len(names) == len({*names})


@with_values
def test_selectors_match_the_pods(values: Path) -> None:
    manifests = of(values)
    labels = manifests["Deployment"][0]["spec"]["template"]["metadata"]["labels"].items()
    selectors = [manifests["Deployment"][0]["spec"]["selector"]["matchLabels"]]
    selectors += [each["spec"]["selector"] for each in manifests["Service"]]
    selectors += [each["spec"]["selector"]["matchLabels"] for each in manifests.get("PodDisruptionBudget", [])]
    selectors += [each["spec"]["podSelector"]["matchLabels"] for each in manifests.get("NetworkPolicy", [])]
    for selector in selectors:
        assert selector.keys() == {"app.kubernetes.io/name", "app.kubernetes.io/instance"}
        assert selector.items() <= labels
    ports = {each["name"] for each in container(manifests)["ports"]}
    assert {port["targetPort"] for each in manifests["Service"] for port in each["spec"]["ports"]} <= ports
    rules = [rule for each in manifests.get("NetworkPolicy", []) for rule in each["spec"]["ingress"]]
    assert {port["port"] for rule in rules for port in rule["ports"]} <= ports
    assert all(rule["from"] for rule in rules), "an empty list of peers means everyone"


@with_values
def test_service_monitors_select_a_service(values: Path) -> None:
    manifests = of(values)
    annotations = manifests["Deployment"][0]["spec"]["template"]["metadata"]["annotations"]
    for monitor in manifests.get("ServiceMonitor", []):
        assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
        assert monitor["metadata"]["labels"]["release"] == "prometheus"
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        [service] = [each for each in manifests["Service"] if wanted <= each["metadata"]["labels"].items()]
        [endpoint] = monitor["spec"]["endpoints"]
        assert endpoint.keys() == {"port", "interval"}
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
        assert "camserve" in service["metadata"]["name"], "alert rules recognise jobs by this part of their names"
        assert "prometheus.io/scrape" not in annotations, "the pods would be scraped twice"


@with_values
def test_pods_have_no_privileges(values: Path) -> None:
    spec = pod(of(values))
    user = {"runAsUser": 10001, "runAsGroup": 10001, "fsGroup": 10001, "runAsNonRoot": True}
    assert user.items() <= spec["securityContext"].items()
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"]) == (False, False)
    for each in [*spec["containers"], *spec.get("initContainers", [])]:
        assert each["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= each["resources"]["requests"].keys()
        for mount in each["volumeMounts"]:
            writable = mount["name"] in {"tmp", "data", "cache"}
            assert mount.get("readOnly", False) != writable
    mounted = [mount["name"] for each in spec["containers"] for mount in each["volumeMounts"]]
    assert sorted(mounted) == sorted(each["name"] for each in spec["volumes"])


@pytest.mark.parametrize("chart", ["camserve", "camserve-gateway"])
def test_version_is_that_of_the_distribution(chart: str) -> None:
    described = yaml.safe_load((CHARTS / chart / "Chart.yaml").read_text(encoding="utf-8"))
    assert (described["version"], described["appVersion"]) == (__version__, __version__)


@pytest.mark.parametrize("chart", ["camserve", "camserve-gateway"])
def test_names_fit_into_labels(chart: str) -> None:
    """Kubernetes appends 17 characters to the names of pods, which have at most 63."""
    values = next(path for path in VALUES if path.parent.parent.name == chart)
    made = helm("template", "x" * 53, CHARTS / chart, "--values", values).stdout
    names = {each["metadata"]["name"] for each in filter(None, yaml.safe_load_all(made))}
    assert all(re.fullmatch(r"x{46}(-metrics)?", name) for name in names)
