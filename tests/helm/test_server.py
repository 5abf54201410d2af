"""The chart of the server agrees with the server and with deploy/kubernetes."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from camserve.version import __version__
from camserve_server.service.listeners import SERVICE
from tests.credentials import hashed
from tests.helm.charts import (
    CHARTS,
    SERVER_VALUES,
    Manifest,
    configuration,
    container,
    in_folder,
    named,
    needs_helm,
    of,
    pod,
    run,
    written,
)
from tests.processes import ROOT
from tests.promql import documented

pytestmark = needs_helm


def variables(manifests: dict[str, list[Manifest]], folder: Path) -> dict[str, str]:
    """Return the environment of the server's container, with the values that Kubernetes would insert."""
    given: dict[str, str] = {}
    for each in container(manifests)["env"]:
        match each.get("valueFrom"):
            case None:
                given[each["name"]] = in_folder(each["value"], folder)
            case {"resourceFieldRef": {"resource": "limits.cpu"}}:
                given[each["name"]] = container(manifests)["resources"]["limits"]["cpu"]
            case {"secretKeyRef": {"name": "camserve-tokens", "key": "tokens"}}:
                given[each["name"]] = json.dumps([{"name": "triage", "sha256": hashed("secret")}])
            case other:
                pytest.fail(f"unexpected: {other}")
    return given


