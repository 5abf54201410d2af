"""Checks that deploy/ray agrees with Kubernetes, with Ray Serve and with the server."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from camserve_ray.serving import application
from camserve_ray.serving.application import LOGGING, Scale
from camserve_server.config import Config, read_config
from camserve_server.errors import ConfigError
from camserve_server.service.listeners import SERVICE
from tests.processes import ROOT
from tests.test_deploy import image_environment

FILE = ROOT / "deploy" / "ray" / "rayservice.yaml"
MANIFESTS = {each["kind"]: each for each in yaml.safe_load_all(FILE.read_text(encoding="utf-8"))}
SPEC = MANIFESTS["RayService"]["spec"]
CLUSTER = SPEC["rayClusterConfig"]
HEAD = CLUSTER["headGroupSpec"]
[WORKER] = CLUSTER["workerGroupSpecs"]
SERVE = yaml.safe_load(SPEC["serveConfigV2"])
[APPLICATION] = SERVE["applications"]
# The fields of the API ray.io/v1 that this manifest may use.
FIELDS = {
    "RayService.spec": {"serveConfigV2", "rayClusterConfig", "upgradeStrategy", "serveService"},
    "rayClusterConfig": {"rayVersion", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs", "authOptions"},
    "headGroupSpec": {"rayStartParams", "template", "serviceType", "headService"},
    "workerGroupSpecs": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}


def container(group: dict[str, Any]) -> dict[str, Any]:
    [only] = group["template"]["spec"]["containers"]
    found: dict[str, Any] = only
    return found


def cpus(group: dict[str, Any]) -> int:
    return int(container(group)["resources"]["limits"]["cpu"])


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration file of the pods, in the environment of the image."""
    for name, value in image_environment().items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "camserve.toml"
    path.write_text(MANIFESTS["ConfigMap"]["data"]["camserve.toml"])
    return path


def test_manifests_match_the_api_of_kubernetes() -> None:
    for kind in ("ConfigMap", "Service", "NetworkPolicy"):
        kubernetes_validate.validate(MANIFESTS[kind], "1.37", strict=True)
    for group in (HEAD, WORKER):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, "1.37", strict=True)


def test_ray_service_has_the_fields_of_its_api() -> None:
    assert MANIFESTS["RayService"]["apiVersion"] == "ray.io/v1"
    parts = [("RayService.spec", SPEC), ("rayClusterConfig", CLUSTER), ("headGroupSpec", HEAD)]
    for name, value in [*parts, ("workerGroupSpecs", WORKER)]:
        assert set(value) <= FIELDS[name]
    for group in (HEAD, WORKER):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert WORKER["minReplicas"] <= WORKER["replicas"] <= WORKER["maxReplicas"]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"ray=={CLUSTER['rayVersion']}" in pinned


