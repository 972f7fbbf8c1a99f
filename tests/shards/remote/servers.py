"""Servers on loopback to fetch from: a real S3 endpoint (moto's), a Google Cloud Storage (gcp-storage-emulator's), and
a web server that misbehaves when told to."""

import json
import logging
import os
import re
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote
from urllib.request import Request, urlopen

import pytest

SECRET = "s3cr3t+of/the=owner"
KEY = "AKIAEXAMPLEOWNER"
BUCKET = "owners-data"


class Bucket:
    """A bucket on an S3 endpoint of our own; `gets` counts what was downloaded, by key."""

    def __init__(self, endpoint: str) -> None:
        import boto3

        self.gets: Counter[str] = Counter()
        self.client = boto3.client(
            "s3", endpoint_url=endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1"
        )
        self.client.create_bucket(Bucket=BUCKET)
        self.endpoint = endpoint

    def upload(self, folder: Path, prefix: str) -> str:
        """The address of the folder in the bucket."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.client.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder)}")
        return f"s3://{BUCKET}/{prefix}"

    def get(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def tell(self, environment: pytest.MonkeyPatch) -> None:
        """What a user sets."""
        environment.setenv("AWS_ENDPOINT_URL", self.endpoint)
        environment.setenv("AWS_ACCESS_KEY_ID", KEY)
        environment.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")


class _Counting(logging.Handler):
    """Counts GETs in the server's own log, of what the pattern describes."""

    def __init__(self, pattern: str, gets: Counter[str]) -> None:
        super().__init__()
        self._pattern, self._gets = re.compile(rf"GET {pattern} HTTP"), gets

    def emit(self, record: logging.LogRecord) -> None:
        if found := self._pattern.search(record.getMessage()):
            self._gets[unquote(found[1])] += 1


@contextmanager
def _counted(log: logging.Logger, pattern: str, gets: Counter[str]) -> Iterator[None]:
    """Whatever a server writes into `log` meanwhile is counted, and not shown."""
    log.setLevel(logging.INFO)
    log.propagate = False
    handler = _Counting(pattern, gets)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


