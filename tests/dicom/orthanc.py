"""The set-up with Orthanc that docs/pacs.md describes, executed command by command.

The test runs this module as a process in a network namespace of its own: `python -m tests.dicom.orthanc FOLDER`. FOLDER
is a copy of deploy/orthanc. The commands are those of the page, except that the server has a small model and the
gateway requests one metric, also the output pdf, and the report of the study. The process prints a line after each
part.
"""

from __future__ import annotations

import email
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pydicom

import camserve
import camserve_dicom
from tests.dicom.gateways import Spooled
from tests.dicom.pacs import image, send, wait_until
from tests.dicom.test_study_report import references
from tests.processes import LIMIT_S, ROOT, environment

ORTHANC = "http://127.0.0.1:8042"
MODEL = '[[models]]\nname = "tiny"\nsource = "python:tests.nets:tiny_cnn"\ninput_size = [32, 32]\nbatch_size = 2\n'
PORTS = {"Orthanc orthanc": (8042, 4242), "camserve serve": (50051,), "dicom gateway": (11112, 11180)}
# The study is complete when the test says so, by a shorter time.
ADDED = """
metrics = ["average-gain"]
check = "average-gain>=0"

[study]
quiet_s = 3600

[[flags]]
min_probability = 0.0
"""
# The requested outputs, by Modality.
KINDS = {"OT": "sc", "SR": "sr", "DOC": "pdf"}
GATEWAY_AND_ORTHANC = ("camserve dicom gateway --config gateway.toml &", "Orthanc orthanc.json &")


def get(path: str, data: bytes | None = None, **headers: str) -> bytes:
    """Return Orthanc's response to a GET request, or to a POST request with data."""
    with urllib.request.urlopen(urllib.request.Request(f"{ORTHANC}{path}", data, headers), timeout=LIMIT_S) as response:
        return bytes(response.read())


def listens(port: int) -> bool:
    """Return True if a process listens on a port of the loopback address."""
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


def loaded(client: camserve.Client) -> bool:
    """Return False while the server loads its models, for longer than the client repeats calls on a slow machine."""
    try:
        return bool(client.models())
    except camserve.Unavailable:
        return False


