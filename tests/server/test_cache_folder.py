"""The cache folder: stored values come back for their key only, and no state of the file system is an error."""

from __future__ import annotations

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from camserve_server import cache_folder
from camserve_server.cache_folder import CacheFolder, open_cache_folder
from camserve_server.config import Config, read_config
from camserve_server.errors import ConfigError
from tests.support import without_calls

KEY = {"weights": "sha256:1", "input": [3, 32, 32], "layer": ""}
IS_ROOT = os.geteuid() == 0  # root may write everywhere


def opened(path: Path) -> CacheFolder:
    folder = open_cache_folder(path, chosen=True)
    assert folder is not None
    return folder


def the_file(path: Path) -> Path:
    [file] = path.glob("sizes/*")
    return file


def test_value_comes_back_for_its_key_in_another_process(tmp_path: Path) -> None:
    opened(tmp_path / "cache").write("sizes", KEY, {"forward": 8})
    folder = opened(tmp_path / "cache")
    assert folder.read("sizes", {**KEY, "input": (3, 32, 32)}) == {"forward": 8}
    assert folder.read("others", KEY) is None
    for name in KEY:
        assert folder.read("sizes", {**KEY, name: "another"}) is None


def test_folder_and_files_are_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        opened(tmp_path / "a" / "cache").write("sizes", KEY, 1)
    finally:
        os.umask(before)
    cache = tmp_path / "a" / "cache"
    modes = [stat.S_IMODE(each.stat().st_mode) for each in (cache, cache / "sizes", the_file(cache))]
    assert modes == [0o700, 0o700, 0o600]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 5000,
        "\0\xff",
        '{"format": 1}',
        json.dumps({"format": 2, "key": KEY, "value": 1}),
        json.dumps({"format": 1, "key": {**KEY, "layer": "x"}, "value": 1}),
        json.dumps({"format": 1, "key": KEY, "value": "x" * cache_folder.MAX_FILE_BYTES}),
    ],
    ids=range(10),
)
def test_corrupt_and_foreign_files_are_ignored_with_one_warning_and_replaced(tmp_path: Path, text: str) -> None:
    folder = opened(tmp_path)
    folder.write("sizes", KEY, 1)
    the_file(tmp_path).write_bytes(text.encode("latin-1"))
    with capture_logs() as log:
        assert folder.read("sizes", KEY) is None
        assert folder.read("sizes", KEY) is None
    assert [(line["event"], line["log_level"]) for line in log] == [
        ("a file of the cache folder is not used", "warning")
    ]
    folder.write("sizes", KEY, 2)
    assert folder.read("sizes", KEY) == 2


@pytest.mark.skipif(IS_ROOT, reason="root can write to a read-only folder")
def test_read_only_folder_is_read_without_warnings(tmp_path: Path) -> None:
    opened(tmp_path).write("sizes", KEY, 1)
    tmp_path.chmod(0o500)
    try:
        with capture_logs() as log:
            folder = opened(tmp_path)
            folder.write("sizes", KEY, 2)
            assert folder.read("sizes", KEY) == 1
        assert without_calls(log) == []
    finally:
        tmp_path.chmod(0o700)


def test_folder_without_write_access_keeps_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tmp_path).write("sizes", KEY, 1)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # as on a read-only file system
    folder = opened(tmp_path)
    folder.write("sizes", KEY, 2)
    assert folder.read("sizes", KEY) == 1


@pytest.mark.parametrize(("chosen", "level"), [(True, "warning"), (False, "info")])
def test_folder_that_cannot_be_created_is_logged(tmp_path: Path, chosen: bool, level: str) -> None:
    (tmp_path / "file").touch()
    with capture_logs() as log:
        assert open_cache_folder(tmp_path / "file" / "cache", chosen=chosen) is None
    assert [(line["event"], line["log_level"]) for line in log] == [("no cache folder", level)]


def test_file_that_cannot_be_written_is_logged_once(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    (tmp_path / "sizes").touch()  # where the folder of these files should be
    with capture_logs() as log:
        folder.write("sizes", KEY, 1)
        folder.write("sizes", {**KEY, "layer": "x"}, 1)
    assert [line["event"] for line in log] == ["a file of the cache folder is not used"]


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o2777])
def test_folder_that_others_can_write_to_is_not_used(tmp_path: Path, mode: int) -> None:
    opened(tmp_path).write("sizes", KEY, 1)
    tmp_path.chmod(mode)
    with capture_logs() as log:
        assert open_cache_folder(tmp_path, chosen=False) is None
    assert [line["event"] for line in log] == ["the cache folder is not used"]
    assert "0700" in log[0]["reason"]
    assert open_cache_folder(tmp_path / "inside", chosen=False) is not None


