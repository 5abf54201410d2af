"""The spool: what is under way, as folders on disk. An object's entry is a folder, and its stage the folder it lies in.

    incoming/  being written or deleted; emptied at the start
    inbox/     to be explained
    outbox/    explained; results/ are to be stored, but for those named so, sent/ are stored
    stored/    all stored; the PACS is to commit itself to them
    dead/      given up; reason.json says why

A step on is one rename, after all that it rests on is on the disk. So whenever the process is killed, an entry lies in
one stage, whole, and its step is done again.
"""

from __future__ import annotations

import fcntl
import hmac
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from camserve_dicom.gateway.config import ConfigError

__all__ = ["Spool", "Stage", "load", "move_file", "save"]


class Stage(Enum):
    """Where an entry is."""

    inbox = "inbox"
    outbox = "outbox"
    stored = "stored"
    dead = "dead"


class Spool:
    """The folders below `root`, for this process alone. Raises ConfigError where that cannot be."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # Set when an entry comes into a stage.
        self.arrived = {stage: threading.Event() for stage in Stage}
        self._incoming = root / "incoming"
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if root.stat().st_mode & 0o077:
                raise ConfigError(f"spool: others can look into {root}; chmod it to 0700")
            for each in (self._incoming, *map(self.folder, Stage)):
                each.mkdir(mode=0o700, exist_ok=True)
            self._lock = _locked(root / "lock")
            self._key = self._read_key()
            for left in self._incoming.iterdir():
                shutil.rmtree(left)
        except BlockingIOError as error:
            raise ConfigError(f"spool: another gateway works in {root}") from error
        except OSError as error:
            raise ConfigError(f"spool: {error}") from error

    def close(self) -> None:
        """Lets another process have it."""
        os.close(self._lock)

    def folder(self, stage: Stage) -> Path:
        """Of all entries of the stage."""
        return self.root / stage.value

    def name(self, uid: str) -> str:
        """What an object is called here and in the audit trail: a hash of its UID that needs the key to be made."""
        return hmac.digest(self._key, uid.encode(), "sha256").hex()[:32]

    def entries(self, stage: Stage) -> list[Path]:
        """Those of the stage, the oldest first."""
        with os.scandir(self.folder(stage)) as found:
            dated = [(since, Path(each)) for each in found if (since := _changed(Path(each))) is not None]
        return [entry for _, entry in sorted(dated)]

    def count(self, stage: Stage) -> int:
        """How many entries are in the stage."""
        return sum(1 for _ in self.folder(stage).iterdir())

    def changed(self, stage: Stage) -> Iterator[tuple[Path, float]]:
        """Each entry of the stage, and since when it is there or thereabouts, in seconds of Unix time."""
        for entry in self.entries(stage):
            if (since := _changed(entry)) is not None:
                yield entry, since

    def free_bytes(self) -> int:
        """What the disk has left."""
        return shutil.disk_usage(self.root).free

    def take(self, name: str, files: Mapping[str, bytes]) -> bool:
        """Puts an object into the inbox, for good. False where it is under way already."""
        if any((self.folder(stage) / name).exists() for stage in (Stage.inbox, Stage.outbox, Stage.stored)):
            _sync(self.folder(Stage.inbox))  # whoever put it there may not have come to that yet
            return False
        new = self._aside(name)
        try:
            new.mkdir(mode=0o700)
            for file, data in files.items():
                _write(new / file, data)
            _sync(new)
            new.rename(self.folder(Stage.inbox) / name)
        except BaseException as error:
            shutil.rmtree(new, ignore_errors=True)
            if (self.folder(Stage.inbox) / name).exists():  # somebody sent it at the same time
                return False
            raise error
        _sync(self.folder(Stage.inbox))
        self.arrived[Stage.inbox].set()
        return True

    def move(self, entry: Path, stage: Stage) -> Path:
        """Brings an entry to another stage. What it rests on must be on the disk."""
        new = self.folder(stage) / entry.name
        if new.exists():  # an earlier one that was given up
            self.remove(new)
        entry.rename(new)
        _sync(new.parent)
        _sync(entry.parent)
        self.arrived[stage].set()
        return new

    def remove(self, entry: Path) -> None:
        """Deletes an entry, wholly or not at all."""
        aside = self._aside(entry.name)
        entry.rename(aside)
        _sync(entry.parent)
        shutil.rmtree(aside)

    def _aside(self, name: str) -> Path:
        return self._incoming / f"{name}.{secrets.token_hex(4)}"

    def _read_key(self) -> bytes:
        path = self.root / "key"
        if not path.exists():
            new = self.root / "key.new"
            new.unlink(missing_ok=True)
            _write(new, secrets.token_bytes(32))
            new.rename(path)
            _sync(self.root)
        return path.read_bytes()


def save(path: Path, data: bytes | Mapping[str, Any]) -> None:
    """Writes a file of an entry, wholly or not at all; a mapping as JSON."""
    content = data if isinstance(data, bytes) else json.dumps(data, ensure_ascii=False).encode()
    path.parent.mkdir(mode=0o700, exist_ok=True)
    new = path.with_name(f".{path.name}")
    new.unlink(missing_ok=True)
    _write(new, content)
    new.rename(path)
    _sync(path.parent)
    _sync(path.parent.parent)


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote of a mapping; nothing where it did not."""
    try:
        return dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return {}


def move_file(path: Path, new: Path) -> None:
    """Renames a file of an entry, for good; makes the folder if need be."""
    new.parent.mkdir(mode=0o700, exist_ok=True)
    path.rename(new)
    for folder in {new.parent, path.parent, new.parent.parent}:
        _sync(folder)


def _locked(path: Path) -> int:
    """A file descriptor that nobody else has as long as it is open. Raises BlockingIOError where somebody does."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
    return file


def _write(path: Path, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(file, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def _sync(folder: Path) -> None:
    """Makes what was renamed in a folder outlive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _changed(entry: Path) -> float | None:
    """When the entry was received or, later, given up; None where it is gone."""
    for file in ("reason.json", "source.dcm"):
        try:
            return min((entry / file).stat().st_mtime, time.time())
        except (FileNotFoundError, NotADirectoryError):
            continue
    return None