class Folder:
    """The working directory of the commands, and the processes that run in the background."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "tiny.toml").write_text(MODEL)
        config = folder / "gateway.toml"
        text = config.read_text().replace('outputs = ["sc", "sr"]', f"outputs = {json.dumps([*KINDS.values()])}")
        config.write_text(text + ADDED)

    def run(self, command: str) -> str:
        """Run a command of the page until it ends, and return its output. With & it continues in the background."""
        if not command.endswith("&"):
            return subprocess.run(
                command,
                shell=True,
                cwd=self._folder,
                env=self._environment(),
                check=True,
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
            ).stdout
        self.start(command)
        self.wait_for(command)
        return ""

    def start(self, command: str) -> None:
        """Start a command that ends with & and do not wait until it listens."""
        name = self._name(command)
        command = command.removesuffix("&").replace("camserve serve", "camserve serve --config tiny.toml")
        with (self._folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                ["bash", "-c", f"exec {command}"], cwd=self._folder, env=self._environment(), stdout=log, stderr=log
            )

    def wait_for(self, command: str) -> None:
        """Wait until the process of a command listens on its ports, and until a server has loaded its model."""
        name = self._name(command)

        def ready() -> bool:
            assert self._running[name].poll() is None, f"{name} ended"
            return all(map(listens, PORTS[name]))

        wait_until(ready, 0.1)
        if name == "camserve serve":
            with camserve.Client("127.0.0.1:50051", timeout=LIMIT_S) as client:
                wait_until(lambda: loaded(client), 0.1)

    @staticmethod
    def _name(command: str) -> str:
        return next(name for name in PORTS if name in command)

    @staticmethod
    def _environment() -> dict[str, str]:
        return environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")

    def stop(self, name: str, by: signal.Signals = signal.SIGTERM) -> int:
        """Stop a process and return its exit status."""
        process = self._running.pop(name)
        process.send_signal(by)
        return process.wait(LIMIT_S)

    def stop_all(self) -> None:
        """Kill all processes that still run."""
        for process in self._running.values():
            process.kill()
            process.wait(LIMIT_S)


def results(number: int) -> dict[str, pydicom.Dataset]:
    """Return the results of an image by modality, which Orthanc finds by QIDO-RS and returns by WADO-RS.

    All results must be there already.
    """
    source, found = str(image(number).SOPInstanceUID), {}
    for modality in KINDS:
        for dataset in instances(modality):
            if source in str(dataset) and dataset.SeriesNumber < 9008:
                assert modality not in found, "Orthanc has each result once"
                found[modality] = dataset
    assert found.keys() == KINDS.keys()
    return found


def instances(modality: str) -> list[pydicom.Dataset]:
    """Return all objects with a modality."""
    query = f"/dicom-web/instances?Modality={modality}&includefield=SOPInstanceUID"
    found = json.loads(get(query, Accept="application/dicom+json"))
    uids = [[each[tag]["Value"][0] for tag in ("0020000D", "0020000E", "00080018")] for each in found]
    return [
        dataset
        for study, series, instance in uids
        for dataset in retrieve(f"/dicom-web/studies/{study}/series/{series}/instances/{instance}")
    ]


def retrieve(path: str) -> list[pydicom.Dataset]:
    """Return the objects of a WADO-RS response."""
    request = urllib.request.Request(
        f"{ORTHANC}{path}", headers={"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}
    )
    with urllib.request.urlopen(request, timeout=LIMIT_S) as response:
        message = b"Content-Type: " + response.headers["Content-Type"].encode() + b"\r\n\r\n" + response.read()
    parts: list[Any] = email.message_from_bytes(message).get_payload()  # type: ignore[assignment]
    return [pydicom.dcmread(io.BytesIO(part.get_payload(decode=True))) for part in parts]


def instance_count() -> int:
    """Return the number of objects in Orthanc."""
    return len(json.loads(get("/instances")))


def main(folder: Path) -> None:
    """Run the commands of the page and check what Orthanc has."""
    commands = re.findall(r"^\$ (.*)$", section("Set-up with Orthanc, step by step"), re.MULTILINE)
    commands = [each for each in commands if not each.startswith(("apt-get", "pip", "cd"))]
    image(0).save_as(folder / "image.dcm", enforce_file_format=True)
    here = Folder(folder)
    gateway = Spooled(folder / "spool", "127.0.0.1:11112, monitored on 127.0.0.1:11180")

    def wait_for_commitments(number: int) -> None:
        wait_until(lambda: gateway.events().count("committed") == number and gateway.idle(), 0.1)

    try:
        background = [command for command in commands if command.endswith("&") and "gateway" not in command]
        for command in background:  # they do not depend on each other
            here.start(command)
        for command in background:
            here.wait_for(command)
        for command in commands:
            if command not in background:
                output = here.run(command)
                if "curl" in command and "health" in command:
                    assert json.loads(output)["status"] == "serving", output
        print("the page's commands run")
        wait_for_commitments(1)
        found = results(0)
        (folder / "overlay.png").write_bytes(preview(found["OT"]))
        with camserve.Client("127.0.0.1:50051", timeout=LIMIT_S) as client:
            source = folder / "image.dcm"
            settings: dict[str, Any] = {"metrics": ["average-gain"], "check": "average-gain>=0"}
            made = camserve_dicom.explain(client, source, outputs=[*KINDS.values()], **settings).objects
        assert found == {modality: made[kind] for modality, kind in KINDS.items()}
        print("results in Orthanc equal those of camserve_dicom.explain")
        print("Orthanc reports the commitment")

        # A modality sends to Orthanc, and Orthanc sends a result to the gateway.
        assert send("127.0.0.1:4242", image(1), called="ORTHANC") == [0]
        wait_for_commitments(2)
        results(1)
        [overlay] = json.loads(get("/tools/lookup", str(found["OT"].SOPInstanceUID).encode()))
        get("/modalities/gateway/store", overlay["ID"].encode())  # returns when the gateway has answered
        assert "own" in [line.get("reason") for line in gateway.audit()]
        assert gateway.idle(), "the gateway drops its own result"
        assert instance_count() == 8, "two images with three results each"
        print("the gateway drops its own results")

        here.stop("Orthanc orthanc")
        assert send("127.0.0.1:11112", image(2), calling="ORTHANC") == [0]
        wait_until(lambda: gateway.entries("outbox"), 0.1)
        here.stop("dicom gateway", signal.SIGKILL)
        for command in GATEWAY_AND_ORTHANC:
            here.start(command)
        for command in GATEWAY_AND_ORTHANC:
            here.wait_for(command)
        wait_for_commitments(3)
        results(2)
        assert instance_count() == 11, "the results of the third image, which was not sent to Orthanc"
        print("nothing is lost or stored twice after Orthanc was down and the gateway was killed")

        assert here.stop("dicom gateway") == 0
        config = folder / "gateway.toml"
        text = config.read_text()
        config.write_text(text.replace("quiet_s = 3600", "quiet_s = 0.5"))
        here.run(GATEWAY_AND_ORTHANC[0])
        wait_for_commitments(4)
        [report] = [each for each in instances("SR") if each.SeriesNumber == 9008]
        [selection] = instances("KO")
        images = {str(image(number).SOPInstanceUID) for number in range(3)}
        uids = {str(each.SOPInstanceUID) for number in range(3) for each in results(number).values()}
        assert (references(report), references(selection)) == (images | uids, images)
        assert instance_count() == 13
        assert here.stop("dicom gateway") == 0
        config.write_text(text)
        print("Orthanc has the report of the study and the flagged images")

        stow = 'stow_url = "http://127.0.0.1:8042/dicom-web/studies"'
        config.write_text(config.read_text().replace('address = "127.0.0.1:4242"', stow))
        here.run(GATEWAY_AND_ORTHANC[0])
        assert send("127.0.0.1:11112", image(3), calling="ORTHANC") == [0]
        wait_until(gateway.idle, 0.1)
        results(3)
        assert gateway.dead() == []
        print("STOW-RS stores the results, too")
    finally:
        here.stop_all()


def preview(overlay: pydicom.Dataset) -> bytes:
    """Return Orthanc's PNG preview of an object."""
    [found] = json.loads(get("/tools/lookup", str(overlay.SOPInstanceUID).encode()))
    return get(f"/instances/{found['ID']}/preview", Accept="image/png")


def section(title: str) -> str:
    """Return a section of docs/pacs.md."""
    page = (ROOT / "docs" / "pacs.md").read_text(encoding="utf-8")
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
