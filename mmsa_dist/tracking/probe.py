"""Whether a tracking store answers and can be written to, by the very calls that training makes.

A program for `mmsa-dist doctor`, which reads one line of JSON from it: ``python -m mmsa_dist.tracking.probe``, with the
store in MLFLOW_TRACKING_URI. What is written is an empty registered model, which is gone when it is deleted; an
experiment or a run would stay in the store as a deleted one.
"""

import json
import os
import secrets
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmsa_dist.errors import MmsaError, TransientError
from mmsa_dist.tracking import store


def probe(uri: str) -> dict[str, Any]:
    """Seconds that reading and writing took, and where the store lets its clients write files; of a sqlite file that is
    not there, that the first run can make it.

    Raises:
        ConfigError: it is no store, or lets nobody in. TransientError: it does not answer.
    """
    file = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite") and not file.exists():  # the first call would take seconds to make one
        there = next(each for each in file.parents if each.exists())
        if not os.access(there, os.W_OK):
            raise TransientError(
                f"{file}: cannot be made, as {there} cannot be written to; name another --tracking-uri"
            )
        return {"uri": uri, "made_later": True}
    began = time.monotonic()
    client = store.connect(uri)
    with store.said(uri):
        default = client.get_experiment("0")
        took = time.monotonic() - began
        name, began = f"mmsa-dist-doctor-{secrets.token_hex(4)}", time.monotonic()
        try:
            client.create_registered_model(name, description="written by mmsa-dist doctor; may be deleted")
        finally:
            # also what a call made that was stopped before its answer came
            with suppress(Exception):
                client.delete_registered_model(name)
    return {
        "uri": store.shown(uri),
        "read_s": took,
        "write_s": time.monotonic() - began,
        "artifacts": getattr(default, "artifact_location", None),
    }


def main() -> int:
    """Entry; 0, or the exit code of what went wrong, with its sentence on standard error."""
    try:
        told = probe(store.store_uri(None, Path("runs")))
    except MmsaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    sys.exit(main())