def test_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = tmp_path.stat().st_uid
    if owner == 0:  # root is trusted
        os.chown(tmp_path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with capture_logs() as log:
        assert open_cache_folder(tmp_path, chosen=True) is None
    assert "belongs to another user" in log[0]["reason"]


def test_torch_keeps_compiled_code_inside_unless_the_user_chose_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # restores the variable at the end
        monkeypatch.delenv(name)
    CacheFolder(tmp_path, writable=False).keep_compiled_code()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    monkeypatch.setenv("TRITON_CACHE_DIR", "/of/the/user")
    opened(tmp_path).keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "torch")
    assert os.environ["TRITON_CACHE_DIR"] == "/of/the/user"


def test_others_cannot_write_compiled_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch creates folders with the umask, and a folder that exists may permit everything."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # restores the variable at the end
        monkeypatch.delenv(name)
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton").chmod(0o775)
    before = os.umask(0)
    try:
        with capture_logs() as log:
            opened(tmp_path).keep_compiled_code()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "torch").stat().st_mode) == 0o700
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "torch")
    assert "TRITON_CACHE_DIR" not in os.environ
    assert [line["event"] for line in log] == ["compiled code is not kept"]


def test_link_to_a_folder_is_followed_once(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    folder = opened(tmp_path / "link")
    (tmp_path / "link").unlink()
    folder.write("sizes", KEY, 1)
    assert the_file(tmp_path / "real").exists()


def test_readers_see_whole_files_while_others_write(tmp_path: Path) -> None:
    def work(number: int) -> list[object]:
        folder, value = opened(tmp_path), [number] * 2000
        seen = list[object]()
        for _ in range(30):
            folder.write("sizes", KEY, value)
            seen.append(folder.read("sizes", KEY))
        return seen

    with capture_logs() as log, ThreadPoolExecutor(4) as threads:
        seen = [each for results in threads.map(work, range(4)) for each in results]
    assert all(each in [[number] * 2000 for number in range(4)] for each in seen)
    assert without_calls(log) == []
    assert [file.suffix for file in (tmp_path / "sizes").iterdir()] == [".json"]


def test_oldest_files_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_folder, "MAX_FILES", 2)
    folder = opened(tmp_path)
    for number in range(3):
        folder.write("sizes", {"number": number}, number)
        if number < 2:
            os.utime(folder._file("sizes", {"number": number}), (number, number))
    assert [folder.read("sizes", {"number": number}) for number in range(3)] == [None, 1, 2]


# ---- the setting -----------------------------------------------------------------------------------------------------


def test_default_is_the_folder_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CAMSERVE_CACHE_DIR")
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert Config().cache_path == Path("/home/somebody/.cache/camserve")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/invalid")
    assert Config().cache_path == Path("/home/somebody/.cache/camserve")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert Config().cache_path == Path("/caches/camserve")


def test_setting_names_a_folder_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CAMSERVE_CACHE_DIR")
    file = tmp_path / "camserve.toml"
    file.write_text('cache_dir = "cache"')
    assert read_config(file).cache_path == tmp_path / "cache"
    file.write_text('cache_dir = ""')
    assert read_config(file).cache_path is None
    monkeypatch.setenv("CAMSERVE_CACHE_DIR", str(tmp_path))
    assert read_config(file).cache_path == tmp_path


def test_tilde_stands_for_the_home_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A shell replaces it, but not in a TOML file or a manifest."""
    monkeypatch.delenv("CAMSERVE_CACHE_DIR")
    monkeypatch.setenv("HOME", "/home/somebody")
    file = tmp_path / "camserve.toml"
    file.write_text('cache_dir = "~/caches"')
    assert read_config(file).cache_path == Path("/home/somebody/caches")
    monkeypatch.setenv("CAMSERVE_CACHE_DIR", "~")
    assert read_config().cache_path == Path("/home/somebody")
    monkeypatch.setenv("CAMSERVE_CACHE_DIR", "~no-such-user/caches")
    with pytest.raises(ConfigError, match=r"^cache_dir: ~no-such-user/caches: .*; name another folder$"):
        read_config(file)


def test_tests_use_no_cache_folder() -> None:
    assert Config().cache_path is None
