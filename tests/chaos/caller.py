"""A client process of the chaos test. It sends requests with short pauses and reports the outcome of each.

    python -m tests.chaos.caller ADDRESS SEED

The process runs until its standard input ends. It writes one JSON object for each request to standard output.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import threading
import zlib
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

import camserve
from camserve import errors
from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplainServiceStub

# The shares and the arguments of valid requests. Each of them takes the server only a moment.
VALID: list[tuple[float, dict[str, Any]]] = [
    (0.5, {"method": "grad-cam"}),
    (0.2, {"method": "score-cam", "metrics": ["average-gain"]}),
    (0.15, {"method": "opti-cam", "parameters": {"steps": 8}}),
    (0.15, {"method": "poly-cam", "metrics": {"insertion": {"steps": 28}}}),
]
IMAGES = 4
THREADS = 4
PAUSE_S = 0.25  # the mean; without pauses, the callers would take the CPU time of replicas that start
CANCELLED_SHARE, HOSTILE_SHARE = 1 / 3, 1 / 10
TIMEOUT_S = 60.0


def image(number: int) -> NDArray[np.uint8]:
    """Return the image with this number, uint8 [48, 64, 3], which is the same in each process."""
    return np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def request_name(arguments: dict[str, Any], number: int) -> str:
    """Return the name of a request for the image with this number."""
    return f"{arguments['method']} of {number}"


def digest(explanation: camserve.Explanation) -> str:
    """Return a digest of the map, its scores and the class."""
    values = [explanation.saliency.tobytes(), repr(sorted(explanation.scores.items())).encode()]
    return hashlib.sha256(b"".join(values) + str(explanation.target.index).encode()).hexdigest()


def nan(client: camserve.Client) -> Any:
    """Send a tensor that contains only NaN."""
    return client.explain(np.full((3, 32, 32), np.nan, np.float32), method="score-cam")


def huge(client: camserve.Client) -> Any:
    """Send a PNG file whose header declares 10^10 pixels."""
    header = b"IHDR" + 2 * (100_000).to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    check = zlib.crc32(header).to_bytes(4, "big")
    return client.explain(b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + check, method="grad-cam")


def wild(client: camserve.Client) -> Any:
    """Send a parameter that is far out of range."""
    return client.explain(image(0), method="rise", parameters={"masks": 10**12})


def unknown(client: camserve.Client) -> Any:
    """Name a method that does not exist."""
    return client.explain(image(0), method="no-such-cam")


def short(client: camserve.Client) -> Any:
    """Send fewer bytes than the shape declares, without the checks of the client."""
    stub: ExplainServiceStub = client._channels().stubs[0]
    pixels = pb.Image(pixels=pb.Pixels(height=2**30, width=2**30, data=b"123"))
    try:
        return stub.Explain(pb.ExplainRequest(image=pixels, method=pb.MethodSpec(name="grad-cam")), timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        raise errors.from_rpc(error, address="the server", timeout_s=TIMEOUT_S) from error


HOSTILE: list[Callable[[camserve.Client], Any]] = [nan, huge, wild, unknown, short]


def outcome(client: camserve.Client, chance: random.Random) -> dict[str, Any]:
    """Send one random request and return its kind, its name, and its answer or error."""
    kind = chance.random()
    if kind < HOSTILE_SHARE:
        send = chance.choice(HOSTILE)
        line: dict[str, Any] = {"kind": "hostile", "request": send.__name__}
        try:
            send(client)
            line["answer"] = "an answer"
        except camserve.CamserveError as error:
            line["error"] = error.code.name
        return line
    (arguments,) = chance.choices([each for _, each in VALID], [share for share, _ in VALID])
    number = chance.randrange(IMAGES)
    line = {"kind": "valid", "request": request_name(arguments, number)}
    try:
        if kind < HOSTILE_SHARE + CANCELLED_SHARE:
            line["kind"] = "cancelled"
            stream = client.explain_stream(image(number), **arguments)
            for _ in range(chance.randrange(3)):
                next(stream, None)
            stream.close()
        else:
            line["answer"] = digest(client.explain(image(number), **arguments))
    except camserve.CamserveError as error:
        line["error"] = error.code.name
        line["message"] = str(error)[:120]
    return line


def main() -> None:
    """Send requests on several threads until standard input ends."""
    address, seed = sys.argv[1], int(sys.argv[2])
    stop = threading.Event()
    lock = threading.Lock()
    with camserve.Client(address, timeout=TIMEOUT_S) as client:

        def work(number: int) -> None:
            chance = random.Random(1000 * seed + number)
            while not stop.is_set():
                line = json.dumps(outcome(client, chance))
                with lock:
                    print(line, flush=True)
                stop.wait(chance.expovariate(1 / PAUSE_S))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        sys.stdin.read()
        stop.set()
        for thread in threads:
            thread.join()
    print(json.dumps({"kind": "end"}), flush=True)


if __name__ == "__main__":
    main()
