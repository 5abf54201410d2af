"""Clients in workers: gunicorn, celery, multiprocessing, gevent and eventlet."""

from __future__ import annotations

import re
import signal
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client.fake_server import Servicer, listening
from tests.http2 import wait_until
from tests.processes import LIMIT_S, completed, environment, free_port, started

pytestmark = pytest.mark.slow

START = """
import os, sys, threading, time
import numpy as np
import camserve

IMAGE = np.zeros((6, 4, 3), np.uint8)
client = camserve.Client(os.environ["ADDRESS"], timeout=20)
"""
IN_CHILDREN = """
def in_child(call):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            print("child", call(), flush=True)
        except BaseException as error:
            print("child", type(error).__name__, error, flush=True)
        os._exit(0)
    os.waitpid(pid, 0)

def rows():
    return client.explain(IMAGE).cost.rows
"""


@pytest.fixture
def address() -> Iterator[str]:
    with listening(Servicer()) as address:
        yield address


def run(script: str, address: str, **variables: str) -> str:
    """Run a script in a process of its own, and return its output."""
    variables = {"ADDRESS": address, "GRPC_VERBOSITY": "NONE", **variables}
    result = completed([sys.executable, "-c", script], env=environment(**variables))
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_client_that_the_parent_has_not_used_works_in_children(address: str) -> None:
    script = START + IN_CHILDREN + "for _ in range(3): in_child(rows)\nprint('parent', rows())"
    assert run(script, address).splitlines() == ["child 12"] * 3 + ["parent 12"]


def test_fork_after_a_call_is_an_error_with_a_remedy(address: str) -> None:
    """The parent is not affected, and closing the client in the child neither."""
    script = START + IN_CHILDREN + "rows()\nin_child(rows)\nin_child(client.close)\nprint('parent', rows())"
    failed, closed, parent = run(script, address).splitlines()
    assert re.match(r"child CamserveError this process was forked .* GRPC_ENABLE_FORK_SUPPORT=1 .*", failed)
    assert (closed, parent) == ("child None", "parent 12")


def test_fork_support_of_grpc_permits_forks_between_calls(address: str) -> None:
    script = START + IN_CHILDREN + "rows()\nfor _ in range(3): in_child(rows)\nprint('parent', rows())"
    assert run(script, address, GRPC_ENABLE_FORK_SUPPORT="1").splitlines() == ["child 12"] * 3 + ["parent 12"]


def test_fork_during_a_call_is_an_error_with_a_remedy(address: str) -> None:
    script = (
        START
        + IN_CHILDREN
        + """
from camserve import environment

def wait():
    try:
        client.explain(IMAGE, model="slow", timeout=5)
    except camserve.DeadlineExceeded:
        pass

rows()
waiting = threading.Thread(target=wait)
waiting.start()
while not environment.calls.running:
    time.sleep(0.01)
in_child(rows)
waiting.join()
print("parent", rows())
"""
    )
    failed, parent = run(script, address, GRPC_ENABLE_FORK_SUPPORT="1").splitlines()
    assert re.match(r"child CamserveError this process was forked .* spawn .*", failed)
    assert parent == "parent 12"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_multiprocessing_starts_workers_while_calls_are_in_progress(address: str, method: str, tmp_path: Path) -> None:
    script = tmp_path / "pool.py"
    script.write_text(
        START
        + f"""
import multiprocessing

def work(_):
    return client.explain(IMAGE).cost.rows

if __name__ == "__main__":
    stream = client.explain_stream(IMAGE)
    next(stream)
    with multiprocessing.get_context("{method}").Pool(2) as pool:
        print(pool.map(work, range(4)))
    print([*stream][-1].cost.rows)
"""
    )
    result = completed([sys.executable, script], env=environment(ADDRESS=address))
    assert result.stdout.splitlines() == ["[12, 12, 12, 12]", "12"], result.stderr


