"""Errors for invalid values, and the TOML of valid ones."""

from __future__ import annotations

import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft7Validator  # type: ignore[import-untyped]
from pydantic import BaseModel

from camserve_dicom.gateway import Config as GatewayConfig
from camserve_dicom.gateway.config import ServerConfig
from camserve_server.config import Config, ModelConfig, TokenConfig
from tests.helm.charts import (
    CHARTS,
    CUSTOM,
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
    "name that Kubernetes refuses": ("camserve", ["fullnameOverride=My_App"], 'would have the name "My_App"'),
    "name that starts with a digit": ("camserve-gateway", ["fullnameOverride=1-a"], 'would have the name "1-a"'),
    "label that Kubernetes refuses": ("camserve", ["nameOverride=a b"], "at '/nameOverride'"),
    "variable of the chart": (
        "camserve",
        ["env[0].name=CAMSERVE_THREADS", "env[0].value=many"],
        "env: CAMSERVE_THREADS is there twice, or the chart sets it",
    ),
    "variable that is given twice": (
        "camserve-gateway",
        [f"env[{i}].{key}" for i in (0, 1) for key in ("name=A", "value=b")],
        "env: A is there twice",
    ),
    "no pod may change, in percent": (
        "camserve",
        ["rollingUpdate.maxUnavailable=0", "rollingUpdate.maxSurge=0%"],
        "both be 0",
    ),
    "more than all pods": ("camserve", ["rollingUpdate.maxUnavailable=101%"], "/rollingUpdate/maxUnavailable"),
    "budget of more than all pods": (
        "camserve",
        ["podDisruptionBudget.maxUnavailable=101%"],
        "/podDisruptionBudget/maxUnavailable",
    ),
    "key of a secret": ("camserve", ["tokens.secretKey=a b"], "/tokens/secretKey"),
    "name of a storage class": ("camserve-gateway", ["persistence.storageClass=-"], "/persistence/storageClass"),
    "unknown key of a table of the gateway": ("camserve-gateway", ["config.pacs.port=104"], "'port' not allowed"),
    "unknown key of a rule": ("camserve-gateway", ["config.rules[0].methods=rise"], "'methods' not allowed"),
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
    tables = {key: models_in(field.annotation) for key, field in GatewayConfig.model_fields.items() if key not in own}
    assert ServerConfig in tables["server"]
    for key, models in tables.items():
        if models:
            known = gateway["config"]["properties"][key]
            known = known["items"] if known["type"] == "array" else known
            assert known["properties"].keys() == {name for model in models for name in model.model_fields}, key
            assert known["additionalProperties"] is False


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the models in a type such as tuple[Rule, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for each in get_args(annotation) for model in models_in(each)]


def with_strings(values: Any, schema: dict[str, Any], text: str) -> Any:
    """Return values in which each string is replaced by a text that the schema accepts there."""
    if isinstance(values, dict):
        known = schema.get("properties", {})
        return {key: with_strings(each, known.get(key, {}), text) for key, each in values.items()}
    if isinstance(values, str) and schema and Draft7Validator(schema).is_valid(text):
        return text
    return values


@pytest.mark.parametrize("chart", ["camserve", "camserve-gateway"])
@pytest.mark.parametrize("text", ["1234", "true", "1e3"])
def test_strings_that_look_like_other_types_stay_strings(chart: str, text: str, tmp_path: Path) -> None:
    values = yaml.safe_load((CHARTS / chart / "values.yaml").read_text())
    schema = json.loads((CHARTS / chart / "values.schema.json").read_text())
    made = with_strings({key: each for key, each in values.items() if key != "config"}, schema, text)
    made["fullnameOverride"] = "release"
    assert made["tls"]["secretName"] == made["priorityClassName"] == text
    if chart == "camserve":
        keda = {"prometheus": "http://prometheus", "authentication": text}
        made["autoscaling"] |= {"type": "keda", "keda": made["autoscaling"]["keda"] | keda}
        made["modelVolumes"] = [{"name": text, "volume": {"emptyDir": {}}}]
    else:
        made |= {"secrets": [text], "networkPolicy": {"enabled": False}}
    complete = GATEWAY if chart == "camserve-gateway" else ()
    manifests = rendered(chart, *complete, "--values", written_to(tmp_path, made))
    for kind in manifests.keys() - CUSTOM:
        for manifest in manifests[kind]:
            kubernetes_validate.validate(manifest, "1.37", strict=True)
    for scaler in manifests.get("ScaledObject", []):
        assert scaler["spec"]["triggers"][0]["authenticationRef"] == {"name": text}


def written_to(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "values.yaml"
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")  # PyYAML would not quote 1e3
    return path


@pytest.mark.parametrize(("chart", "port"), [("camserve", "9464"), ("camserve-gateway", "11180")])
def test_annotations_of_pods_may_replace_those_of_the_chart(chart: str, port: str) -> None:
    given = ("--set-string", r"podAnnotations.prometheus\.io/scrape=false")
    for options in ((), given):
        manifests = rendered(chart, *(GATEWAY if chart == "camserve-gateway" else ()), *options)
        found = dict(manifests["Deployment"][0]["spec"]["template"]["metadata"]["annotations"])
        assert re.fullmatch("[0-9a-f]{64}", found.pop("checksum/config"))
        assert found == {"prometheus.io/scrape": "false" if options else "true", "prometheus.io/port": port}


def test_keys_with_null_are_omitted(tmp_path: Path) -> None:
    """Helm removes null from values, but not from those in lists and not from those without a default."""
    rule = {"modality": ["CR"], "body_part": None, "parameters": {"masks": 2000, "cells": None}}
    config = {"max_waiting": None, "pacs": {"commitment": None}, "rules": [rule]}
    options = ("--values", written_to(tmp_path, {"config": config}))
    read = tomllib.loads(configuration(rendered("camserve-gateway", *GATEWAY, *options)))
    assert "max_waiting" not in read
    assert read["pacs"].keys() == {"ae_title", "address"}
    assert read["rules"] == [{"modality": ["CR"], "parameters": {"masks": 2000}}]


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
    options = ("--values", written_to(tmp_path, {"config": config}))
    read = tomllib.loads(configuration(rendered("camserve-gateway", *GATEWAY, *options)))
    assert {key: read[key] for key in config} == config
    assert isinstance(read["max_object_bytes"], int)
    assert isinstance(read["rules"][0]["target"], int)
    assert math.isclose(read["rules"][0]["window"][1], 4096.5)
