"""Run the GPU tests and the GPU benchmarks within a limit of time, and write docs/benchmarks-gpu.md.

Each step runs in a process of its own with a limit of its own. The page is written after each step. A run with names
of steps writes a page with these steps only.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

try:
    import torch

    from benchmarks import gpu_page
    from benchmarks.gpu_page import Done
    from benchmarks.machine import ROOT
    from camserve_server.torch_setup.compiler import compile_obstacle
except ModuleNotFoundError as missing:
    sys.exit(
        f"{sys.executable} has no module {missing.name}; install the packages that CONTRIBUTING.md names, or name "
        "another interpreter: make gpu PYTHON=…"
    )

LIMIT_S = 480.0
LEAST_S = 5.0  # a step that has less time does not start
MARKER = "GPU_BENCHMARK_STEP"  # environment variable that all processes of a step inherit
END_S = 5.0  # how long the processes of a step may take to end themselves
INTERRUPT_S = 10.0  # how long pytest may take to write its results once it is interrupted
CPU_REMARK = "The page shows a trial on a CPU with a small network. Its figures mean nothing."


@dataclass(frozen=True)
class Step:
    """Command that measures something.

    Attributes:
        name: Name of the step, and of its folder.
        arguments: Arguments of the Python interpreter.
        limit_s: Most seconds that the command may take.
    """

    name: str
    arguments: Sequence[str]
    limit_s: float


def steps(device: str, compiles: bool, folder: Path) -> list[Step]:
    """Return all steps, the most important ones first.

    Args:
        device: "cuda" or "cpu".
        compiles: True if torch.compile works on this machine.
        folder: Folder of the results. Each step writes into the folder with its name.
    """
    compiled = ["--compile"] if compiles else []
    on_gpu = device == "cuda"

    def sections(name: str, limit_s: float, *arguments: str, model: str = "resnet50") -> Step:
        seconds, model = ("0.4", model) if on_gpu else ("0.01", "tiny")
        common = ["--device", device, "--models", model, "--seconds", seconds, "--rounds", "2"]
        command = ["-m", "benchmarks", *arguments, *common, "--out", str(folder / name)]
        return Step(name, command, limit_s)

    served = ["-m", "benchmarks.gpu_served", "--device", device, "--out", str(folder / "served" / gpu_page.FIGURES)]
    return [
        Step("tests", _pytest(folder / "tests" / gpu_page.JUNIT), 90),
        Step("served", [*served, *compiled], 140),
        sections("default", 115, "score", "poly", *compiled),
        sections("half", 115, "poly", "--precision", "fp16" if on_gpu else "bf16", *compiled),
        sections("opti", 75, "limit", "opti", "--precision", "fp16" if on_gpu else "fp32"),
        sections("fp32", 80, "score", "poly", "--precision", "fp32"),
        sections("service", 60, "service", model="efficientnet-lite0"),
    ]


def _pytest(junit: Path) -> list[str]:
    """Return the command that runs the GPU tests and writes the results to `junit`, also if it is interrupted."""
    # Other files may import packages that are missing, and then pytest would report errors.
    found = [path for folder in ("tests", "benchmarks") for path in sorted((ROOT / folder).rglob("test_*.py"))]
    files = [path for path in found if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]
    command = ["-m", "pytest", *map(str, files), "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}"]
    command.append("--continue-on-collection-errors")
    if importlib.util.find_spec("pytest_timeout"):
        command.append("--timeout=60")  # names a test that hangs
    if importlib.util.find_spec("xdist"):
        command.append(f"--numprocesses={min(4, len(os.sched_getaffinity(0)))}")
    return command


# ---- processes -------------------------------------------------------------------------------------------------------


def run(step: Step, limit_s: float, folder: Path) -> Done:
    """Run a step and end all its processes. After `limit_s` seconds it is interrupted, as by Ctrl-C."""
    (folder / step.name).mkdir(parents=True, exist_ok=True)
    mark, start = uuid.uuid4().hex, time.monotonic()
    log, status = folder / step.name / gpu_page.LOG, None
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *step.arguments],
            cwd=ROOT,
            env=_environment() | {MARKER: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(INTERRUPT_S)
        finally:
            end(mark, process)
    command = f"python {' '.join(step.arguments)}".replace(str(folder), "build/gpu").replace(f"{ROOT}/", "")
    return Done(step.name, command, time.monotonic() - start, status, limit_s)


def _environment() -> dict[str, str]:
    """Return the environment of a step: the code of this checkout comes before that of installed packages."""
    folders = [str(ROOT), str(ROOT / "client"), str(ROOT / "server"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}


def end(mark: str, process: subprocess.Popen[bytes]) -> None:
    """End all processes of a step, and wait for their end."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in processes(mark, process.pid):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # it has just ended
        until = time.monotonic() + END_S
        while processes(mark, process.pid) and time.monotonic() < until:
            process.poll()
            time.sleep(0.05)
    process.wait()