@pytest.mark.parametrize("options", [["--preload"], ["--preload", "--threads", "4"], ["--worker-class", "gevent"]])
def test_gunicorn(address: str, options: list[str], tmp_path: Path) -> None:
    """The client is created when the application is loaded, with --preload before the fork."""
    pytest.importorskip("gunicorn")
    gevent = "gevent" in options
    (tmp_path / "gunicorn_app.py").write_text(
        ("import grpc.experimental.gevent\ngrpc.experimental.gevent.init_gevent()\n" if gevent else "")
        + START
        + """
def app(request, start):
    rows = client.explain(IMAGE).cost.rows
    start("200 OK", [])
    return [f"{rows} {os.getpid()}".encode()]
"""
    )
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "--workers", "2", "--bind", f"127.0.0.1:{port}", *options]
    log = tmp_path / "gunicorn.log"
    with (
        log.open("w") as stderr,
        started(
            [*command, "gunicorn_app:app"], stderr=stderr, cwd=tmp_path, env=environment(ADDRESS=address)
        ) as process,
    ):
        wait_until(lambda: log.read_text().count("Booting worker") == 2)
        answers = []
        for _ in range(6):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=LIMIT_S) as response:
                answers.append(response.read().decode().split()[0])
        assert answers == ["12"] * 6
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0, log.read_text()


def test_celery_with_prefork_workers(address: str, tmp_path: Path) -> None:
    pytest.importorskip("celery")
    for folder in ("queue", "results"):
        (tmp_path / folder).mkdir()
    (tmp_path / "celery_app.py").write_text(
        START
        + f"""
from celery import Celery

app = Celery(broker="filesystem://", backend="file://{tmp_path}/results")
app.conf.broker_transport_options = dict.fromkeys(("data_folder_in", "data_folder_out"), "{tmp_path}/queue")
app.conf.broker_transport_options["control_folder"] = "{tmp_path}/control"
app.conf.broker_connection_retry_on_startup = True

@app.task
def rows():
    return client.explain(IMAGE).cost.rows

if __name__ == "__main__":
    app.set_current()
    import celery_app
    print([each.get(timeout={LIMIT_S}) for each in [celery_app.rows.delay() for _ in range(6)]])
"""
    )
    command = [sys.executable, "-m", "celery", "--app", "celery_app:app", "worker", "--pool", "prefork"]
    log, env = tmp_path / "celery.log", environment(ADDRESS=address, C_FORCE_ROOT="1")
    with (
        log.open("w") as output,
        started([*command, "--concurrency", "2"], stdout=output, stderr=output, cwd=tmp_path, env=env) as worker,
    ):
        result = completed([sys.executable, "celery_app.py"], cwd=tmp_path, env=env)
        assert result.stdout.strip() == str([12] * 6), result.stderr + log.read_text()
        worker.terminate()
        worker.wait(LIMIT_S)


GEVENT = """
import gevent.monkey
gevent.monkey.patch_all()
"""
TICKS = """
import gevent
ticks = []
def tick():
    while True:
        ticks.append(1)
        gevent.sleep(0.01)
ticking = gevent.spawn(tick)
jobs = [gevent.spawn(lambda: client.explain(IMAGE, model="slow", timeout=3))]
gevent.joinall(jobs)
print({type(job.exception).__name__ for job in jobs}, len(ticks) > 20)
print(client.explain(IMAGE).cost.rows)
"""


def test_gevent_needs_the_initialisation_of_grpc(address: str) -> None:
    """With it, other greenlets run during calls."""
    pytest.importorskip("gevent")
    init = "import grpc.experimental.gevent\ngrpc.experimental.gevent.init_gevent()\n"
    assert run(GEVENT + init + START + TICKS, address).splitlines() == ["{'DeadlineExceeded'} True", "12"]
    attempt = "\ntry:\n    client.models()\nexcept camserve.CamserveError as error:\n    print(error)"
    assert "call grpc.experimental.gevent.init_gevent() after" in run(GEVENT + START + attempt, address)


def test_eventlet_is_refused(address: str) -> None:
    pytest.importorskip("eventlet")
    patch = "import warnings; warnings.simplefilter('ignore')\nimport eventlet\neventlet.monkey_patch()\n"
    attempt = "\ntry:\n    client.models()\nexcept camserve.CamserveError as error:\n    print(error)"
    assert "eventlet has replaced the threads" in run(patch + START + attempt, address)
