"""A caller of the chaos test, as a process of its own: asks without pause, and writes down what came of each request.

    python -m tests.chaos.caller ADDRESS SEED SECONDS

Each line of stdout is one request: what was asked, what was expected, and what came.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np

import camserve
from camserve import errors
from camserve.v1 import explain_pb2 as pb
from camserve.v1.explain_pb2_grpc import ExplainServiceStub

# What is asked, and the share of it. All of them take the server a moment only.
ASKED: list[tuple[float, dict[str, Any]]] = [
    (0.5, {"method": "grad-cam"}),
    (0.2, {"method": "score-cam", "metrics": ["average-gain"]}),
    (0.15, {"method": "opti-cam", "parameters": {"steps": 8}}),
    (0.15, {"method": "poly-cam", "parameters": {}, "metrics": ["insertion"]}),
]
PICTURES = 4
AT_ONCE = 4  # threads
CANCELLED, HOSTILE = 1 / 3, 1 / 10


def picture(number: int) -> np.ndarray:
    """uint8 [48, 64, 3], always the same."""
    return np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def name(asked: dict[str, Any], number: int) -> str:
    """Of what is asked of which picture."""
    return f"{asked['method']} of {number}"


def digest(explanation: camserve.Explanation) -> str:
    """Of the map, its scores and the class."""
    values = [explanation.saliency.tobytes(), repr(sorted(explanation.scores.items())).encode()]
    return hashlib.sha256(b"".join(values) + str(explanation.target.index).encode()).hexdigest()


def nan(client: camserve.Client) -> Any:
    """A tensor of nothing but NaN."""
    return client.explain(np.full((3, 32, 32), np.nan, np.float32), method="score-cam")


def huge(client: camserve.Client) -> Any:
    """A picture of 10^10 pixels, by its header."""
    header = b"IHDR" + 2 * (100_000).to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    check = zlib.crc32(header).to_bytes(4, "big")
    return client.explain(b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + check, method="grad-cam")


def wild(client: camserve.Client) -> Any:
    """A parameter beyond all bounds."""
    return client.explain(picture(0), method="rise", parameters={"masks": 10**12})


def unknown(client: camserve.Client) -> Any:
    """A method that there is not."""
    return client.explain(picture(0), method="no-such-cam")


def short(client: camserve.Client) -> Any:
    """Fewer bytes than the shape says, past the client's own checks."""
    stub: ExplainServiceStub = client._stub
    image = pb.Image(pixels=pb.Pixels(height=2**30, width=2**30, data=b"123"))
    try:
        return stub.Explain(pb.ExplainRequest(image=image, method=pb.MethodSpec(name="grad-cam")), timeout=20)
    except grpc.RpcError as error:
        raise errors.from_rpc(error, address="the server", timeout_s=20) from error


WRONG: list[Callable[[camserve.Client], Any]] = [nan, huge, wild, unknown, short]


def ask(client: camserve.Client, chance: random.Random) -> dict[str, Any]:
    """One request, and what came of it."""
    kind = chance.random()
    started = time.monotonic()
    if kind < HOSTILE:
        asked, wrong = "", chance.choice(WRONG)
        line: dict[str, Any] = {"kind": "hostile", "asked": wrong.__name__}
        try:
            wrong(client)
            line["answer"] = "an answer"
        except camserve.CamserveError as error:
            line["error"] = error.code.name
    else:
        (given,) = chance.choices([each for _, each in ASKED], [share for share, _ in ASKED])
        number = chance.randrange(PICTURES)
        asked = name(given, number)
        line = {"kind": "asked", "asked": asked}
        try:
            if kind < HOSTILE + CANCELLED:
                line["kind"] = "cancelled"
                stream = client.explain_stream(picture(number), **given)
                for _ in range(chance.randrange(3)):
                    next(stream, None)
                stream.close()
            else:
                line["answer"] = digest(client.explain(picture(number), **given))
        except camserve.CamserveError as error:
            line["error"] = error.code.name
            line["message"] = str(error)[:120]
    return {**line, "seconds": round(time.monotonic() - started, 3)}


def main() -> None:
    """Asks on several threads until the time is up."""
    address, seed, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    until = time.monotonic() + seconds
    lock = threading.Lock()
    with camserve.Client(address, timeout=20) as client:

        def work(number: int) -> None:
            chance = random.Random(1000 * seed + number)
            while time.monotonic() < until:
                line = json.dumps(ask(client, chance))
                with lock:
                    print(line, flush=True)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(json.dumps({"kind": "end"}), flush=True)


if __name__ == "__main__":
    main()
