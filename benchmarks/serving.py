"""How fast `mlflow models serve` answers on loopback, beside the model's own code in one process on the same rows.

Self-MM, trained for an epoch on generated data of MOSI's shapes and registered, is served by a real server process.
1, 8 and 32 clients each hold a connection open and ask for one utterance after the other, its features as lists of
numbers, then as .npy files in base64. Bodies are made before; what is timed is a request, from its first byte sent to
its answer read. The limit is what the model takes for one utterance in a process that has it as arrays: what is above
it is JSON, HTTP and waiting.

Clients run on the same machine and take their share of it.
"""

import argparse
import base64
import http.client
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.prediction import trained
from benchmarks.record import Row, Table, record

NAME = "served"
ROWS = 64
"""Different utterances that are asked for."""
HEAD = {"Content-Type": "application/json"}
PATIENCE = 240.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="(default: 1 8 32)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each number of clients (default: %(default)s)")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmsa-serving-") as made:
        folder = Path(made)
        run = trained(folder, "--register", NAME)
        asked = {form: requests(run, folder / "small", form) for form in FORMS}
        limit = in_process(run, folder / "small", options.seconds)
        with served(folder) as port:
            ask(port, asked["lists"], 1, min(5.0, options.seconds))  # warms up
            found = {
                (form, clients): ask(port, asked[form], clients, options.seconds)
                for form in FORMS
                for clients in options.clients
            }
    rows = []
    for (form, clients), seconds in found.items():
        who = f"{clients} client{'s' * (clients > 1)} with {form}"
        size = sum(map(len, asked[form])) / len(asked[form]) / 1e3
        how = f"{len(seconds):,} requests in {options.seconds:.0f} s, {size:,.0f} kB each"
        rows += [
            Row(f"serving, {who}: p50", 1e3 * quantile(seconds, 0.5), "ms", how=how, headline=clients == 1),
            Row(f"serving, {who}: p99", 1e3 * quantile(seconds, 0.99), "ms", how=how, headline=clients == 1),
            Row(f"serving, {who}", len(seconds) / options.seconds, "requests/s", how=how),
        ]
    rows.append(Row("the model in one process, an utterance at a time: p50", 1e3 * quantile(limit, 0.5), "ms"))
    for row in rows:
        print(f"{row.what}: {row.value:,.2f} {row.unit} ({row.how})")
    shown = {
        **{f"{clients} clients, {form}": each for (form, clients), each in found.items()},
        "in one process": limit,
    }
    table = Table(
        "One utterance of MOSI's shapes a request",
        ["", "p50 ms", "p99 ms", "a second"],
        [
            [name, f"{1e3 * quantile(each, 0.5):.1f}", f"{1e3 * quantile(each, 0.99):.1f}", f"{per_second(each):.0f}"]
            for name, each in shown.items()
        ],
    )
    if not options.no_record:
        record("serving", rows, tables=[table], raw=dict(shown))


def quantile(seconds: list[float], share: float) -> float:
    return float(np.quantile(seconds, share))


def per_second(seconds: list[float]) -> float:
    return 1 / statistics.mean(seconds)


def utterances(run: Path, data: Path) -> tuple[Any, list[Any]]:
    """The model of a run, and what it is asked about."""
    from mmsa_dist.predictor import Predictor
    from shards.index import Index
    from shards.read import ShardReader

    index = Index.load(data)
    with ShardReader(index) as reader:
        return Predictor.load(run), reader.samples(list(index.numbers("test"))[:ROWS], with_text=True)


def npy(array: np.ndarray) -> str:
    """A .npy file of float32 in base64."""
    file = io.BytesIO()
    np.save(file, array.astype(np.float32), allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "lists": lambda array: array.astype(float).round(4).tolist(),
    "npy": npy,
}
"""How features are sent."""


def requests(run: Path, data: Path, form: str = "lists") -> list[bytes]:
    """The body of a request for each utterance."""
    predictor, asked = utterances(run, data)
    bodies = []
    for each in asked:
        held: dict[str, Any] = {name: FORMS[form](array) for name, array in each.modalities.items()}
        held["raw_text"] = each.raw_text
        record = {column: held.get(column) for column in predictor.columns}
        bodies.append(json.dumps({"dataframe_records": [record]}).encode())
    return bodies


def in_process(run: Path, data: Path, seconds: float) -> list[float]:
    """Seconds that the model takes for an utterance."""
    predictor, asked = utterances(run, data)
    for each in asked:
        predictor.predict([each])
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        predictor.predict([asked[len(taken) % len(asked)]])
        taken.append(time.perf_counter() - began)
    return taken


@contextmanager
def served(folder: Path) -> Iterator[int]:
    """`mlflow models serve` on the registered model; its port on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    words = ["models", "serve", "-m", f"models:/{NAME}/1", "--env-manager", "local", "--host", "127.0.0.1"]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'runs' / 'mlflow.db'}",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words, "--port", str(port)],
            cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"error: no server:\n{(folder / 'server.log').read_text()}") from None
                time.sleep(0.2)
        yield port
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # its own group: the server is its child
            process.wait()


def ask(port: int, bodies: list[bytes], clients: int, seconds: float) -> list[float]:
    """Seconds of every request that was answered, of so many clients at once.

    Raises:
        SystemExit: a request was refused.
    """
    taken: list[list[float]] = [[] for _ in range(clients)]
    wrong: list[str] = []
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        turn = number
        while time.perf_counter() < end and not wrong:
            began = time.perf_counter()
            connection.request("POST", "/invocations", bodies[turn % len(bodies)], HEAD)
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                wrong.append(f"{answer.status}: {text[:300].decode(errors='replace')}")
            taken[number].append(time.perf_counter() - began)
            turn += 1
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise SystemExit(f"error: a request was answered with {wrong[0]}")
    return [each for own in taken for each in own]


if __name__ == "__main__":
    main()