def processes(mark: str, group: int) -> list[int]:
    """Return the ids of the running processes that inherited a mark or belong to a process group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, in_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            marked = f"{MARKER}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # the process has ended or belongs to another user
            continue
        if state != "Z" and (marked or int(in_group) == group):
            found.append(int(folder.name))
    return found


# ---- the command -----------------------------------------------------------------------------------------------------


def run_all(
    chosen: Sequence[Step], limit_s: float, folder: Path, out: Path, facts: Mapping[str, str], remarks: Sequence[str]
) -> list[Done]:
    """Run steps one after another, and write the page after each.

    Args:
        chosen: The steps.
        limit_s: Most seconds of all steps together.
        folder: Folder of the results of the steps.
        out: The page.
        facts: Facts about the machine and the software.
        remarks: What is known not to run, as sentences.
    """
    end_s, done = time.monotonic() + limit_s, list[Done]()
    for step in chosen:
        left = end_s - time.monotonic() - INTERRUPT_S - 2 * END_S  # the processes of the last step need time to end
        if left < LEAST_S:
            done.append(Done(step.name, "", 0.0, None, 0.0))
        else:
            print(f"{step.name}: at most {min(left, step.limit_s):.0f} s", file=sys.stderr, flush=True)
            done.append(run(step, min(left, step.limit_s), folder))
            print(f"{step.name}: {done[-1].outcome} after {done[-1].seconds:.0f} s", file=sys.stderr, flush=True)
        out.write_text(gpu_page.page(facts, done, folder, remarks), encoding="utf-8")
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 if all steps succeeded, 1 if one did not, 2 without a GPU."""
    names = [step.name for step in steps("cpu", False, Path())]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"steps to run: {', '.join(names)} (default: all)")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, help=f"seconds for all steps together (default: {LIMIT_S:.0f})"
    )
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the command with a small network"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="file of the page (default: docs/benchmarks-gpu.md, or build/benchmarks-gpu.md for a trial on a CPU)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "build" / "gpu",
        help="folder of the results and the output of each step, which is emptied before (default: build/gpu)",
    )
    parser.add_argument("--commit", help="name of the commit for the page, where git cannot tell it")
    given = parser.parse_args(arguments)
    # A shell ignores SIGINT for commands in the background, and so would the steps, which inherit this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    unknown = [name for name in given.names if name not in names]
    if unknown:
        parser.error(f"unknown step {unknown[0]}; expected one of {', '.join(names)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        print(
            "torch finds no CUDA GPU; run this command on a machine with a GPU, driver and a CUDA build of torch, "
            "or try it with --device cpu",
            file=sys.stderr,
        )
        return 2
    reason = compile_obstacle()
    remarks = [f"Compiled forward passes: {reason}."] if reason else []
    if given.device == "cpu":
        remarks.insert(0, CPU_REMARK)
    out = given.out or ROOT / ("docs" if given.device == "cuda" else "build") / "benchmarks-gpu.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = gpu_page.facts(given.device, given.commit)
    folder = given.results.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    compiles = not reason and given.device == "cuda"
    chosen = [step for step in steps(given.device, compiles, folder) if step.name in (given.names or names)]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the processes of the step
    try:
        done = run_all(chosen, given.limit, folder, out, facts, remarks)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"wrote {out}", file=sys.stderr)
    return 0 if all(each.status == 0 for each in done) else 1


if __name__ == "__main__":
    sys.exit(main())
