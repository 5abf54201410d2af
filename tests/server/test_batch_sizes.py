"""Measured batch sizes: what is kept for later loads and starts, and what they depend on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import nn

from camserve_server import batch_sizes
from camserve_server.batch_sizes import measurement_key
from camserve_server.config import Config, ModelConfig
from camserve_server.engine import warmup
from camserve_server.engine.engine import Engine
from camserve_server.engine.lanes.dispatch import BatchSlice, Lane, run_batch
from camserve_server.engines import Engines
from camserve_server.model_pool import ModelPool
from camserve_server.models.model import Model
from camserve_server.torch_setup import machine
from camserve_server.torch_setup.spinning import SpinControl
from tests import nets
from tests.processes import LIMIT_S
from tests.support import as_model

MODEL = as_model(nets.tiny_cnn())
TINY: dict[str, Any] = {"name": "tiny", "source": "python:tests.nets:tiny_cnn", "input_size": (32, 32)}
FROM_FOLDER = "cache folder"

Log = list[Any]


@pytest.fixture(autouse=True)
def idle_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measure only briefly, and let the machine count as idle, also if it is not."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # a server would set them for all later tests
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(warmup, "MEASURE_S", 0)
    monkeypatch.setattr(Engine, "machine_was_busy", lambda self, since: False)


def start(folder: Path | str, size: int, **keys: Any) -> tuple[dict[str, int], Log]:
    """Load the model as a server does that measures only one size. Return the batch sizes of all lanes, and the log."""
    [sizes], log = starts(folder, size, keys)
    return sizes, log


def starts(folder: Path | str, size: int, keys: dict[str, Any]) -> tuple[list[dict[str, int]], Log]:
    """Load the model at all of its precisions, as `start` does."""
    config = Config(cache_dir=str(folder), models=[ModelConfig(**{**TINY, **keys})])

    async def load() -> list[dict[str, int]]:
        engines = Engines(config)
        engines.start()
        try:
            pool = ModelPool(config, engines)
            await pool.load_all()
            async with pool.lease("tiny") as lease:
                return [
                    {str(kind): size for kind, size in each.batch_sizes.items()}
                    for each in lease.model.precisions.values()
                ]
        finally:
            engines.close()

    before = warmup.SIZES["cpu"]
    warmup.SIZES["cpu"] = (size,)
    try:
        with capture_logs() as log:
            return asyncio.run(load()), log
    finally:
        warmup.SIZES["cpu"] = before


def sources(log: Log) -> list[str]:
    return [line["source"] for line in log if line["event"] == "batch sizes not measured"]


def all_lanes(size: int) -> dict[str, int]:
    return {"forward": size, "gradient": size, "ascend": size}


def stored(folder: Path) -> list[Any]:
    return [json.loads(file.read_text())["value"] for file in sorted(folder.glob("batch-sizes/*"))]


def test_later_start_uses_the_sizes_and_the_log_says_so(tmp_path: Path) -> None:
    sizes, log = start(tmp_path, 2)
    assert (sizes, sources(log), stored(tmp_path)) == (all_lanes(2), [], [all_lanes(2)])
    sizes, log = start(tmp_path, 4)
    assert (sizes, sources(log), stored(tmp_path)) == (all_lanes(2), [FROM_FOLDER], [all_lanes(2)])


def test_precisions_have_sizes_of_their_own(tmp_path: Path) -> None:
    start(tmp_path, 2)
    sizes, log = starts(tmp_path, 4, {"precision": ("fp32", "bf16")})
    assert (sizes, sources(log)) == ([all_lanes(2), all_lanes(4)], [FROM_FOLDER])
    sizes, log = starts(tmp_path, 8, {"precision": ("bf16", "fp32")})
    assert (sizes, sources(log)) == ([all_lanes(4), all_lanes(2)], [FROM_FOLDER] * 2)


@pytest.mark.parametrize("keys", [{"input_size": (48, 32)}, {"source": "python:tests.nets:tiny_vit"}], ids=str)
def test_another_network_is_measured(tmp_path: Path, keys: dict[str, Any]) -> None:
    start(tmp_path, 2)
    sizes, log = start(tmp_path, 4, **keys)
    assert (sizes, sources(log), len(stored(tmp_path))) == (all_lanes(4), [], 2)


def test_without_a_folder_each_start_measures() -> None:
    start("", 2)
    assert start("", 4)[0] == all_lanes(4)


def test_configured_size_is_neither_stored_nor_replaced(tmp_path: Path) -> None:
    start(tmp_path, 2, batch_size=8)
    assert stored(tmp_path) == []
    start(tmp_path, 2)
    sizes, log = start(tmp_path, 4, batch_size=8)
    assert (sizes, sources(log)) == (all_lanes(8), [])


def test_sizes_of_a_busy_machine_are_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as busy:
        busy.setattr(Engine, "machine_was_busy", lambda self, since: True)
        start(tmp_path, 2)
    assert stored(tmp_path) == []
    assert start(tmp_path, 4)[0] == all_lanes(4)


def test_sizes_are_not_stored_if_nobody_knows_whether_the_machine_was_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SpinControl, "observes", property(lambda self: False))
    start(tmp_path, 2)
    assert stored(tmp_path) == []


@pytest.mark.parametrize("value", [{"forward": 0}, {"forward": True}, {"forward": 2048}, {"other": 4}, [4], "4", 4])
def test_value_that_is_not_a_set_of_sizes_is_ignored(tmp_path: Path, value: object) -> None:
    start(tmp_path, 2)
    [file] = tmp_path.glob("batch-sizes/*")
    file.write_text(json.dumps({**json.loads(file.read_text()), "value": value}))
    sizes, log = start(tmp_path, 4)
    assert (sizes, sources(log), stored(tmp_path)) == (all_lanes(4), [], [all_lanes(4)])
    assert [line["reason"] for line in log if line["event"] == "a file of the cache folder is not used"] == [
        "it does not contain batch sizes"
    ]


def test_missing_kind_of_lane_is_measured(tmp_path: Path) -> None:
    start(tmp_path, 2)
    [file] = tmp_path.glob("batch-sizes/*")
    file.write_text(json.dumps({**json.loads(file.read_text()), "value": {"forward": 2}}))
    assert start(tmp_path, 4)[0] == {**all_lanes(4), "forward": 2}


def test_sizes_that_do_not_fit_into_memory_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(tmp_path, 8)

    def limited(model: Model, lane: Lane, slices: Sequence[BatchSlice], size: int) -> None:
        if size > 4:
            raise torch.OutOfMemoryError("no memory")
        run_batch(model, lane, slices, size)

    monkeypatch.setattr(warmup, "run_batch", limited)
    sizes, log = start(tmp_path, 4)
    assert (sizes, stored(tmp_path)) == (all_lanes(4), [all_lanes(4)])
    assert "known batch sizes do not fit into memory, measured again" in [line["event"] for line in log]


async def load_until_stored(folder: Path) -> None:
    """Load a model, and wait until its batch sizes are in the cache folder."""
    config = Config(cache_dir=str(folder), models=[ModelConfig(**TINY)])
    engines = Engines(config)
    engines.start()
    try:
        pool = ModelPool(config, engines)  # keeps the model
        await pool.load_all()
        async with asyncio.timeout(LIMIT_S):
            while not stored(folder):
                await asyncio.sleep(0.01)
    finally:
        engines.close()


def test_sizes_that_are_measured_later_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_sizes, "FIRST_WAIT_S", 0.01)
    monkeypatch.setitem(warmup.SIZES, "cpu", (2,))
    busy = iter([True])  # at the load
    monkeypatch.setattr(Engine, "machine_was_busy", lambda self, since: next(busy, False))
    asyncio.run(load_until_stored(tmp_path))
    assert start(tmp_path, 4)[0] == all_lanes(2)


def test_failed_measurement_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device may have too little memory beside the requests that run."""
    monkeypatch.setattr(batch_sizes, "FIRST_WAIT_S", 0.01)
    monkeypatch.setitem(warmup.SIZES, "cpu", (2,))
    busy, failures = iter([True]), iter([True])  # at the load, and at the first measurement after it
    monkeypatch.setattr(Engine, "machine_was_busy", lambda self, since: next(busy, False))
    measure_steps = warmup.measure_steps

    def failing_once(*arguments: Any) -> Iterator[None]:
        if next(failures, False):
            raise torch.OutOfMemoryError("too little memory")
        yield from measure_steps(*arguments)

    monkeypatch.setattr(batch_sizes, "measure_steps", failing_once)
    with capture_logs() as log:
        asyncio.run(load_until_stored(tmp_path))
    reasons = [line["reason"] for line in log if line["event"] == "batch sizes cannot be measured again"]
    assert reasons == ["OutOfMemoryError: too little memory"]


