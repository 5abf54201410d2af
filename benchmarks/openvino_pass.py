"""Forward passes in OpenVINO and in the served network."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.approximations import warm
from benchmarks.bench_setup import Bench
from benchmarks.limit import Network, forward, timed
from benchmarks.results import Chart, Claim, Findings, Result, Table
from benchmarks.subjects import Subject
from benchmarks.timing import Side, Timed, run_on_thread
from camserve_server.engine.lanes.fast_forward import OPENVINO_SPEED
from camserve_server.engine.lanes.openvino_forward import OpenVinoForward
from camserve_server.models.model import Model

TEXT = (
    "Plain forward passes of the served network (channels-last, folded batch norms) and of the same network in "
    "OpenVINO, with the batch size that the server measured for the network. With `openvino = true`, the server uses "
    f"OpenVINO if it is at least {OPENVINO_SPEED:g} times as fast when the model is loaded, and if the logits agree."
)


def section(bench: Bench) -> Result:
    """Measure both passes in fp32 and bf16. Without a CPU there is nothing to measure."""
    findings = Findings()
    for subject in bench.subjects() if bench.device.type == "cpu" else ():
        for precision in ("fp32", "bf16"):
            _measure(bench, findings, subject, warm(bench, subject, precision))
    columns = ["model", "precision", "batch", "network, rows/s", "OpenVINO, rows/s", "ratio", "max. logit difference"]
    return Result(
        "OpenVINO",
        TEXT,
        claims=findings.claims,
        tables=[Table("Median of the rounds; the difference is a share of the largest logit:", columns, findings.rows)],
        charts=[Chart("Plain forward pass", "rows per second", findings.bars)],
    )


def _measure(bench: Bench, findings: Findings, subject: Subject, model: Model) -> None:
    size, precision = model.batch_sizes["forward"], model.precision
    X = (
        subject.image.tensor.expand(size, -1, -1, -1)
        .to(model.compute_dtype)
        .contiguous(memory_format=model.memory_format)
    )
    bench.step(f"{subject.name}: converting to OpenVINO")
    converted = run_on_thread(OpenVinoForward, model, X)
    rows = max(2 * size, round(subject.limit.rate * bench.seconds))

    def side(net: Network) -> Timed:
        return run_on_thread(partial(timed, forward, net, X, rows))

    sides: dict[str, Side] = {"network": partial(side, model.module), "OpenVINO": partial(side, converted)}
    rates = bench.alternate(f"{subject.name}: OpenVINO in {precision}", sides)
    differ = run_on_thread(_difference, model, converted, X)
    ratio = rates["OpenVINO"].over(rates["network"])
    what = f"Forward pass in OpenVINO, {subject.name}, {precision}"
    findings.claims.append(Claim(what, "the served network", ratio, None, agree=f"logits ≤ {differ:.0e}"))
    findings.bars[f"{subject.name}, {precision}"] = {name: of.rate for name, of in rates.items()}
    speeds = [f"{of.rate:.1f}" for of in rates.values()]
    findings.rows.append([subject.name, precision, str(size), *speeds, f"{ratio:.2f}×", f"{differ:.0e}"])


@torch.no_grad()
def _difference(model: Model, converted: OpenVinoForward, X: Tensor) -> float:
    logits = model.module(X).float()
    return float((converted(X).float() - logits).abs().max() / logits.abs().max())
