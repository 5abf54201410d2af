"""The spool: objects in progress on disk. Each object has an entry, which is a folder inside the folder of its stage.

    incoming/  entries that are being written or deleted; emptied at the start
    inbox/     objects to explain
    outbox/    explained objects: results/ has results to store, sent/ has stored ones
    stored/    objects whose results are all stored and wait for storage commitment
    notify/    objects whose results the PACS has: unsent/ has messages to send to other systems
    worklist/  workitems that the gateway performs, see `performer.Performer`
    dead/      objects that failed permanently; reason.json gives the reason
    studies/   what is known of the images of each study, see `studies.Studies`

The report of a study is an entry, too. It begins in outbox/.

An entry changes its stage by one rename, after all files that it depends on are on the disk. If the process is killed,
each entry is complete and in one stage, and its current step is repeated.
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

__all__ = ["STUDY_FILE", "WORKITEM_FILE", "Spool", "Stage", "move_file", "read_json", "write_file"]


STUDY_FILE = "study.json"
"""File of an entry that is the report of a study. Other entries have source.dcm."""
WORKITEM_FILE = "workitem.json"
"""File of an entry that is a workitem."""


class Stage(Enum):
    """A stage of the spool. The value is the name of its folder."""

    inbox = "inbox"
    outbox = "outbox"
    stored = "stored"
    notify = "notify"
    worklist = "worklist"
    dead = "dead"


class Spool:
    """The folders of the spool, locked for this process.

    Args:
        root: The folder of the spool, which is created if necessary.

    Raises:
        ConfigError: If the folder cannot be used, another process uses it, or other users can read it.

    Attributes:
        root: The folder of the spool.
        studies: The folder of studies.
        arrived: An event for each stage, which is set when an entry arrives there.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.arrived = {stage: threading.Event() for stage in Stage}
        self._incoming = root / "incoming"
        self.studies = root / "studies"
        # Held while an entry is renamed, so that no object is in two stages.
        self._renaming = threading.RLock()
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if root.stat().st_mode & 0o077:
                raise ConfigError(f"spool: other users can access {root}; run chmod 0700 on it")
            for each in (self._incoming, self.studies, *map(self.folder, Stage)):
                each.mkdir(mode=0o700, exist_ok=True)
            self._lock = _lock_file(root / "lock")
            self._key = self._read_or_create_key()
            for unfinished in self._incoming.iterdir():
                shutil.rmtree(unfinished)
        except BlockingIOError as error:
            raise ConfigError(f"spool: another gateway uses {root}; stop it, or choose another folder") from error
        except OSError as error:
            raise ConfigError(f"spool: {error}") from error

    def close(self) -> None:
        """Release the lock, so that another process can use the spool."""
        os.close(self._lock)

    def folder(self, stage: Stage) -> Path:
        """Return the folder of a stage."""
        return self.root / stage.value

    def entry_name(self, uid: str) -> str:
        """Return the name of an object in the spool and the audit trail: a hash of its UID, keyed with a secret."""
        return hmac.digest(self._key, uid.encode(), "sha256").hex()[:32]

    def entries(self, stage: Stage) -> list[Path]:
        """Return the entries of a stage, oldest first."""
        with os.scandir(self.folder(stage)) as found:
            dated = [(changed, Path(each)) for each in found if (changed := _change_time(Path(each))) is not None]
        return [entry for _, entry in sorted(dated)]

    def count(self, stage: Stage) -> int:
        """Return the number of entries of a stage."""
        return sum(1 for _ in self.folder(stage).iterdir())

    def entries_with_times(self, stage: Stage) -> Iterator[tuple[Path, float]]:
        """Yield each entry of a stage and the Unix time in seconds when it was received or, in `dead`, failed."""
        for entry in self.entries(stage):
            if (changed := _change_time(entry)) is not None:
                yield entry, changed

    def free_bytes(self) -> int:
        """Return the free space on the disk of the spool."""
        return shutil.disk_usage(self.root).free

    def add(self, name: str, files: Mapping[str, bytes], stage: Stage = Stage.inbox) -> bool:
        """Add an entry to a stage, and wait until it is on the disk.

        Args:
            name: Name of the entry.
            files: Paths in the entry and contents.
            stage: The stage.

        Returns:
            False if the object is in progress already.

        Raises:
            OSError: If the entry cannot be written. The stage has no part of it then.
        """
        if self.is_in_progress(name):
            _sync(self.folder(stage))  # the thread that added it may not have synchronised it yet
            return False
        new = self._temporary_path(name)
        try:
            new.mkdir(mode=0o700)
            for file, data in files.items():
                (new / file).parent.mkdir(mode=0o700, exist_ok=True)
                _write(new / file, data)
            for folder in {(new / file).parent for file in files} | {new}:
                _sync(folder)
            with self._renaming:
                added = not self.is_in_progress(name)  # another association may have sent the object at the same time
                if added:
                    new.rename(self.folder(stage) / name)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        if not added:
            shutil.rmtree(new, ignore_errors=True)
        _sync(self.folder(stage))
        self.arrived[stage].set()
        return added

    def is_in_progress(self, name: str, besides: Stage = Stage.dead) -> bool:
        """Return True if an entry is in a stage other than `dead` and `besides`."""
        with self._renaming:
            stages = {*Stage} - {Stage.dead, besides}
            return any((self.folder(stage) / name).exists() for stage in stages)

    def move(self, entry: Path, stage: Stage) -> Path:
        """Move an entry to another stage. All files of the entry must be on the disk.

        Returns:
            The new path of the entry.
        """
        new = self.folder(stage) / entry.name
        with self._renaming:
            if new.exists():  # an earlier entry of the same object that failed
                self.remove(new)
            entry.rename(new)
        _sync(new.parent)
        _sync(entry.parent)
        self.arrived[stage].set()
        return new

    def remove(self, entry: Path) -> None:
        """Delete an entry. If the process is killed, either the complete entry remains or nothing."""
        unlinked = self._temporary_path(entry.name)
        entry.rename(unlinked)
        _sync(entry.parent)
        shutil.rmtree(unlinked)

    def _temporary_path(self, name: str) -> Path:
        """Return a path in incoming/ that does not exist."""
        return self._incoming / f"{name}.{secrets.token_hex(4)}"

    def _read_or_create_key(self) -> bytes:
        """Return the key of entry names, and create it in a new spool."""
        path = self.root / "key"
        if not path.exists():
            new = self.root / "key.new"
            new.unlink(missing_ok=True)
            _write(new, secrets.token_bytes(32))
            new.rename(path)
            _sync(self.root)
        return path.read_bytes()


