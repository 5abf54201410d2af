"""Checks that deploy/kserve agrees with the API of KServe, with Kubernetes, and with the commands of camserve."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.main import get_command

from camserve_cli.app import app
from camserve_server.config import Config, read_config
from camserve_server.service.listeners import SERVICE
from tests.processes import ROOT, completed
from tests.test_deploy import image_environment

FOLDER = ROOT / "deploy" / "kserve"
FILES = sorted(FOLDER.glob("*.yaml"))
MANIFESTS = {each["kind"]: each for path in FILES for each in yaml.safe_load_all(path.read_text(encoding="utf-8"))}
RUNTIME = MANIFESTS["ServingRuntime"]["spec"]
[EXPLAINER] = [
    each["spec"]["explainer"]
    for path in FILES
    for each in yaml.safe_load_all(path.read_text(encoding="utf-8"))
    if "explainer" in each["spec"]
]


def check(*files: Path) -> str:
    ran = completed([sys.executable, ROOT / "tests" / "kserve" / "check_manifests.py", *files])
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def config(container: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Config:
    """Read the configuration as the container does."""
    given = {each["name"]: each.get("value", "4") for each in container["env"]}
    for name, value in {**image_environment(), **given}.items():
        monkeypatch.setenv(name, value.replace("{{.Name}}", "resnet50"))
    return read_config()


@pytest.mark.slow
def test_manifests_match_the_api_of_kserve(tmp_path: Path) -> None:
    assert check(*FILES) == ""
    wrong = tmp_path / "wrong.yaml"
    text = (FOLDER / "inferenceservice.yaml").read_text(encoding="utf-8")
    wrong.write_text(text.replace("modelFormat:", "modelFormats:").replace("mountPath: /tmp", "path: /tmp"))
    found = check(wrong)
    assert "InferenceService.spec.predictor.model.modelFormats: unknown" in found
    assert "volumeMounts[0].path: unknown" in found


@pytest.mark.parametrize("name", ["explainer", "runtime"])
def test_pods_match_the_api_of_kubernetes(name: str) -> None:
    spec = EXPLAINER if name == "explainer" else {key: RUNTIME[key] for key in ("containers", "volumes")}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
    kubernetes_validate.validate(pod, "1.37", strict=True)


def test_explainer_and_server_of_a_pod_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    explainer, server = EXPLAINER["containers"]
    settings = config(server, monkeypatch)
    program, name = explainer["command"]
    assert program == "camserve"
    added = ["--model_name", "resnet50", "--predictor_host", "host", "--http_port", "8080", "--workers", "2"]
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    options = command.make_context(name, [*explainer["args"], *added]).params
    assert options["address"] == settings.listen
    assert options["host"] == "0.0.0.0"
    assert options["insecure"]
    assert options["max_body_mib"] == 96
    assert options["grpc_port"] == 8081
    [port] = explainer["ports"]
    assert {probe["httpGet"]["port"] for key, probe in explainer.items() if key.endswith("Probe")} == {8080}
    assert port["containerPort"] == options["http_port"]
    assert settings.health_listen == f"0.0.0.0:{server['livenessProbe']['grpc']['port']}"
    [model] = settings.models
    [mount] = [each for each in server["volumeMounts"] if each["name"] == "models"]
    assert model.source.startswith(f"onnx:{mount['mountPath']}/")
    assert settings.grace_s < EXPLAINER["terminationGracePeriodSeconds"]


def test_runtime_serves_the_open_inference_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    [container] = RUNTIME["containers"]
    settings = config(container, monkeypatch)
    assert settings.open_inference
    assert settings.listen == f"0.0.0.0:{container['ports'][0]['containerPort']}"
    assert container["readinessProbe"]["grpc"]["service"] == SERVICE
    assert settings.health_listen == f"0.0.0.0:{container['readinessProbe']['grpc']['port']}"
    assert settings.models[0].name == "resnet50"
    user = container["securityContext"]["runAsUser"]
    assert {user} == {EXPLAINER["securityContext"]["runAsUser"]}
    assert f"\nUSER {user}:{user}\n" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
