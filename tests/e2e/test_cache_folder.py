"""Servers that are started one after the other with the same cache folder."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

import camserve
from camserve_server.config import Config, ModelConfig
from camserve_server.engine import warmup
from camserve_server.engine.engine import Engine
from tests.conftest import serving
from tests.processes import completed, environment, patient_client

CODE = """
import sys
from camserve_server.config import Config, ModelConfig
from camserve_server.service.in_process import InProcessService

model = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4, compile=True)
service = InProcessService(Config(cache_dir=sys.argv[1], models=[model]))
service.start()
service.close()
from torch._dynamo.utils import counters
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
METHODS = ("poly-cam", "opti-cam", "grad-cam")


@pytest.mark.slow
def test_second_start_uses_the_sizes_of_the_first_and_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "machine_was_busy", lambda self, since: False)  # the tests themselves keep it busy
    monkeypatch.setattr(warmup, "MEASURE_S", 0)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))  # a server would set them for all later tests
    folder = tmp_path / "camserve"

    def explanations(sizes: tuple[int, ...]) -> tuple[list[camserve.Explanation], list[str]]:
        monkeypatch.setitem(warmup.SIZES, "cpu", sizes)
        tiny = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32))
        config = Config(listen="127.0.0.1:0", cache_dir=str(folder), models=[tiny])
        with capture_logs() as log, serving(config) as server, patient_client(server.address) as client:
            made = [client.explain(IMAGE, method=name, target=1) for name in METHODS]
        return made, [line["source"] for line in log if line["event"] == "batch sizes not measured"]

    first, measured = explanations((1, 2, 4))
    second, known = explanations((16,))
    assert (measured, known) == ([], ["cache folder"])
    for before, after in zip(first, second, strict=True):
        assert before.receipt.batch_sizes == after.receipt.batch_sizes
        assert np.array_equal(before.saliency, after.saliency)
        assert before.receipt.map_digests == after.receipt.map_digests
    assert {size for each in first for size in each.receipt.batch_sizes.values()} <= {1, 2, 4}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_second_start_uses_the_compiled_code_of_the_first(tmp_path: Path) -> None:
    variables = environment()
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        variables.pop(name, None)  # torch may have set them in this process
    command: list[str | Path] = [sys.executable, "-W", "ignore", "-c", CODE, tmp_path / "cache"]
    starts = [completed(command, env=variables) for _ in range(2)]
    assert [each.stdout.splitlines()[-1:] for each in starts] == [["0 1"], ["1 0"]], starts[0].stderr