def write_file(path: Path, data: bytes | Mapping[str, Any], *, new_folder: bool = False) -> None:
    """Write a file of an entry atomically, and wait until it is on the disk.

    Args:
        path: The file.
        data: Its content; a mapping is written as JSON.
        new_folder: Create the folder of the file if necessary. Use it for folders in an entry only: another thread may
            have moved the entry, and a new one in its place would have no image.

    Raises:
        OSError: If the entry does not exist any more, or the file cannot be written.
    """
    content = data if isinstance(data, bytes) else json.dumps(data, ensure_ascii=False).encode()
    if new_folder:
        path.parent.mkdir(mode=0o700, exist_ok=True)
    new = path.with_name(f".{path.name}")
    new.unlink(missing_ok=True)
    _write(new, content)
    new.rename(path)
    _sync(path.parent)
    _sync(path.parent.parent)


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping that `write_file` wrote; empty if the file does not exist."""
    try:
        return dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return {}


def move_file(path: Path, new: Path) -> None:
    """Rename a file of an entry, and wait until the rename is on the disk. The new folder is created if necessary."""
    new.parent.mkdir(mode=0o700, exist_ok=True)
    path.rename(new)
    for folder in {new.parent, path.parent, new.parent.parent}:
        _sync(folder)


def _lock_file(path: Path) -> int:
    """Return a file descriptor that holds an exclusive lock; raise BlockingIOError if another process holds it."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
    return file


def _write(path: Path, data: bytes) -> None:
    """Create a file, and wait until its content is on the disk."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(file, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def _sync(folder: Path) -> None:
    """Wait until renames in a folder are on the disk, so that they survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _change_time(entry: Path) -> float | None:
    """Return the time when the entry failed or was received, in seconds of Unix time; None if it does not exist."""
    for file in ("reason.json", "source.dcm", STUDY_FILE, WORKITEM_FILE):
        try:
            return min((entry / file).stat().st_mtime, time.time())
        except (FileNotFoundError, NotADirectoryError):
            continue
    return None