class GoogleBucket:
    """A bucket on a Google Cloud Storage of our own; `gets` counts what was downloaded, by name."""

    def __init__(self, endpoint: str) -> None:
        self.gets: Counter[str] = Counter()
        self.endpoint = endpoint
        self._ask("POST", "/storage/v1/b", json.dumps({"name": BUCKET}).encode(), "application/json")

    def upload(self, folder: Path, prefix: str) -> str:
        """The address of the folder in the bucket."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())
        return f"gs://{BUCKET}/{prefix}"

    def put(self, name: str, data: bytes) -> None:
        place = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={quote(name, safe='')}"
        self._ask("POST", place, data, "application/octet-stream")

    def get(self, name: str) -> bytes:
        return self._ask("GET", f"/download/storage/v1/b/{BUCKET}/o/{quote(name, safe='')}")

    def names(self) -> set[str]:
        listed = json.loads(self._ask("GET", f"/storage/v1/b/{BUCKET}/o"))
        return {item["name"] for item in listed.get("items", [])}

    def tell(self, environment: pytest.MonkeyPatch) -> None:
        """What a user sets."""
        environment.setenv("STORAGE_EMULATOR_HOST", self.endpoint)

    def _ask(self, method: str, place: str, data: bytes | None = None, kind: str = "") -> bytes:
        request = Request(self.endpoint + place, data, {"Content-Type": kind} if data else {}, method=method)
        with urlopen(request, timeout=60) as answer:
            return bytes(answer.read())


@contextmanager
def google() -> Iterator[GoogleBucket]:
    """A running emulator, in a thread."""
    from gcp_storage_emulator.server import create_server

    log = logging.getLogger("gcp_storage_emulator.server")
    server = create_server("127.0.0.1", 0, in_memory=True)
    server._api.daemon = True
    server.start()
    bucket = GoogleBucket(f"http://127.0.0.1:{server._api._httpd.server_port}")
    try:
        with _counted(log, rf"/storage/v1/b/{BUCKET}/o/(\S+)\?alt=media", bucket.gets):
            yield bucket
    finally:
        server.stop()
        threading.Thread.join(server._api)


@contextmanager
def s3() -> Iterator[Bucket]:
    """A running endpoint."""
    from moto.server import ThreadedMotoServer

    log = logging.getLogger("werkzeug")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    bucket = Bucket(f"http://{host}:{port}")
    try:
        with _counted(log, rf"/{BUCKET}/(\S+)", bucket.gets):
            yield bucket
    finally:
        server.stop()


Answer = Callable[["Handler", bytes], None]
"""How a request for some bytes is answered."""


class Handler(BaseHTTPRequestHandler):
    """Serves the files of a folder, each as the next answer in its script says, well when there is none."""

    protocol_version = "HTTP/1.1"
    server: "Web"

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        with self.server.lock:
            self.server.gets[name] += 1
            script = self.server.script.get(name, [])
            answer = script.pop(0) if len(script) > 1 else script[0] if script else well
        path = self.server.folder / name
        with self.server.waits():
            time.sleep(self.server.latency)
        if not path.is_file():
            status(404)(self, b"")
            return
        with suppress(OSError):
            answer(self, path.read_bytes())

    def do_POST(self) -> None:
        self.server.posted.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.do_GET()

    def head(self, code: int, length: int | None, **headers: str) -> None:
        self.send_response(code)
        if length is None:
            self.close_connection = True
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


class Web(ThreadingHTTPServer):
    """A server of a folder, by TLS where it is given a certificate.

    Attributes:
        script: name -> answers to come, the last of them for ever.
        gets: requests, by name.
        posted: what came with them.
        latency: seconds before each answer.
        connections: how often somebody connected, whatever was said then.
        peak: most requests that waited for their answer at the same time.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path, certificate: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self._scheme = "https" if certificate else "http"
        if certificate:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(certificate)
            # hands are shaken at the first reading, in the connection's own thread
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.folder = folder
        self.script: dict[str, list[Answer]] = {}
        self.gets: Counter[str] = Counter()
        self.posted: list[bytes] = []
        self.latency = 0.0
        self.connections = 0
        self.peak = self._waiting = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.server_port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections += 1
        super().process_request(request, client_address)

    @contextmanager
    def waits(self) -> Iterator[None]:
        """A request waits. It ends before the answer begins: whoever has that may ask for the next at once."""
        with self.lock:
            self._waiting += 1
            self.peak = max(self.peak, self._waiting)
        try:
            yield
        finally:
            with self.lock:
                self._waiting -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: clients hang up here."""


@contextmanager
def web(folder: Path, certificate: Path | None = None) -> Iterator[Web]:
    """A running web server."""
    server = Web(folder, certificate)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def well(handler: Handler, data: bytes) -> None:
    handler.head(200, len(data))
    handler.wfile.write(data)


def truncates(handler: Handler, data: bytes) -> None:
    """Announces all, sends half, hangs up."""
    handler.head(200, len(data))
    handler.wfile.write(data[: len(data) // 2])
    handler.close_connection = True


def cuts_unannounced(handler: Handler, data: bytes) -> None:
    """Announces no length, sends half."""
    handler.head(200, None)
    handler.wfile.write(data[: len(data) // 2])


def resets(handler: Handler, data: bytes) -> None:
    """Sends half, then a TCP reset."""
    handler.head(200, len(data))
    handler.wfile.write(data[: len(data) // 2])
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())
    handler.close_connection = True


def hangs_up(handler: Handler, data: bytes) -> None:
    """Answers nothing."""
    handler.close_connection = True


def stalls(handler: Handler, data: bytes) -> None:
    """Sends half, then nothing for longer than anyone waits."""
    handler.head(200, len(data))
    handler.wfile.write(data[: len(data) // 2])
    handler.wfile.flush()
    time.sleep(3)
    handler.close_connection = True


def drips(handler: Handler, data: bytes) -> None:
    """Is never silent and never done."""
    handler.head(200, len(data))
    for at in range(len(data)):
        handler.wfile.write(data[at : at + 1])
        handler.wfile.flush()
        time.sleep(0.05)


def says_too_little(handler: Handler, data: bytes) -> None:
    """Announces half, sends all."""
    handler.head(200, len(data) // 2)
    handler.wfile.write(data)
    handler.close_connection = True


def says_too_much(handler: Handler, data: bytes) -> None:
    """Announces more than there is, and hangs up after what there is."""
    handler.head(200, len(data) + 100)
    handler.wfile.write(data)
    handler.close_connection = True


def sends_more(handler: Handler, data: bytes) -> None:
    well(handler, data + b"more")


def flips_a_bit(handler: Handler, data: bytes) -> None:
    well(handler, data[:100] + bytes([data[100] ^ 1]) + data[101:])


def status(code: int, **headers: str) -> Answer:
    def answer(handler: Handler, data: bytes) -> None:
        handler.head(code, 0, **headers)

    return answer