def test_configuration_of_serve_is_valid() -> None:
    ServeDeploySchema.model_validate(SERVE)
    with pytest.raises(ValidationError):
        ServeDeploySchema.model_validate({**SERVE, "grpc_options": {"port": "none"}})
    for path in (APPLICATION["import_path"], *SERVE["grpc_options"]["grpc_servicer_functions"]):
        module, _, name = path.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_application_is_built_from_the_arguments(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[tuple[Config, Scale]] = []
    monkeypatch.setattr(application, "application", lambda *arguments: built.append(arguments))
    [mount] = container(WORKER)["volumeMounts"]
    assert APPLICATION["args"]["config"] == f"{mount['mountPath']}/camserve.toml"
    application.build({**APPLICATION["args"], "config": str(config)})
    [(settings, scale)] = built
    assert scale == Scale((2, 8), rows_per_replica=5_000)
    assert settings.listen == f"0.0.0.0:{SERVE['grpc_options']['port']}"
    assert settings.threads == cpus(WORKER), "a pod has the CPUs of one replica"
    assert isinstance(scale.replicas, tuple)
    assert scale.replicas == (WORKER["minReplicas"], WORKER["maxReplicas"])
    assert settings.grace_s < HEAD["template"]["spec"]["terminationGracePeriodSeconds"]


def test_ports_probes_and_selectors_fit_together(config: Path) -> None:
    port = int(read_config(config).listen.rpartition(":")[2])
    named = {each["name"]: each["containerPort"] for each in container(WORKER)["ports"]}
    assert named == {"grpc": port}
    probe = container(WORKER)["readinessProbe"]["grpc"]
    assert probe == {"port": port, "service": SERVICE}
    service = MANIFESTS["Service"]["spec"]
    assert service["ports"] == [{"name": "grpc", "port": port, "targetPort": "grpc"}]
    assert service["selector"].items() <= WORKER["template"]["metadata"]["labels"].items()
    assert not service["selector"].items() <= HEAD["template"]["metadata"]["labels"].items()
    selected = MANIFESTS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items()
    assert all(selected <= group["template"]["metadata"]["labels"].items() for group in (HEAD, WORKER))
    user = HEAD["template"]["spec"]["securityContext"]["runAsUser"]
    assert f"\nUSER {user}:{user}\n" in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_callers_reach_the_proxies_only_and_nodes_reach_each_other_on_all_ports() -> None:
    """The server of each replica has a port that the system selects."""
    policy = MANIFESTS["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    callers, nodes = policy["ingress"]
    assert callers["ports"] == [{"port": "grpc"}]
    [caller] = callers["from"]
    assert caller == {"podSelector": {"matchLabels": {"camserve/client": "true"}}}
    assert not caller["podSelector"]["matchLabels"].items() <= WORKER["template"]["metadata"]["labels"].items()
    assert "ports" not in nodes
    assert nodes["from"][0] == {"podSelector": policy["podSelector"]}


def test_serve_writes_no_lines_for_calls() -> None:
    assert SERVE["logging_config"] == {"enable_access_log": LOGGING.enable_access_log}


def test_unknown_argument_is_refused(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"args: 'replica' is unknown; expected some of config, gpus"):
        application.build({"config": str(config), "replica": 2})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"replicas": "2"}, "args.replicas: '2'; expected a number from 1"),
        ({"replicas": [8, 2]}, r"args.replicas: \(8, 2\); expected"),
        ({"replicas": [1, 2, 3]}, r"args.replicas: \(1, 2, 3\); expected"),
        ({"replicas": 0}, "args.replicas: 0; expected"),
        ({"gpus": "1"}, "args.gpus: '1'; expected a whole number"),
        ({"gpus": 1.5}, "args.gpus: 1.5; expected a whole number"),
        ({"gpus": math.nan}, "args.gpus: nan; expected a whole number"),
        ({"replicas": [1, 2], "rows_per_replica": 0}, "args.rows_per_replica: 0; expected a number from 1"),
        ({"config": 3}, "args.config: 3; expected the path of a file"),
    ],
    ids=str,
)
def test_wrong_argument_is_refused(config: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        application.build({"config": str(config), **arguments})


@pytest.mark.parametrize(("gpus", "rows"), [(0, 5_000), (0.5, 25_000)])
def test_replicas_take_their_share_of_the_cluster(config: Path, gpus: float, rows: int) -> None:
    built = application.build({"config": str(config), "replicas": [1, 2], "gpus": gpus})
    deployment = vars(built)["_bound_deployment"]
    assert deployment.ray_actor_options == {"num_cpus": cpus(WORKER), "num_gpus": gpus}
    policy = deployment._deployment_config.autoscaling_config.policy
    assert policy.policy_kwargs == {"rows_per_replica": rows}


@pytest.mark.filterwarnings("error:`look_back_period_s`:FutureWarning")
def test_autoscaling_is_valid_for_later_versions_of_ray(config: Path) -> None:
    application.build({"config": str(config), "replicas": [1, 2], "gpus": 0.5, "rows_per_replica": None})
