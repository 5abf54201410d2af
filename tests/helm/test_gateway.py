"""The chart of the DICOM gateway agrees with the gateway."""

from __future__ import annotations

import os
import stat
import tomllib
from pathlib import Path

import pytest

from camserve_dicom.gateway.spool import Spool
from tests.helm.charts import (
    CHARTS,
    GATEWAY_VALUES,
    configuration,
    container,
    needs_helm,
    of,
    pod,
    rendered,
    run,
    written,
)
from tests.processes import completed

pytestmark = needs_helm


@pytest.mark.parametrize("values", GATEWAY_VALUES, ids=lambda path: path.stem)
def test_gateway_accepts_the_configuration(values: Path, files: Path) -> None:
    manifests = of(values)
    checked = run("dicom", "gateway", "--config", written(manifests, files), "--check")
    assert (checked.exit_code, checked.stderr) == (0, ""), checked.stderr
    config = tomllib.loads(configuration(manifests))
    ports = {each["name"]: each["containerPort"] for each in container(manifests)["ports"]}
    assert ports == {
        name: int(config[key].split(":")[1]) for name, key in (("dicom", "listen"), ("monitor", "monitor_listen"))
    }
    mounts = {each["name"]: each["mountPath"] for each in container(manifests)["volumeMounts"]}
    assert Path(config["spool"]).parent == Path(mounts["data"]), "fsGroup changes the mode of the volume's root"
    for key in ("ca", "token_file"):
        path = config["server"].get(key)
        assert path is None or str(Path(path).parent) in mounts.values()
    assert config["grace_s"] + 10 <= pod(manifests)["terminationGracePeriodSeconds"]


def test_one_gateway_uses_the_volume() -> None:
    manifests = of(CHARTS / "camserve-gateway" / "ci" / "hospital-values.yaml")
    [deployment], [claim] = manifests["Deployment"], manifests["PersistentVolumeClaim"]
    assert (deployment["spec"]["replicas"], deployment["spec"]["strategy"]) == (1, {"type": "Recreate"})
    assert deployment["spec"]["template"]["metadata"]["labels"]["camserve/client"] == "true"
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep", "backup": "nightly"}
    volumes = {each["name"]: each for each in pod(manifests)["volumes"]}
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    dicom = next(each for each in manifests["Service"] if each["spec"].get("type"))
    assert [port["name"] for port in dicom["spec"]["ports"]] == ["dicom"], "the monitor is plaintext"
    own = ("--values", CHARTS / "camserve-gateway" / "ci" / "hospital-values.yaml")
    other = rendered("camserve-gateway", *own, "--set", "persistence.existingClaim=mine")
    assert "PersistentVolumeClaim" not in other


def test_init_container_restores_the_mode_of_the_spool(tmp_path: Path) -> None:
    """Kubernetes gives the group access to all folders of a volume with fsGroup, which the gateway refuses."""
    [prepare] = pod(of(GATEWAY_VALUES[0]))["initContainers"]
    [variable] = prepare["env"]
    assert variable["value"] == tomllib.loads(configuration(of(GATEWAY_VALUES[0])))["spool"]
    spool = tmp_path / "volume" / "spool"
    for _ in range(2):
        assert completed(prepare["command"], env={**os.environ, variable["name"]: str(spool)}).returncode == 0
        assert stat.S_IMODE(spool.stat().st_mode) & 0o777 == 0o700
        Spool(spool).close()
        spool.chmod(0o2770)
