"""Server process of the section "Host": `camserve serve` of any checkout, or a bare echo.

The process prints its ready line, and the CPU seconds of its threads for each line that it reads. It imports nothing
from this package, so that it can run the code of an older checkout, which PYTHONPATH names.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc


def cpu_s() -> dict[str, float]:
    """Return the CPU seconds of this process with its child processes, of its Python threads, and of the network."""
    used = {"process": time.process_time(), "network": 0.0, "children": 0.0}
    if "benchmarks.null_net" in sys.modules:
        used["network"] = sys.modules["benchmarks.null_net"].NullNet.cpu_s
    for threads in Path("/proc/self/task").iterdir():
        for pid in (threads / "children").read_text().split():
            used["children"] += time.clock_gettime(~int(pid) << 3 | 2)  # CPU clock of another process, as in libc
    used["process"] += used["children"]
    for thread in threading.enumerate():
        assert thread.ident is not None, "a running thread has an identifier"
        used[thread.name] = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return used


def answer_questions() -> None:
    """Print the CPU seconds for each line of the input. Stop the server at the end of the input."""
    for _ in sys.stdin:
        print(json.dumps(cpu_s()), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


async def echo(reply_bytes: int) -> None:
    """Run a gRPC server that answers each message with `reply_bytes` bytes, until SIGTERM."""
    reply = bytes(reply_bytes)

    async def respond(request: bytes, context: object) -> bytes:
        return reply

    server, stopping = grpc.aio.server(), asyncio.Event()
    handler: Any = grpc.unary_unary_rpc_method_handler(respond)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo.Echo", {"Echo": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    print(f"echo is ready on 127.0.0.1:{port}, serving echo", flush=True)
    await stopping.wait()
    await server.stop(0)


def main() -> int:
    """Run `camserve serve` with the configuration that the argument names, or an echo of that many bytes."""
    (what,) = sys.argv[1:]
    threading.Thread(target=answer_questions, daemon=True).start()
    if what.isdecimal():
        asyncio.run(echo(int(what)))
        return 0
    from camserve_server.__main__ import serve

    status: int = serve(config=Path(what))
    return status


if __name__ == "__main__":
    sys.exit(main())
