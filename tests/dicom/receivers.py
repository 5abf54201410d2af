"""Systems that receive the messages of a gateway in tests: a webhook, and an HL7 engine that speaks MLLP."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import hl7.mllp
from hl7apy.mllp import AbstractErrorHandler, AbstractHandler, MLLPServer
from hl7apy.parser import parse_message

from tests.processes import listening

__all__ = ["Engine", "QuietHandler", "Webhook", "hl7_engine", "tls_engine", "webhook"]


class QuietHandler(BaseHTTPRequestHandler):
    """A handler of HTTP requests that writes no log."""

    def log_message(self, *_: Any) -> None:
        """Write nothing."""


class Webhook:
    """Requests of a webhook.

    Attributes:
        url: Its URL.
        requests: Headers and JSON of each request.
        status: Returns the status of a request, and further headers.
    """

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[tuple[dict[str, str], Any]] = []
        self.status: Callable[[], tuple[int, dict[str, str]]] = lambda: (204, {})


@contextmanager
def webhook() -> Iterator[Webhook]:
    """Run a webhook."""
    made = Webhook()

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            made.requests.append(({key.lower(): value for key, value in self.headers.items()}, json.loads(body)))
            status, headers = made.status()
            self.send_response(status)
            for header in headers.items():
                self.send_header(*header)
            self.end_headers()

    with listening(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as address:
        made.url = f"http://{address}/hooks/camserve?site=a"
        yield made


class Engine:
    """Messages of an HL7 engine.

    Attributes:
        address: HOST:PORT.
        messages: The messages, as text.
        code: Returns the code of the acknowledgement of a message.
        segment_end: End of the segments of acknowledgements.
    """

    def __init__(self) -> None:
        self.address = ""
        self.messages: list[str] = []
        self.code: Callable[[], str] = lambda: "AA"
        self.segment_end = "\r"

    def acknowledge(self, message: str) -> str:
        """Keep a message, and return its acknowledgement."""
        self.messages.append(message)
        identifier = str(hl7.parse(message).segment("MSH")[10])
        acknowledgement = f"MSH|^~\\&|ENGINE||CAMSERVE||20240101||ACK|1|P|2.5.1\rMSA|{self.code()}|{identifier}\r"
        return acknowledgement.replace("\r", self.segment_end)


@contextmanager
def hl7_engine() -> Iterator[Engine]:
    """Run the MLLP server of hl7apy, which accepts only valid messages of the type ORU^R01."""
    engine = Engine()

    class Accept(AbstractHandler):  # type: ignore[misc]
        def reply(self) -> str:
            parse_message(self.incoming_message).validate()
            return f"\x0b{engine.acknowledge(self.incoming_message)}\x1c\r"

    class Refuse(AbstractErrorHandler):  # type: ignore[misc]
        def reply(self) -> str:
            raise AssertionError(self.exc)

    with listening(MLLPServer("127.0.0.1", 0, {"ORU^R01^ORU_R01": (Accept,), "ERR": (Refuse,)})) as engine.address:
        yield engine


@contextmanager
def tls_engine(context: ssl.SSLContext) -> Iterator[Engine]:
    """Run the MLLP server of python-hl7 with TLS."""
    engine = Engine()
    loop = asyncio.new_event_loop()

    async def connected(reader: Any, writer: Any) -> None:
        message = (await reader.readblock()).decode()
        writer.writeblock(engine.acknowledge(message).encode())
        await writer.drain()
        await reader.read()  # until the gateway closes the connection
        writer.close()

    async def start() -> Any:
        return await hl7.mllp.start_hl7_server(connected, "127.0.0.1", 0, ssl=context)

    server = loop.run_until_complete(start())
    engine.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield engine
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