# ---- the key ---------------------------------------------------------------------------------------------------------


class NamesItsFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.function = nets.tiny_cnn(), lambda x: x

    def extra_repr(self) -> str:
        return f"function={self.function}"


@pytest.mark.parametrize(
    "changed",
    [
        lambda: replace(MODEL, digest="sha256:0"),
        lambda: replace(MODEL, code="another"),
        lambda: replace(MODEL, module=nn.Sequential(MODEL.module)),
        lambda: replace(MODEL, preprocessing=replace(MODEL.preprocessing, size=(32, 48))),
        lambda: replace(MODEL, layer=None),
        lambda: replace(MODEL, precision="bf16"),
        lambda: replace(MODEL, one_row=True),
        lambda: replace(MODEL, channels_last=False),
        lambda: replace(MODEL, folded={"0": "1"}),
        lambda: replace(MODEL, compile=True),
        lambda: replace(MODEL, openvino=True),
    ],
    ids=range(11),
)
def test_model_changes_the_key(changed: Callable[[], Model]) -> None:
    assert measurement_key(changed()) != measurement_key(MODEL)


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (torch, "get_num_threads", lambda: 77),
        (machine, "cpu_lines", lambda: ["model name\t: another"]),
        (metadata, "version", lambda name: "0.1"),
    ],
    ids=["threads", "processor", "versions"],
)
def test_machine_and_versions_change_the_key(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, value: Any
) -> None:
    before = measurement_key(MODEL)
    monkeypatch.setattr(owner, name, value)
    assert measurement_key(MODEL) != before


def test_version_of_openvino_counts_only_if_it_is_used() -> None:
    assert "openvino" not in measurement_key(MODEL)["versions"]
    assert "openvino" in measurement_key(replace(MODEL, openvino=True))["versions"]


def test_key_is_the_same_in_another_process() -> None:
    """The addresses of objects differ between processes."""
    nets_of_a_kind = NamesItsFunction(), NamesItsFunction()
    assert repr(nets_of_a_kind[0]) != repr(nets_of_a_kind[1])
    keys = [measurement_key(replace(MODEL, module=net)) for net in nets_of_a_kind]
    assert keys[0] == keys[1] == json.loads(json.dumps(keys[0]))
