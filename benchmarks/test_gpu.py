"""Tests of `make gpu`: the order and the limits of its steps, its page, and the figures of a server on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_page, gpu_served
from benchmarks.arithmetic import tf32, with_dtype
from benchmarks.gpu import Step
from benchmarks.gpu_page import Done
from benchmarks.gpu_served import Amounts, Measuring
from benchmarks.limit import recorded_ascent
from benchmarks.machine import ROOT
from benchmarks.results import Claim, Result
from benchmarks.subjects import TINY
from camserve_server.models.load import load
from tests import nets
from tests.processes import LIMIT_S

KNOWN = {"date": "2026-01-01", "commit": "abc", "Card": "H200"}
JUNIT = """<testsuites><testsuite><testcase classname="tests.a" name="test_one"/>
<testcase classname="tests.a" name="test_two"><failure message="AssertionError: 1 | 2&#10;more">trace</failure>
</testcase><testcase classname="tests.a" name="test_three"><skipped message="needs two GPUs"/></testcase>
</testsuite></testsuites>"""
# Starts a child in a session of its own, prints its id, and waits.
HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_failing_and_hanging_steps_do_not_stop_the_next_ones(tmp_path: Path) -> None:
    folder, out = tmp_path / "results", tmp_path / "page.md"
    figures = folder / "served" / gpu_page.FIGURES
    served = {"figures": {"grad-cam": 0.02}, "rows": [["grad-cam", "20 ms"]], "failures": [], "arithmetic": "fp16"}
    chosen = [
        Step("default", ["-c", "raise SystemExit('the card is on fire')"], 60),
        Step("half", ["-c", HANGS], 3),
        Step("served", ["-c", f"open({str(figures)!r}, 'w').write({json.dumps(served)!r})"], 60),
    ]
    done = gpu.run_all(chosen, 120, folder, out, KNOWN, ["One remark."])
    assert [each.status for each in done] == [1, None, 0]
    child = int((folder / "half" / gpu_page.LOG).read_text().split()[0])  # the traceback of the interruption follows
    assert not _runs(child)
    text = out.read_text(encoding="utf-8")
    assert "- Step default: failed with exit code 1; last line of its output: `the card is on fire`." in text
    assert "- Step half: ended at its limit of 3 s." in text
    assert "- One remark." in text
    assert "| Grad-CAM, one request at a time, over gRPC | 20.0 ms | ≤ 10.0 ms | missed |" in text
    assert "| served | " in text.partition("## Commands")[2]


@pytest.mark.slow
def test_children_of_a_finished_step_end(tmp_path: Path) -> None:
    leaves = HANGS.rpartition("time.sleep(600)")[0]
    done = gpu.run(Step("leaves", ["-c", leaves], 60), 60, tmp_path)
    assert done.status == 0
    assert not _runs(int((tmp_path / "leaves" / gpu_page.LOG).read_text()))


@pytest.mark.slow
def test_tests_that_exceed_the_limit_leave_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    code = ["import time, pytest", "pytestmark = pytest.mark.gpu"]
    code += ["def test_one(): pass", "def test_two(): time.sleep(600)"]
    (tmp_path / "tests" / "test_two.py").write_text("\n".join(code))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "INTERRUPT_S", LIMIT_S)
    folder = tmp_path / "results"
    done = gpu.run(Step("tests", gpu._pytest(folder / "tests" / gpu_page.JUNIT), 20), 20, folder)
    text = gpu_page.page(KNOWN, [done], folder, [])
    assert "| GPU tests that pass, of 1 | 1 | all | missed |" in text
    assert "- Step tests: ended at its limit of 20 s." in text


def test_steps_do_not_start_after_the_limit(tmp_path: Path) -> None:
    out = tmp_path / "page.md"
    [done] = gpu.run_all([Step("opti", ["-c", ""], 60)], gpu.LEAST_S, tmp_path, out, KNOWN, [])
    assert done.status is None
    assert "- Step opti: did not start, because no time was left." in out.read_text(encoding="utf-8")


def test_shares_of_time_and_order_of_steps(tmp_path: Path) -> None:
    chosen = gpu.steps("cuda", True, tmp_path)
    assert [step.name for step in chosen][:2] == ["tests", "served"]  # the most important ones
    assert all(step.limit_s <= gpu.LIMIT_S / 3 for step in chosen)
    for step in chosen[2:]:
        assert step.arguments[step.arguments.index("--device") + 1] == "cuda"
    files = [each for each in chosen[0].arguments if each.endswith(".py")]
    assert files and all("pytest.mark.gpu" in Path(each).read_text() for each in files)


def test_page_compares_figures_with_targets(tmp_path: Path) -> None:
    for name, file, text in (("tests", gpu_page.JUNIT, JUNIT), ("tests", gpu_page.LOG, "1 failed")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / file).write_text(text)
    claims = [
        Claim("Score-CAM, resnet50, one image, 2048 of 2048 channels", peer, figure, 2.0)
        for peer, figure in (("torchcam", 2.5), ("torchcam, camserve's precision", 1.9), ("pytorch-grad-cam", 1.5))
    ]
    (tmp_path / "default").mkdir()
    results = {"facts": {}, "results": {"score": Result("Score-CAM", "text", claims=claims).as_json()}}
    (tmp_path / "default" / gpu_page.RESULTS).write_text(json.dumps(results))
    done = [Done("tests", "python -m pytest", 9.0, 1, 90.0), Done("default", "python -m benchmarks", 9.0, 0, 90.0)]
    text = gpu_page.page(KNOWN, done, tmp_path, [])
    assert "| GPU tests that pass, of 2 | 1 | all | missed |" in text
    assert "| Score-CAM at default precision ÷ torchcam with torch's defaults | 2.50× | ≥ 2.00× | met |" in text
    assert "÷ pytorch-grad-cam with torch's defaults | 1.50× | ≥ 2.00× | missed |" in text
    assert "| Opti-CAM, one image, 100 steps, over gRPC | – | ≤ 0.35 s | not measured |" in text
    assert "1 passed, 1 failed, 1 skipped." in text
    assert "| tests.a.test_two | failed | AssertionError: 1 \\| 2 |" in text
    assert "| tests.a.test_three | skipped | needs two GPUs |" in text
    assert "Step tests" not in text  # the section on tests reports its failures


def test_tests_that_did_not_all_run_miss_the_target(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / gpu_page.JUNIT).write_text(JUNIT.replace("failure", "properties"))
    text = gpu_page.page(KNOWN, [Done("tests", "python -m pytest", 90.0, None, 90.0)], tmp_path, [])
    assert "| all | missed |" in text
    assert "- Step tests: ended at its limit of 90 s." in text


@pytest.mark.parametrize("module", ["torch", "matplotlib"])
def test_missing_module_is_named(module: str) -> None:
    code = f"import runpy, sys; sys.modules[{module!r}] = None; runpy.run_module('benchmarks.gpu', run_name='__main__')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    assert done.returncode == 1
    assert f"has no module {module}; install the packages" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the command would run its steps")
def test_command_needs_a_gpu() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    assert done.returncode == 2
    assert "torch finds no CUDA GPU" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_command_measures_a_section_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "page.md"
    assert gpu.main(
        ["opti", "--device", "cpu", "--limit", "500", "--out", str(out), "--results", str(tmp_path / "r")]
    ) in (0, 1)
    text = out.read_text(encoding="utf-8")
    assert "Opti-CAM, tiny, one image" in text
    assert gpu.CPU_REMARK in text
    assert "| opti | " in text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_figures_of_a_server(tmp_path: Path) -> None:
    out = tmp_path / gpu_page.FIGURES
    amounts = Amounts(repeats=1, steps=2, images=2, compared=1, processes=1, callers=2, seconds=0.1, front_ends=2)
    served = Measuring(TINY, "cpu", out, amounts).run()
    assert served.failures == []
    assert {"ready_first", "ready_second", "poly-cam", "opti-cam", "opti_share", "grad_cam_per_s"} <= {*served.figures}
    assert all(value == 0 for key, value in served.figures.items() if key.startswith("bits_"))
    assert gpu_page.read_served(out)["figures"] == served.figures


def test_a_server_that_does_not_start_leaves_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: str) -> None:
        raise RuntimeError("the server did not start; see its log above")

    monkeypatch.setattr(gpu_served, "running", refuse)
    served = Measuring(TINY, "cuda", tmp_path / "figures.json", gpu_served.SMALL).run()
    assert [what for what, _ in served.failures] == ["server with fp16 and tf32", "server with bf16 and tf32"]


def test_network_computes_in_another_data_type() -> None:
    net = nets.tiny_cnn().eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    half = with_dtype(net, torch.bfloat16)
    logits = half(x)
    assert logits.dtype == torch.float32
    assert next(half.parameters()).dtype == torch.bfloat16
    assert 0 < float((logits - net(x)).abs().max()) < 0.1
    assert with_dtype(net, torch.float32) is net


def test_setting_of_tf32_is_restored() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with tf32(False):
        assert not torch.backends.cudnn.allow_tf32
        with tf32(True):
            assert torch.backends.cuda.matmul.allow_tf32
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("branches", [1, 2])
def test_step_of_opti_cam_is_recorded(branches: int) -> None:
    device = torch.device("cuda")
    model = load(TINY.model_copy(update={"precision": ("fp16",)}), device)
    one = recorded_ascent(model.module, torch.rand(4, 3, 32, 32, device=device), 8, 3, branches)
    assert one.rows == 12
