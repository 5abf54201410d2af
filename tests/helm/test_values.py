"""Errors for invalid values, and the TOML of valid ones."""

from __future__ import annotations

import json
import math
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from camserve_dicom.gateway import Config as GatewayConfig
from camserve_dicom.gateway.config import ServerConfig
from camserve_server.config import Config, ModelConfig, TokenConfig
from tests.helm.charts import (
    CHARTS,
    GATEWAY,
    configuration,
    needs_helm,
    refused,
    rendered,
)
from tests.processes import ROOT

pytestmark = needs_helm

WRONG = {
    "unknown value": ("camserve", ["replica=1"], "'replica' not allowed"),
    "negative number": ("camserve", ["replicas=-1"], "at '/replicas'"),
    "unknown key of the configuration": ("camserve", ["config.grace=3"], "'grace' not allowed"),
    "listener, which the chart sets": ("camserve", ["config.listen=0.0.0.0:1"], "'listen' not allowed"),
    "unknown key of a model": ("camserve", ["models[0].name=a", "models[0].source=timm:b", "models[0].w=c"], "'w' not"),
    "no model": ("camserve", ["models=null"], "models"),
    "source": ("camserve", ["models[0].name=a", "models[0].source=resnet50"], "/models/0/source"),
    "two models of one name": (
        "camserve",
        [f"models[{i}].{key}" for i in (0, 1) for key in ("name=a", "source=timm:b")],
        'models: two of them have the name "a"',
    ),
    "token in plaintext": (
        "camserve",
        ["tokens.list[0].name=a", "tokens.list[0].sha256=secret"],
        "/tokens/list/0/sha256",
    ),
    "tokens without TLS": ("camserve", ["tokens.secretName=a", "tls.enabled=false"], "tokens: they need TLS"),
    "subjects without certificates": (
        "camserve",
        ["tls.allowedSubjects={a}", "tls.clientCertificates=false"],
        "Set tls.clientCertificates",
    ),
    "kind of autoscaling": ("camserve", ["autoscaling.type=hpa"], "/autoscaling/type"),
    "KEDA without Prometheus": ("camserve", ["autoscaling.type=keda"], "autoscaling.keda.prometheus: set the URL"),
    "replicas in the wrong order": (
        "camserve",
        ["autoscaling.type=adapter", "autoscaling.minReplicas=11"],
        "11 is greater than maxReplicas, 10",
    ),
    "autoscaling without metrics": (
        "camserve",
        ["autoscaling.type=adapter", "metrics.enabled=false"],
        "Set metrics.enabled",
    ),
    "monitor without metrics": (
        "camserve",
        ["metrics.serviceMonitor.enabled=true", "metrics.enabled=false"],
        "serviceMonitor.enabled: set metrics.enabled",
    ),
    "no pod may change": ("camserve", ["rollingUpdate.maxUnavailable=0", "rollingUpdate.maxSurge=0"], "both be 0"),
    "no CPU limit": ("camserve", ["resources.limits.cpu=null"], "'cpu'"),
    "policy for nobody": (
        "camserve",
        ["networkPolicy.clients=null"],
        "at '/networkPolicy': missing",
    ),
    "model volume with two sources": (
        "camserve",
        ["modelVolumes[0].name=a", "modelVolumes[0].volume.emptyDir=", "modelVolumes[0].volume.nfs="],
        "/modelVolumes/0/volume",
    ),
    "cache volume with two sources": (
        "camserve",
        ["cacheVolume.emptyDir.sizeLimit=1Gi", "cacheVolume.nfs.path=/"],
        "/cacheVolume",
    ),
    "gateway without TLS": ("camserve-gateway", ["config.insecure=false"], "tls.secretName: set"),
    "policy without peers": ("camserve-gateway", ["networkPolicy.enabled=true"], "networkPolicy.senders: list"),
    "policy without a way out": ("camserve-gateway", ["networkPolicy.enabled=true"], "networkPolicy.egress: list"),
    "unknown key of the gateway": ("camserve-gateway", ["config.spool=/tmp"], "'spool' not allowed"),
    "size": ("camserve-gateway", ["persistence.size=large"], "/persistence/size"),
}


@pytest.mark.parametrize(("chart", "values", "message"), WRONG.values(), ids=WRONG)
def test_invalid_values_are_refused(chart: str, values: list[str], message: str) -> None:
    options = [option for each in values for option in ("--set", each)]
    assert message in refused(chart, *(GATEWAY if chart == "camserve-gateway" else ()), *options)


def test_gateway_names_all_missing_values() -> None:
    message = refused("camserve-gateway")
    missing = re.findall(r"^- ([\w.]+): ", message, re.MULTILINE)
    assert missing == [
        "image",
        "config.callers",
        "config.pacs",
        "config.server.address",
        "tls.secretName",
        "networkPolicy.senders",
        "networkPolicy.egress",
    ]


@pytest.mark.parametrize(("chart", "heading"), [("camserve", "Helm chart"), ("camserve-gateway", "DICOM gateway")])
def test_charts_accept_the_documented_values(chart: str, heading: str, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    examples = re.findall(r"^```yaml\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert examples
    for i, example in enumerate(examples):
        path = tmp_path / f"{i}.yaml"
        path.write_text(example, encoding="utf-8")
        assert "Deployment" in rendered(chart, "--values", path)


def test_schemas_know_all_keys_of_the_configuration() -> None:
    """Keys are missing in the schema only if the chart sets them, or if they make no sense in a pod."""
    read = [json.loads((CHARTS / name / "values.schema.json").read_text()) for name in ("camserve", "camserve-gateway")]
    server, gateway = (each["properties"] for each in read)
    own = {"listen", "health_listen", "metrics_listen", "insecure", "tls", "tokens", "models", "device", "threads"}
    own |= {"cache_dir"}
    assert server["config"]["properties"].keys() == Config.model_fields.keys() - own - {"socket_mode", "admin_listen"}
    assert server["models"]["items"]["properties"].keys() == ModelConfig.model_fields.keys()
    assert server["tokens"]["properties"]["list"]["items"]["properties"].keys() == TokenConfig.model_fields.keys()
    own = {"spool", "listen", "monitor_listen", "monitor_insecure", "tls"}
    assert gateway["config"]["properties"].keys() == GatewayConfig.model_fields.keys() - own
    assert gateway["config"]["properties"]["server"]["properties"].keys() == ServerConfig.model_fields.keys()


def test_all_values_keep_their_type_and_text_in_toml(tmp_path: Path) -> None:
    rule = {
        "series_description": 'a "b" \\ <&> \t\n # = [x] é 猫 🐱',
        "parameters": {"integer": 7, "number": 0.25, "small": 1e-7, "a b.c": {"nested": [True, False]}},
        "modality": ["CR", "DX"],
        "body_part": [],
        "target": 3,
        "window": [2048, 4096.5],
    }
    config = {"max_object_bytes": 3 << 30, "rules": [rule, {"ignore": True}], "pdf_fonts": []}
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump({"config": config}))
    read = tomllib.loads(configuration(rendered("camserve-gateway", *GATEWAY, "--values", path)))
    assert {key: read[key] for key in config} == config
    assert isinstance(read["max_object_bytes"], int)
    assert isinstance(read["rules"][0]["target"], int)
    assert math.isclose(read["rules"][0]["window"][1], 4096.5)
