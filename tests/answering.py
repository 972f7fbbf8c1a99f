"""A server of one sentence: what stands behind a port where something else was expected."""

import contextlib
import socket
import threading
from collections.abc import Iterator

SSH = b"SSH-2.0-OpenSSH_9.6\r\n"


def http(body: bytes) -> bytes:
    """An HTTP answer with `body`."""
    return b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """A port of this machine where every call gets `answer`."""

    def serve() -> None:
        while True:
            try:
                caller, _ = listener.accept()
            except OSError:
                return  # closed below
            with caller, contextlib.suppress(OSError):
                caller.recv(1 << 16)
                caller.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)
