"""TCP proxy that can stop forwarding data, like a lost connection."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

from tests.client.fake_server import WAIT_S


@contextlib.contextmanager
def forwarding(address: str, silent: threading.Event) -> Iterator[str]:
    """Yield the address of a proxy that stops forwarding data and accepting connections when `silent` is set."""
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:

        def carry(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    if not silent.is_set():
                        sink.sendall(data)

        def end_connection(connection: socket.socket) -> None:
            with contextlib.suppress(OSError):  # both sides have ended it already
                connection.shutdown(socket.SHUT_RDWR)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while not silent.is_set():
                    near, _ = listener.accept()
                    far = socket.create_connection(tuple(address.split(":")))  # type: ignore[arg-type]
                    for each in (near, far):
                        stack.callback(each.close)
                        stack.callback(end_connection, each)
                    for pair in ((near, far), (far, near)):
                        threading.Thread(target=carry, args=pair, daemon=True).start()

        accepting = threading.Thread(target=accept)
        accepting.start()

        def end() -> None:
            silent.wait()
            listener.shutdown(socket.SHUT_RDWR)

        ending = threading.Thread(target=end)
        ending.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        silent.set()
        for thread in (accepting, ending):
            thread.join(WAIT_S)
