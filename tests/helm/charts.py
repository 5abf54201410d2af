"""The Helm charts of deploy/helm, as Helm renders them."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from camserve_cli.app import app
from tests.processes import ROOT, completed, program

__all__ = [
    "CHARTS",
    "CUSTOM",
    "GATEWAY",
    "GATEWAY_VALUES",
    "SERVER_VALUES",
    "VALUES",
    "Manifest",
    "configuration",
    "container",
    "helm",
    "in_folder",
    "named",
    "needs_helm",
    "of",
    "pod",
    "refused",
    "rendered",
    "run",
    "written",
]

HELM = program("helm")
CHARTS = ROOT / "deploy" / "helm"
VALUES = sorted(CHARTS.glob("*/ci/*-values.yaml"))
SERVER_VALUES = [path for path in VALUES if path.parent.parent.name == "camserve"]
GATEWAY_VALUES = [path for path in VALUES if path.parent.parent.name == "camserve-gateway"]
# Options that make the gateway's chart complete.
GATEWAY = ("--values", CHARTS / "camserve-gateway" / "ci" / "plaintext-values.yaml")
# Kinds of operators, which the Kubernetes API does not define.
CUSTOM = {"ScaledObject", "ServiceMonitor"}
Manifest = dict[str, Any]

needs_helm = pytest.mark.skipif(HELM is None, reason="needs Helm: make helm")


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Helm with the files of no user."""
    environment = {"PATH": os.defpath, "HOME": "/nonexistent", "HELM_CACHE_HOME": "/nonexistent"}
    return completed([str(HELM), *arguments], env=environment)


@cache
def rendered(chart: str, *arguments: str | Path) -> dict[str, list[Manifest]]:
    """Return the manifests of a release "r" in the namespace "ns", by kind."""
    made = helm("template", "r", CHARTS / chart, "--namespace", "ns", *arguments)
    assert made.returncode == 0, made.stderr
    manifests: dict[str, list[Manifest]] = {}
    for manifest in filter(None, yaml.safe_load_all(made.stdout)):
        manifests.setdefault(manifest["kind"], []).append(manifest)
    return manifests


def of(values: Path, *arguments: str) -> dict[str, list[Manifest]]:
    return rendered(values.parent.parent.name, "--values", values, *arguments)


def named(name: str) -> dict[str, list[Manifest]]:
    """Return the manifests for a file in ci/ of the server's chart."""
    return of(CHARTS / "camserve" / "ci" / f"{name}-values.yaml")


def refused(chart: str, *arguments: str | Path) -> str:
    failed = helm("template", "r", CHARTS / chart, *arguments)
    assert failed.returncode != 0, failed.stdout
    return failed.stderr


def pod(manifests: dict[str, list[Manifest]]) -> Manifest:
    [deployment] = manifests["Deployment"]
    spec: Manifest = deployment["spec"]["template"]["spec"]
    return spec


def container(manifests: dict[str, list[Manifest]]) -> Manifest:
    [only] = pod(manifests)["containers"]
    found: Manifest = only
    return found


def configuration(manifests: dict[str, list[Manifest]]) -> str:
    [config_map] = manifests["ConfigMap"]
    [text] = config_map["data"].values()
    found: str = text
    return found


def in_folder(text: str, folder: Path) -> str:
    """Replace the paths of mounted volumes."""
    return text.replace("/etc/camserve", str(folder)).replace("/models", f"{folder}/models")


def written(manifests: dict[str, list[Manifest]], folder: Path) -> Path:
    path = folder / "camserve.toml"
    path.write_text(in_folder(configuration(manifests), folder), encoding="utf-8")
    return path


def run(*arguments: str | Path, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200", **(env or {})})