@pytest.mark.parametrize("values", SERVER_VALUES, ids=lambda path: path.stem)
def test_server_accepts_the_configuration(values: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = of(values)
    environment = {"CAMSERVE_LISTEN": "0.0.0.0:50051", **variables(manifests, files)}
    if "PYTHONPATH" in environment:
        monkeypatch.syspath_prepend(environment["PYTHONPATH"])
    checked = run("config", "check", "--config", written(manifests, files), env=environment)
    assert (checked.exit_code, checked.stderr) == (0, ""), checked.stderr
    shown = dict(line.split(maxsplit=1) for line in checked.stdout.splitlines() if " " in line.strip())
    ports = {each["name"]: each["containerPort"] for each in container(manifests)["ports"]}
    listens = {"grpc": "listen", "health": "health_listen", "metrics": "metrics_listen"}
    assert {shown[listens[name]].strip() for name in ports} == {f'"0.0.0.0:{port}"' for port in ports.values()}
    given = tomllib.loads(configuration(manifests))
    assert ("metrics_listen" in given) == ("metrics" in ports)
    assert ("tls" in given) == (values.stem != "plaintext-values")
    assert ("client_ca" in given.get("tls", {})) == (values.stem not in {"plaintext-values", "tokens-values"})
    assert ("tokens.triage.sha256" in shown) == (values.stem in {"tokens-values", "keda-values"})


@pytest.mark.parametrize("values", SERVER_VALUES, ids=lambda path: path.stem)
def test_update_loses_no_request(values: Path) -> None:
    """A terminating pod serves and then drains before it is killed, and readiness is that of the service."""
    manifests = of(values)
    grace = tomllib.loads(configuration(manifests))["grace_s"]
    before = container(manifests)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert before >= 1
    assert before + grace + 5 <= pod(manifests)["terminationGracePeriodSeconds"]
    assert container(manifests)["readinessProbe"]["grpc"] == {"port": 50052, "service": SERVICE}
    update = manifests["Deployment"][0]["spec"]["strategy"]["rollingUpdate"]
    gpu = values.stem == "gpu-values"
    assert update == ({"maxUnavailable": 1, "maxSurge": 0} if gpu else {"maxUnavailable": 0, "maxSurge": 1})


def test_default_is_the_kustomization() -> None:
    """The chart and deploy/kubernetes/base run the server in the same way."""
    base = ROOT / "deploy" / "kubernetes" / "base"
    manifests = named("default")
    [other] = yaml.safe_load_all((base / "deployment.yaml").read_text(encoding="utf-8"))
    theirs, ours = other["spec"]["template"]["spec"]["containers"][0], dict(container(manifests))
    assert ours.pop("image") == f"ghcr.io/camserve/camserve:v{__version__}-cpu"
    assert ours.pop("imagePullPolicy") == "IfNotPresent"
    assert theirs.pop("image") == "camserve"
    assert ours == theirs
    assert other["spec"]["strategy"] == manifests["Deployment"][0]["spec"]["strategy"]
    texts = (base / "camserve.toml").read_text(encoding="utf-8"), configuration(manifests)
    assert tomllib.loads(texts[0]) == tomllib.loads(texts[1])
    for kind in ("NetworkPolicy", "PodDisruptionBudget"):
        [theirs] = yaml.safe_load_all((base / f"{kind.lower()}.yaml").read_text(encoding="utf-8"))
        ours, theirs = dict(manifests[kind][0]["spec"]), dict(theirs["spec"])
        for selector in ("podSelector", "selector"):
            assert (selector in ours) == (selector in theirs)
            ours.pop(selector, None), theirs.pop(selector, None)
        assert ours == theirs


def test_gpu() -> None:
    manifests = named("gpu")
    assert container(manifests)["image"].endswith(f":v{__version__}-cuda")
    assert container(manifests)["resources"]["limits"] == {"cpu": "4", "memory": "8Gi", "nvidia.com/gpu": "1"}
    assert {"name": "CAMSERVE_DEVICE", "value": "cuda"} in container(manifests)["env"]
    assert [each["key"] for each in pod(manifests)["tolerations"]] == ["nvidia.com/gpu"]
    several = of(CHARTS / "camserve" / "ci" / "gpu-values.yaml", "--set", "gpu.count=4")
    assert container(several)["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert {"name": "CAMSERVE_DEVICE", "value": "all"} in container(several)["env"]
    volumes = {each["name"]: each for each in pod(manifests)["volumes"]}
    assert volumes["model-chest"]["image"]["reference"] == "registry.example.org/weights/chest:3"
    assert volumes["model-skin"]["persistentVolumeClaim"]["claimName"] == "weights"
    assert volumes["cache"] == {"name": "cache", "persistentVolumeClaim": {"claimName": "camserve-cache"}}


@pytest.mark.parametrize(("name", "rows"), [("gpu", 25_000), ("keda", 5_000)])
def test_autoscaling_uses_a_documented_metric(name: str, rows: int) -> None:
    manifests = named(name)
    deployment = manifests["Deployment"][0]
    assert "replicas" not in deployment["spec"], "an upgrade would set it back"
    metric, target = "camserve_queue_rows", deployment["metadata"]["name"]
    assert metric in documented()
    if name == "gpu":
        [scaler] = manifests["HorizontalPodAutoscaler"]
        [source] = scaler["spec"]["metrics"]
        assert source["pods"]["metric"]["name"] == metric
        assert int(source["pods"]["target"]["averageValue"]) == rows
        assert scaler["spec"]["scaleTargetRef"]["name"] == target
        return
    [scaler] = manifests["ScaledObject"]
    spec = scaler["spec"]
    assert scaler["apiVersion"] == "keda.sh/v1alpha1"
    assert spec.keys() == {"scaleTargetRef", "minReplicaCount", "maxReplicaCount", "advanced", "triggers"}
    assert (spec["scaleTargetRef"], spec["minReplicaCount"], spec["maxReplicaCount"]) == ({"name": target}, 1, 20)
    [behaviour] = spec["advanced"]["horizontalPodAutoscalerConfig"].values()
    assert behaviour == named("gpu")["HorizontalPodAutoscaler"][0]["spec"]["behavior"]
    [trigger] = spec["triggers"]
    assert (trigger["type"], trigger["metricType"]) == ("prometheus", "AverageValue")
    assert trigger["authenticationRef"] == {"name": "prometheus"}
    asked = trigger["metadata"]
    assert all(isinstance(value, str) for value in asked.values()), "KEDA accepts only strings"
    assert (asked["threshold"], asked["ignoreNullValues"]) == (str(rows), "false")
    found = re.fullmatch(rf'sum\(avg_over_time\({metric}\{{namespace="ns",pod=~"(.*)"\}}\[1m\]\)\)', asked["query"])
    assert found
    assert re.fullmatch(found[1], f"{target}-7d9c6b5f4-x2x8k")
    assert not re.fullmatch(found[1], f"{target}-gateway-7d9c6b5f4-x2x8k"), "a pod of another release"
