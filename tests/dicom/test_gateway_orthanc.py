"""The gateway with a camserve server and a real Orthanc, set up as docs/pacs.md describes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

from tests.processes import ROOT, completed

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
# Debian's Orthanc listens on all addresses of the machine, whatever its configuration is. The namespace hides it.
NAMESPACE = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


def missing_requirement() -> str:
    """Return the reason why the test cannot run on this machine, or an empty text."""
    if not (shutil.which("Orthanc") and PLUGIN.exists()):
        return "needs Debian's orthanc and orthanc-dicomweb"
    if not shutil.which("curl"):
        return "needs curl"
    if not shutil.which("unshare") or subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode:
        return "needs the right to create a network namespace"
    return ""


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_requirement()), reason=missing_requirement() or "none")
def test_set_up_with_orthanc(tmp_path: Path) -> None:
    folder = tmp_path / "orthanc"
    shutil.copytree(ROOT / "deploy" / "orthanc", folder)
    ran = completed([*NAMESPACE, sys.executable, "-m", "tests.dicom.orthanc", str(folder)], cwd=ROOT)
    logs = "\n".join(path.read_text(errors="replace")[-3000:] for path in folder.glob("*.log"))
    assert ran.returncode == 0, ran.stdout + ran.stderr + logs
    assert ran.stdout.splitlines() == [
        "the page's commands run",
        "results in Orthanc equal those of camserve_dicom.explain",
        "Orthanc reports the commitment",
        "the gateway drops its own results",
        "nothing is lost or stored twice after Orthanc was down and the gateway was killed",
        "Orthanc has the report of the study and the flagged images",
        "STOW-RS stores the results, too",
    ]
    with PIL.Image.open(folder / "overlay.png") as overlay:
        assert overlay.mode == "RGB"
