"""Checks that deploy/kubernetes and the Dockerfile agree with the Kubernetes API and the server; `camserve health`."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import kubernetes_validate
import pytest
import trustme
import yaml
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from typer.testing import CliRunner

from camserve_cli.app import app
from camserve_server.config import Config, ModelConfig, TLSConfig, read_config
from camserve_server.service.listeners import SERVICE
from camserve_server.service.server import Server
from tests.conftest import serving
from tests.credentials import certify
from tests.processes import CAMSERVE, completed, program

ROOT = Path(__file__).parent.parent
BASE = ROOT / "deploy" / "kubernetes" / "base"
KUBECTL = program("kubectl")
Manifest = dict[str, Any]


def loaded(path: Path) -> Manifest:
    manifest: Manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
    return manifest


KUSTOMIZATION = loaded(BASE / "kustomization.yaml")
MANIFESTS = {path.stem: loaded(path) for path in sorted(BASE.glob("*.yaml")) if path.stem != "kustomization"}


def pod() -> Manifest:
    spec: Manifest = MANIFESTS["deployment"]["spec"]["template"]["spec"]
    return spec


def container() -> Manifest:
    [only] = pod()["containers"]
    found: Manifest = only
    return found


def image_environment() -> dict[str, str]:
    return dict(re.findall(r"^ +(CAMSERVE_\w+)=(\S+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Config:
    """Read the configuration as a pod does: from the file and the environment of the image and the deployment."""
    given = {each["name"]: each.get("value", "4") for each in container()["env"]}
    for name, value in {**image_environment(), **given}.items():
        assert name.removeprefix("CAMSERVE_").lower() in Config.model_fields
        monkeypatch.setenv(name, value)
    return read_config(BASE / "camserve.toml")


# ---- the manifests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_match_the_api(name: str) -> None:
    kubernetes_validate.validate(MANIFESTS[name], "1.37", strict=True)


def test_unknown_keys_of_manifests_are_errors() -> None:
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        wrong = {**MANIFESTS["deployment"], "spec": {**MANIFESTS["deployment"]["spec"], "replica": 1}}
        kubernetes_validate.validate(wrong, "1.37", strict=True)


def test_kustomization_lists_all_manifests() -> None:
    assert {Path(name).stem for name in KUSTOMIZATION["resources"]} == MANIFESTS.keys()


@pytest.mark.slow
@pytest.mark.skipif(KUBECTL is None, reason="needs kubectl: make helm")
@pytest.mark.parametrize(
    "which", ["base", "gpu"], ids="for {}".format
)  # without the prefix, pytest would take "gpu" for the marker
def test_output_of_kustomize_matches_the_api(which: str) -> None:
    made = completed([str(KUBECTL), "kustomize", BASE.parent / which]).stdout
    manifests = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(made)}
    for manifest in manifests.values():
        kubernetes_validate.validate(manifest, "1.37", strict=True)
    assert manifests.keys() == {each["kind"] for each in MANIFESTS.values()} | {"ConfigMap"}
    assert manifests["ConfigMap"]["data"]["camserve.toml"] == (BASE / "camserve.toml").read_text(encoding="utf-8")
    spec = manifests["Deployment"]["spec"]["template"]["spec"]
    assert spec["volumes"][0]["configMap"]["name"] == manifests["ConfigMap"]["metadata"]["name"]
    [made_container] = spec["containers"]
    known = {each["name"] for each in made_container["env"]}
    assert {each["name"] for each in container()["env"]} <= known
    assert (
        ("CAMSERVE_DEVICE" in known) == ("nvidia.com/gpu" in made_container["resources"]["limits"]) == (which == "gpu")
    )
    assert made_container["resources"]["limits"]["cpu"] == "4", "the number of threads follows this limit"


# ---- the manifests and the server ------------------------------------------------------------------------------------


def test_ports_are_those_of_the_server(config: Config) -> None:
    ports = {each["name"]: each["containerPort"] for each in container()["ports"]}
    listens = {"grpc": config.listen, "health": config.health_listen, "metrics": config.metrics_listen}
    assert {name: f"0.0.0.0:{port}" for name, port in ports.items()} == listens
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container()[probe]["grpc"]["port"] == ports["health"]
    assert container()["readinessProbe"]["grpc"]["service"] == SERVICE
    assert "service" not in container()["livenessProbe"]["grpc"], "a server that loads its models is alive"
    assert MANIFESTS["deployment"]["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"] == "9464"
    assert ports["metrics"] == 9464
    allowed = [port["port"] for rule in MANIFESTS["networkpolicy"]["spec"]["ingress"] for port in rule["ports"]]
    assert [*allowed, MANIFESTS["service"]["spec"]["ports"][0]["targetPort"]] == ["grpc", "metrics", "grpc"]


def test_termination_period_allows_draining(config: Config) -> None:
    before = container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert before + config.grace_s + 5 <= pod()["terminationGracePeriodSeconds"]


def test_files_of_the_configuration_are_mounted(config: Config) -> None:
    mounted = {each["mountPath"]: each["name"] for each in container()["volumeMounts"]}
    assert config.tls is not None
    for path in (config.tls.certificate, config.tls.key, config.tls.client_ca):
        assert path is not None
        assert mounted[str(Path(path).parent)] == "tls"
    [flag, path] = container()["args"]
    assert flag == "--config"
    assert mounted[str(Path(path).parent)] == "config"
    assert KUSTOMIZATION["configMapGenerator"][0]["files"] == [Path(path).name]


def test_user_is_that_of_the_image() -> None:
    user = pod()["securityContext"]["runAsUser"]
    assert f"\nUSER {user}:{user}\n" in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_autoscaler_uses_a_documented_metric() -> None:
    [metric] = MANIFESTS["horizontalpodautoscaler"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert f"| `{name}` | gauge |" in (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert name in (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")


def test_image_does_not_allow_plaintext_beyond_loopback() -> None:
    assert "CAMSERVE_INSECURE" not in image_environment()
    assert image_environment()["CAMSERVE_HEALTH_LISTEN"].startswith("127.0.0.1:")


# ---- camserve health -------------------------------------------------------------------------------------------------


def health(address: str, *options: str) -> tuple[int, str]:
    """Run `camserve health` in this process; return its exit status and its output."""
    result = CliRunner().invoke(app, ["health", "--address", address, *options])
    return result.exit_code, result.output


def test_health_of_a_ready_server(server: Server) -> None:
    ran = completed([*CAMSERVE, "health", "--address", server.address])
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "ready\n", "")


def test_health_of_servers_that_are_not_ready() -> None:
    states = HealthServicer()
    other = grpc.server(ThreadPoolExecutor(1))
    add_HealthServicer_to_server(states, other)
    address = f"127.0.0.1:{other.add_insecure_port('127.0.0.1:0')}"
    other.start()
    try:
        states.set(SERVICE, HealthCheckResponse.NOT_SERVING)
        assert health(address) == (1, "not ready\n")
    finally:
        other.stop(0).wait()
    code, said = health(address, "--timeout", "5")
    assert code == 1
    assert said.startswith(f"error: {address}: UNAVAILABLE")
    assert len(said.splitlines()) == 1


@pytest.mark.slow
def test_health_of_a_server_that_requires_certificates(tmp_path: Path) -> None:
    """The health listener requires no certificate, and the other listener does."""
    ca = trustme.CA()
    for name in ("server", "client"):
        certify(ca, tmp_path, name)
    authority = str(tmp_path / "ca.pem")
    tls = TLSConfig(certificate=str(tmp_path / "server.pem"), key=str(tmp_path / "server.key"), client_ca=authority)
    tiny = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=2)
    config = Config(listen="127.0.0.1:0", health_listen="127.0.0.1:0", tls=tls, models=[tiny])
    with serving(config) as running:
        assert health(running.health_address) == (0, "ready\n")
        own = ("--ca", authority, "--cert", str(tmp_path / "client.pem"), "--key", str(tmp_path / "client.key"))
        assert health(running.address, *own) == (0, "ready\n")
        assert health(running.address, "--ca", authority, "--timeout", "5")[0] == 1
