"""What docs/pacs.md says of Orthanc, done: a process of its own, in a network of its own. FOLDER holds deploy/orthanc.

The commands are those of the page, but for the model, which is a quick one. Prints what went well, line by line.
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
import time
import urllib.request
from pathlib import Path
from typing import Any

import pydicom

import camserve
import camserve_dicom
from tests.dicom.gateways import ROOT, Spooled
from tests.dicom.pacs import image, send, until

ORTHANC = "http://127.0.0.1:8042"
MODEL = '[[models]]\nname = "tiny"\nsource = "python:tests.nets:tiny_cnn"\ninput_size = [32, 32]\nbatch_size = 2\n'
PORTS = {"Orthanc orthanc": (8042, 4242), "camserve serve": (50051,), "dicom gateway": (11112, 11180)}


def get(path: str, data: bytes | None = None, **headers: str) -> bytes:
    """From Orthanc, or to it."""
    with urllib.request.urlopen(urllib.request.Request(f"{ORTHANC}{path}", data, headers), timeout=30) as answer:
        return bytes(answer.read())


def listens(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


class Folder:
    """Where the commands run, and what of them is still running."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "tiny.toml").write_text(MODEL)
        config = folder / "gateway.toml"
        config.write_text(config.read_text() + 'check = "insertion>=0"\n')

    def run(self, command: str) -> str:
        """One of the page's. With & it is left running, once it listens."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
        if not command.endswith("&"):
            return subprocess.run(
                command, shell=True, cwd=self._folder, env=env, check=True, capture_output=True, text=True, timeout=60
            ).stdout
        name = next(name for name in PORTS if name in command)
        command = command.removesuffix("&").replace("camserve serve", "camserve serve --config tiny.toml")
        with (self._folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                ["bash", "-c", f"exec {command}"], cwd=self._folder, env=env, stdout=log, stderr=log
            )
        until(lambda: all(map(listens, PORTS[name])), 120)
        if name == "camserve serve":
            with camserve.Client("127.0.0.1:50051", timeout=120) as client:
                client.models()
        return ""

    def stop(self, name: str, by: signal.Signals = signal.SIGTERM) -> int:
        """Its exit status."""
        process = self._running.pop(name)
        process.send_signal(by)
        return process.wait(60)

    def stop_all(self) -> None:
        for process in self._running.values():
            process.kill()
            process.wait(60)


def results(source: str) -> dict[str, pydicom.Dataset]:
    """What Orthanc has of an object's results by QIDO and WADO, by modality."""
    found = {}
    for modality in ("OT", "SR"):
        query = f"/dicom-web/instances?Modality={modality}&includefield=SOPInstanceUID"
        for each in json.loads(get(query, Accept="application/dicom+json")):
            study, series, instance = (each[tag]["Value"][0] for tag in ("0020000D", "0020000E", "00080018"))
            [dataset] = retrieved(f"/dicom-web/studies/{study}/series/{series}/instances/{instance}")
            if source in str(dataset):
                assert modality not in found, "each result once"
                found[modality] = dataset
    return found


def retrieved(path: str) -> list[pydicom.Dataset]:
    request = urllib.request.Request(
        f"{ORTHANC}{path}", headers={"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        whole = b"Content-Type: " + answer.headers["Content-Type"].encode() + b"\r\n\r\n" + answer.read()
    parts = email.message_from_bytes(whole).get_payload()
    return [pydicom.dcmread(io.BytesIO(part.get_payload(decode=True))) for part in parts]  # type: ignore[union-attr, arg-type]


def both(number: int) -> dict[str, pydicom.Dataset]:
    """The results of that image, once both are there."""
    found: dict[str, Any] = {}

    def there() -> bool:
        found.update(results(str(image(number).SOPInstanceUID)))
        return len(found) == 2

    until(there, 120)
    return found


def count() -> int:
    return len(json.loads(get("/instances")))


def main(folder: Path) -> None:
    commands = re.findall(r"^\$ (.*)$", section("Set-up with Orthanc, step by step"), re.MULTILINE)
    commands = [each for each in commands if not each.startswith(("apt-get", "pip", "cd"))]
    image(0).save_as(folder / "image.dcm", enforce_file_format=True)
    here = Folder(folder)
    try:
        for command in commands:
            said = here.run(command)
            if "curl" in command and "health" in command:
                assert json.loads(said)["status"] == "serving", said
        print("the page's commands run")
        seen = Spooled(folder / "spool", "127.0.0.1:11112, monitored on 127.0.0.1:11180")
        found = both(0)
        (folder / "overlay.png").write_bytes(preview(found["OT"]))
        with camserve.Client("127.0.0.1:50051") as client:
            made = camserve_dicom.explain(client, folder / "image.dcm", check="insertion>=0").objects
        assert found == {"OT": made["sc"], "SR": made["sr"]}
        print("results read back are those that the same image has here")
        until(lambda: seen.events().count("committed") == 1 and seen.idle())
        print("Orthanc has committed itself")

        # A modality that sends to Orthanc, and a result that is sent to the gateway by mistake.
        assert send("127.0.0.1:4242", image(1), called="ORTHANC") == [0]
        both(1)
        [overlay] = json.loads(get("/tools/lookup", str(found["OT"].SOPInstanceUID).encode()))
        get("/modalities/gateway/store", overlay["ID"].encode())
        until(lambda: "own" in [line.get("reason") for line in seen.audit()] and seen.idle())
        time.sleep(2)
        assert count() == 6, "two images, with two results each"
        print("no loop")

        here.stop("Orthanc orthanc")
        assert send("127.0.0.1:11112", image(2), calling="ORTHANC") == [0]
        until(lambda: seen.entries("outbox"), 60)
        here.stop("dicom gateway", signal.SIGKILL)
        here.run("Orthanc orthanc.json &")
        here.run("camserve dicom gateway --config gateway.toml &")
        both(2)
        until(lambda: seen.events().count("committed") == 3 and seen.idle(), 60)
        assert count() == 8, "and the results of the third, which came by another way"
        print("Orthanc was down, the gateway killed, and nothing is lost or double")

        assert here.stop("dicom gateway") == 0
        config = folder / "gateway.toml"
        stow = 'stow_url = "http://127.0.0.1:8042/dicom-web/studies"'
        config.write_text(config.read_text().replace('address = "127.0.0.1:4242"', stow))
        here.run("camserve dicom gateway --config gateway.toml &")
        assert send("127.0.0.1:11112", image(3), calling="ORTHANC") == [0]
        both(3)
        until(seen.idle)
        assert seen.dead() == []
        print("the same by STOW-RS")
    finally:
        here.stop_all()


def preview(overlay: pydicom.Dataset) -> bytes:
    [found] = json.loads(get("/tools/lookup", str(overlay.SOPInstanceUID).encode()))
    return get(f"/instances/{found['ID']}/preview", Accept="image/png")


def section(title: str) -> str:
    page = (ROOT / "docs" / "pacs.md").read_text(encoding="utf-8")
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
