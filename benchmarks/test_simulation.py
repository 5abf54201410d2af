"""Tests of the simulation: queueing theory, lost and repeated requests, determinism, and a run of the command."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import engine_runs, subjects
from benchmarks.simulation import __main__ as simulation
from benchmarks.simulation import measure
from benchmarks.simulation.balancing import RoundRobin, WeightedRoundRobin
from benchmarks.simulation.clients import Clients, Request
from benchmarks.simulation.events import Timeline
from benchmarks.simulation.profile import FOLDER, MethodCost, Profile, Step, load
from benchmarks.simulation.replica import Replica, Reply
from benchmarks.simulation.run import Scenario, ZoneLoss, capacity, simulate
from benchmarks.simulation.settings import MIX, Settings
from benchmarks.simulation.studies import MEAN_OF_DAY, STUDIES, day_curve
from camserve_server.config import ModelConfig

# A server that runs one row in a second, and another one with short and long requests.
ONE = Profile("one", "", {"forward": 1}, {"forward": {1: 1.0}}, {"one": MethodCost(1, 1, (Step("forward", 1),))})
TWO = Profile(
    "two",
    "",
    {"forward": 8, "gradient": 4},
    {"forward": {8: 0.01}, "gradient": {4: 0.02}},
    {
        "short": MethodCost(2, 2, (Step("forward", 1), Step("gradient", 1))),
        "long": MethodCost(202, 3, (Step("forward", 1), Step("forward", 200, min_rows=2, released=1))),
    },
    host_s=0.001,
)
TWO_MIX = {"short": 0.9, "long": 0.1}
STATUSES = {"OK", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}


def two(load: float, seconds: float, **options: Any) -> Scenario:
    return Scenario(TWO, TWO_MIX, 16.0, load, seconds, **options)


def test_mean_wait_is_that_of_an_m_d_1_queue() -> None:
    rho = 0.6
    ended = simulate(Scenario(ONE, {"one": 1.0}, 1.0, rho, 20_000.0, timeout_s=1e6, max_rows_owed=10**9))
    assert len(ended.sent) == pytest.approx(rho * 20_000, rel=0.03)
    wait = float(np.mean(ended.seconds)) - 1.0
    assert wait == pytest.approx(rho / (2 * (1 - rho)), rel=0.08)  # Pollaczek–Khinchine


def test_each_request_ends_once_with_a_status() -> None:
    arrivals = simulate(two(0.1, 60.0, seed=3))
    overload = two(3.0, 30.0, replicas=2, timeout_s=5.0, max_rows_owed=2000, seed=3)
    ended = simulate(overload)
    assert len(arrivals.sent) > 30
    assert len(ended.sent) == pytest.approx(overload.requests, rel=0.15)
    assert {*ended.statuses.tolist()} <= STATUSES
    assert {"OK", "RESOURCE_EXHAUSTED"} <= {*ended.statuses.tolist()}
    assert ended.attempts.max() == 4
    assert (ended.seconds <= 5.0 + 1e-9).all()
    assert ended.early.any()  # methods with a minimum of rows stop at the deadline


def test_request_that_ends_twice_is_an_error() -> None:
    timeline, choices = Timeline(), random.Random(0)
    clients = Clients(timeline, [], {}, RoundRobin(choices, timeline.clock), choices, lambda request: None)
    request = Request(0, "one", 0.0, 1.0, status="OK")
    with pytest.raises(RuntimeError, match="ended with OK and again with"):
        clients._end(request, "OK")


def test_same_seed_gives_the_same_requests() -> None:
    scenario = two(0.8, 15.0, replicas=3, policy="two choices, current rows", loss=ZoneLoss(5.0, 5.0))
    first, second, other = simulate(scenario), simulate(scenario), simulate(replace(scenario, seed=1))
    assert (first.sent == second.sent).all()
    assert (first.seconds == second.seconds).all()
    assert (first.statuses == second.statuses).all()
    assert first.sent.tolist() != other.sent.tolist()


@pytest.mark.parametrize("noticed_s", [0.0, 10.0])
def test_loss_of_a_zone_loses_no_request_silently(noticed_s: float) -> None:
    loss = two(0.65, 40.0, replicas=6, policy="round robin", loss=ZoneLoss(15.0, 15.0, noticed_s))
    with_loss, without = simulate(loss), simulate(replace(loss, loss=None))
    assert sorted(with_loss.sent) == sorted(without.sent)  # the arrivals do not depend on the loss
    assert {*without.statuses.tolist()} == {"OK"}
    failed = with_loss.statuses != "OK"
    assert failed.any()
    # Only requests that a lost replica may have run fail. Those that a dead connection has not delivered are repeated.
    in_flight = (with_loss.sent < 15.0) & (with_loss.sent + with_loss.seconds >= 15.0)
    assert (~failed | in_flight).all()
    assert {*with_loss.statuses[failed].tolist()} == {"UNAVAILABLE"}
    repeated = (with_loss.sent >= 15.0) & (with_loss.sent < 15.0 + noticed_s) & (with_loss.attempts > 1)
    assert repeated.any() == (noticed_s > 0)


def test_silent_loss_that_nobody_notices_ends_at_the_timeout() -> None:
    ended = simulate(two(0.4, 15.0, replicas=3, timeout_s=4.0, loss=ZoneLoss(3.0, 10.0, 8.0)))
    expired = ended.statuses == "DEADLINE_EXCEEDED"
    assert expired.any()
    assert ended.seconds[expired] == pytest.approx(4.0)


def test_no_ready_replica_is_unavailable_after_four_attempts() -> None:
    ended = simulate(two(0.5, 20.0, loss=ZoneLoss(0.0, 100.0)))
    assert {*ended.statuses.tolist()} == {"UNAVAILABLE"}
    assert {*ended.attempts.tolist()} == {4}
    assert ended.seconds == pytest.approx(0.1 + 0.4 + 1.6, rel=0.2)


def test_least_loaded_is_not_worse_than_round_robin() -> None:
    p99 = {
        policy: simulate(two(0.7, 40.0, replicas=4, policy=policy)).since(5.0).percentile(0.99)
        for policy in ("round robin", "two choices, current rows", "least loaded")
    }
    assert p99["least loaded"] <= p99["two choices, current rows"] <= p99["round robin"]
    assert p99["least loaded"] < 0.8 * p99["round robin"]


def test_load_reports_are_better_than_round_robin() -> None:
    p99 = {
        policy: simulate(two(0.8, 60.0, replicas=10, policy=policy)).since(5.0).percentile(0.99)
        for policy in ("round robin", "load reports", "least loaded")
    }
    assert p99["least loaded"] < p99["load reports"] < 0.9 * p99["round robin"]


@pytest.mark.parametrize(
    ("rows", "shares"),
    [
        ([0, 0], [1 / 2, 1 / 2]),
        ([0, 4], [5 / 6, 1 / 6]),  # weights 1 / 0.2 and 1 / 1
        ([1, 1, 1], [1 / 3, 1 / 3, 1 / 3]),
        ([0, 10_000, 10_000], [30 / 32, 1 / 32, 1 / 32]),  # the mean is a third of the first weight
    ],
)
def test_share_of_a_replica_is_proportional_to_its_weight(rows: list[int], shares: list[float]) -> None:
    timeline = Timeline()
    replicas = [Replica(timeline, ONE) for _ in rows]
    for replica, owed in zip(replicas, rows, strict=True):
        replica.seconds_owed = lambda owed=owed: owed / 5  # type: ignore[method-assign, misc]
    policy = WeightedRoundRobin(random.Random(0), timeline.clock)
    picked = [replicas.index(policy.pick(0, replicas)) for _ in range(6000)]
    assert [picked.count(at) / len(picked) for at in range(len(rows))] == pytest.approx(shares, abs=0.01)


def test_clients_call_all_replicas_in_turn() -> None:
    timeline = Timeline()
    replicas = [Replica(timeline, ONE) for _ in range(3)]
    policy = RoundRobin(random.Random(0), timeline.clock)
    for client in range(2):
        picked = [policy.pick(client, replicas) for _ in range(6)]
        assert Counter(map(id, picked)) == dict.fromkeys(map(id, replicas), 2)
        assert picked[:3] == picked[3:]


def test_rows_owed_return_to_zero_and_rows_run_are_those_of_the_queries() -> None:
    timeline, replies = Timeline(), list[Reply]()
    replica = Replica(timeline, TWO)
    for cost in TWO.methods.values():
        replica.call(cost, 1e6, replies.append)
    assert replica.rows_owed() == 204
    timeline.run()
    assert [reply.error for reply in replies] == [None, None]
    assert replica.rows_owed() == 0
    assert replica.rows_run == 203  # the plan has released a row


def test_capacity_is_the_reciprocal_of_the_time_of_a_request() -> None:
    assert capacity(ONE, {"one": 1.0}, callers=5, requests=50) == pytest.approx(1.0)
    assert capacity(TWO, {"short": 1.0}, callers=1, requests=50) == pytest.approx(1 / 0.031)


def test_published_profile_agrees_with_its_measurements() -> None:
    profile = load(FOLDER / "h200.json")
    assert Profile.from_json(json.loads(json.dumps(profile.as_json()))) == profile
    assert {*MIX} == {*profile.methods}
    for name, cost in profile.methods.items():
        assert sum(step.rows + step.released for step in cost.steps) == cost.most
        alone_s = 1 / capacity(profile, {name: 1.0}, callers=1, requests=10)
        assert alone_s == pytest.approx(profile.measured_s[name], rel=0.25)


def test_curve_of_the_day() -> None:
    hours = [day_curve(hour / 10) for hour in range(240)]
    assert min(hours) == pytest.approx(0.1)
    assert max(hours) == day_curve(14) == pytest.approx(1.0)
    assert float(np.mean(hours)) == pytest.approx(MEAN_OF_DAY)


@pytest.mark.slow
def test_command_writes_a_page_with_all_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "loads": (0.3, 0.5),
        "replicas": (1, 2),
        "zone_replicas": 3,
        "zone_s": (10.0, 10.0, 5.0),
        "policy_replicas": 2,
        "clients": (1, 10),
    }
    monkeypatch.setattr(
        simulation,
        "Settings",
        lambda *args, **options: Settings(
            *args,
            **{
                **options,
                **small,
                "warm_up_s": 1.0,
                "shortest_s": 3.0,
            },
        ),
    )
    arguments = ["--requests", "50", "--network", "tiny", "--seconds", "2", "--out", str(tmp_path)]
    assert simulation.main(["model", *STUDIES, *arguments]) == 0
    text = (tmp_path / "simulation.md").read_text(encoding="utf-8")
    assert "Not simulated yet: validation" in text
    assert simulation.main(["validation", *arguments]) == 0
    text = (tmp_path / "simulation.md").read_text(encoding="utf-8")
    for study in STUDIES.values():
        assert f"## {study.title}" in text
    assert "| rows per second | " in text
    assert "Not simulated" not in text
    assert len([*(tmp_path / "pictures").glob("simulation-*.svg")]) == 5
    (tmp_path / "simulation.md").unlink()
    assert simulation.main(["--render", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "simulation.md").read_text(encoding="utf-8") == text


@pytest.mark.slow
def test_measured_profile_is_simulated(tmp_path: Path) -> None:
    assert simulation.main(["--measure", str(tmp_path / "tiny.json"), "--network", "tiny"]) == 0
    assert simulation.main(["model", "--profile", str(tmp_path / "tiny.json"), "--out", str(tmp_path)]) == 0
    assert "Each replica serves tiny on a CPU." in (tmp_path / "simulation.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_simulated_engine_runs_the_rows_of_the_real_one() -> None:
    config = ModelConfig(name="tiny", source="python:tests.nets:tiny_cnn", input_size=(32, 32), batch_size=4)
    subject = subjects.from_config(config, torch.device("cpu"), 0.01)
    profile = measure.measure(subject, rounds=1)
    requests = measure.arrivals(50.0, 20)
    seconds, rate = measure.run_simulated(profile, requests)
    jobs, real_rate = measure.run_real(subject, requests)
    assert len(seconds) == len(jobs) == 20
    assert measure.with_times_of(jobs, profile).batch_s.keys() == profile.batch_s.keys()
    assert min(seconds) > 0
    assert rate > 0 and real_rate > 0
    for name, cost in profile.methods.items():
        call = subject.call(name, **measure.METHODS[name])
        assert engine_runs.run(subject.model, subject.x, call).rows == sum(step.rows for step in cost.steps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--replicas", "3", "0"], "'0'; expected a whole number from 1"),
        (["--replicas=-3"], "'-3'; expected a whole number from 1"),
        (["--requests", "0"], "'0'; expected a whole number from 1"),
        (["--seconds", "nan"], "'nan'; expected seconds, above 0"),
        (["--seconds", "0"], "'0'; expected seconds, above 0"),
        (["--profile", "missing.json"], "missing.json is no profile"),
        (["--profile", "list.json"], "list.json is no profile"),
        (["--out", "list.json"], "--out: "),
        (["--measure", "missing/tiny.json"], "there is no folder missing"),
        (["--render", "--out", "empty"], "there are no results in"),
        (["days"], "unknown section days"),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(SystemExit) as ended:
        simulation.main(["--out", "results", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
