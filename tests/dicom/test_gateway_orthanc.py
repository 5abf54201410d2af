"""The gateway between a modality, a camserve server and a real Orthanc, as docs/pacs.md sets them up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

from tests.dicom.gateways import ROOT

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
# Debian's Orthanc listens on every address of the machine, whatever it is told: here it sees no other machine.
ALONE = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


def why_not() -> str:
    if not (shutil.which("Orthanc") and PLUGIN.exists()):
        return "needs Debian's orthanc and orthanc-dicomweb"
    if not shutil.which("curl"):
        return "needs curl"
    if not shutil.which("unshare") or subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode:
        return "needs the right to make a network namespace"
    return ""


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=why_not() or "none")
def test_orthanc_as_the_page_sets_it_up(tmp_path: Path) -> None:
    folder = tmp_path / "orthanc"
    shutil.copytree(ROOT / "deploy" / "orthanc", folder)
    ran = subprocess.run(
        [*ALONE, sys.executable, "-m", "tests.dicom.orthanc", str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    logs = "\n".join(path.read_text(errors="replace")[-3000:] for path in folder.glob("*.log"))
    assert ran.returncode == 0, ran.stdout + ran.stderr + logs
    assert ran.stdout.splitlines() == [
        "the page's commands run",
        "results read back are those that the same image has here",
        "Orthanc has committed itself",
        "no loop",
        "Orthanc was down, the gateway killed, and nothing is lost or double",
        "the same by STOW-RS",
    ]
    with PIL.Image.open(folder / "overlay.png") as overlay:
        assert overlay.mode == "RGB"
