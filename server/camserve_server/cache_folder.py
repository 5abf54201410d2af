"""The folder in which starts keep what they measure and compile, so that later starts need not do it again.

The files of this module are JSON. torch keeps compiled code in folders of its own inside, which runs in the server when
torch reads it. Therefore nobody but the user of the server and root may be able to write to the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

FORMAT = 1
MAX_FILE_BYTES = 65_536
MAX_FILES = 1000  # of a kind; models and versions that are not used any more leave files

log = structlog.get_logger()


class CacheFolder:
    """A folder of measurements and compiled code. Several processes may use it at a time.

    Errors of the file system and wrong contents never fail a caller. The log names the first one.

    Args:
        path: The folder.
        writable: False if the folder can only be read.
    """

    def __init__(self, path: Path, *, writable: bool = True) -> None:
        self._path, self._writable = path, writable
        self._reported = False

    def keep_compiled_code(self) -> None:
        """Let torch.compile keep its code in this folder, unless the user has chosen another one.

        torch has one folder for all models of a process, which it chooses when its compiler is first imported. Building
        a network can import it, so call this before.
        """
        if not self._writable:
            return
        for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "torch"), ("TRITON_CACHE_DIR", "triton")):
            if variable in os.environ:
                continue
            folder = self._path / name
            try:
                folder.mkdir(mode=0o700, exist_ok=True)  # torch would use the umask, which may let others write
                reason = _why_unsafe(folder.stat())
            except OSError as error:
                reason = str(error)
            if reason:
                log.warning("compiled code is not kept", folder=str(folder), reason=reason)
            else:
                os.environ[variable] = str(folder)

    def read(self, kind: str, key: Mapping[str, Any]) -> Any:
        """Return what is stored for a key.

        Args:
            kind: What is stored; the name of a folder.
            key: Everything that the stored value depends on, in types of JSON.

        Returns:
            The value in types of JSON, which the caller has to check; None if there is none.
        """
        file = self._file(kind, key)
        try:
            with file.open("rb") as opened:
                data = opened.read(MAX_FILE_BYTES + 1)
            if len(data) > MAX_FILE_BYTES:
                raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
            stored = json.loads(data)
            if stored["format"] != FORMAT or stored["key"] != _plain(key):
                raise ValueError("it does not belong to its name")
            return stored["value"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            self.report(kind, key, f"{type(error).__name__}: {error}")
            return None

    def write(self, kind: str, key: Mapping[str, Any], value: Any) -> None:
        """Store a value for a key, in place of an earlier one.

        Args:
            kind: As in `read`.
            key: As in `read`.
            value: The value in types of JSON.
        """
        if not self._writable:
            return
        file = self._file(kind, key)
        text = json.dumps({"format": FORMAT, "key": _plain(key), "value": value}, indent=1)
        try:
            file.parent.mkdir(mode=0o700, exist_ok=True)
            _replace(file, text.encode())
            _drop_oldest(file.parent)
        except OSError as error:
            self.report(kind, key, f"{type(error).__name__}: {error}")

    def report(self, kind: str, key: Mapping[str, Any], reason: str) -> None:
        """Log that a file cannot be used, unless the log already names one.

        Args:
            kind: As in `read`.
            key: As in `read`.
            reason: Why it cannot be used.
        """
        if not self._reported:
            self._reported = True
            log.warning("a file of the cache folder is not used", file=str(self._file(kind, key)), reason=reason)

    def _file(self, kind: str, key: Mapping[str, Any]) -> Path:
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self._path / kind / f"{name}.json"


def open_cache_folder(path: Path | None, *, chosen: bool) -> CacheFolder | None:
    """Create a cache folder, or check an existing one.

    A folder that cannot be used is logged, and the server works without it.

    Args:
        path: The folder; None for none.
        chosen: True if the configuration names the folder. Otherwise it may be missing without a warning, as in a
            container with a read-only file system.

    Returns:
        The folder; None if there is none, or if it cannot be used.
    """
    if path is None:
        return None
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = path.resolve()
        reason = _why_unsafe(path.stat())
        readable, writable = os.access(path, os.R_OK | os.X_OK), os.access(path, os.W_OK)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        (log.warning if chosen else log.info)("no cache folder", folder=str(path), reason=str(error))
        return None
    if not reason and not readable:
        reason = "the user of the server cannot read it; change its permissions to 0700"
    if reason:
        log.warning("the cache folder is not used", folder=str(path), reason=reason)
        return None
    return CacheFolder(path, writable=writable)


def _why_unsafe(found: os.stat_result) -> str:
    """Return why the contents of a folder cannot be trusted, or an empty string."""
    if found.st_uid not in (os.geteuid(), 0):
        return f"it belongs to another user ({found.st_uid}), whose code the server would run; name another folder"
    if stat.S_IMODE(found.st_mode) & 0o022:
        return (
            f"other users can write to it (mode {stat.S_IMODE(found.st_mode):04o}), and the server would run their "
            "code; change its permissions to 0700, or name a folder inside that the server creates"
        )
    return ""


def _replace(file: Path, data: bytes) -> None:
    """Write a file so that other processes see either the old contents or the new ones."""
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(data)
        temporary.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _drop_oldest(folder: Path) -> None:
    """Delete the oldest files of a folder with too many. Other processes may delete some at the same time."""
    files = list[tuple[float, Path]]()
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            files.append((file.stat().st_mtime, file))
    for _, file in sorted(files)[:-MAX_FILES]:
        file.unlink(missing_ok=True)


def _plain(key: Mapping[str, Any]) -> Any:
    """Return a key as JSON gives it back."""
    return json.loads(json.dumps(key))
