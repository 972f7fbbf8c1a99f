"""Where MLflow keeps runs and models: which store, whether it is there, and what a user is told when it is not.

MLflow is imported inside the functions: it costs two seconds, and no rank needs it to train.
"""

import http.client
import logging
import os
import re
import socket
import sqlite3
import ssl
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from mmsa_dist.errors import ConfigError, TransientError

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASES = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""Schemes of database stores, each with its standard port."""

DATABRICKS = ("databricks", "databricks-uc")
"""MLflow's own names for a Databricks workspace, bare or with ``://PROFILE``; its credentials lie elsewhere."""

SECRETS = "password|passwd|pwd|token|secret|key"
"""In the name of a parameter whose value is nobody's business."""

TIMEOUT = 5.0
"""Seconds within which a server must answer its first call."""

REMEDY = (
    "start one (mlflow server --host 127.0.0.1 --port 5000), name another with --tracking-uri, "
    "or train without it (--tracking.no-enabled)"
)


def store_uri(uri: str | None, runs_dir: Path) -> str:
    """The store to use: `uri`, else MLFLOW_TRACKING_URI, else ``mlflow.db`` in the folder of the runs.

    Relative sqlite paths become absolute: ranks have other working directories.

    Raises:
        ConfigError: a plain folder, which MLflow no longer writes to; a scheme that it does not know; what is no
            address; a password, which would be saved with the recipe.
    """
    if uri and shown(uri) != uri:
        raise ConfigError(
            f"tracking uri {shown(uri)}: it holds a password or the like, which would be saved with the run; give it "
            "in the environment as MLFLOW_TRACKING_URI, or as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    given = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not given:
        return f"sqlite:///{runs_dir.resolve() / 'mlflow.db'}"
    if given in DATABRICKS:
        return given
    scheme = _parts(given).scheme.split("+")[0]
    if scheme == "sqlite":
        path = given.partition(":///")[2]
        if not path or path.startswith(":memory:"):
            raise ConfigError(
                f"tracking uri {given!r} names no file, so nothing would be kept; use sqlite:///runs/mlflow.db"
            )
        return f"sqlite:///{Path(path).resolve()}"
    if scheme in ("", "file") or len(scheme) == 1:
        folder = Path(given.removeprefix("file://")).resolve()
        raise ConfigError(
            f"tracking uri {given!r} is a plain folder, where MLflow no longer keeps runs; "
            f"use sqlite:///{folder / 'mlflow.db'} or a server's address (http://…)"
        )
    if scheme not in ("http", "https", *DATABRICKS, *DATABASES):
        raise ConfigError(
            f"tracking uri: unknown scheme {scheme!r}; use sqlite:///…, http://…, https://… or postgresql://…"
        )
    return given


def shown(text: str) -> str:
    """`text` without the credentials of an address in it: users and passwords, and parameters named like one.

    Rather too much is left out than too little: a password may hold ``@``, and ``/`` where nobody escaped it. Only a
    file's path is an address in which ``@`` means nothing.
    """
    text = re.sub(r"(?<!sqlite)(?<!file)://\S*@", "://…@", text)
    return re.sub(rf"(?i)\b([\w.-]*(?:{SECRETS})[\w.-]*)(=|%3D)[^&\s]+", r"\1\2…", text)


def connect(uri: str) -> "MlflowClient":
    """A client of the store, which was reached.

    Raises:
        TransientError: it cannot be reached within a few seconds.
        ConfigError: what answers is not MLflow, or wants other credentials.
    """
    _reach(uri)
    quiet()
    from mlflow import MlflowClient

    with said(uri):
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)  # the first call also creates the tables of a new database
    return client


@contextmanager
def said(uri: str) -> Iterator[None]:
    """What MLflow raises inside becomes one of our sentences."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        text = shown(" ".join(str(error.message).split()))  # it names the address, password included
        if "<html" in text.lower():
            raise _stranger(uri) from error
        if error.get_http_status_code() in (401, 403):
            raise ConfigError(
                f"MLflow at {shown(uri)} refuses these credentials ({text[:200]}); "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            ) from error
        if error.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"):
            raise TransientError(f"MLflow at {shown(uri)} failed: {text[:300]}; try again, or {REMEDY}") from error
        raise ConfigError(f"MLflow at {shown(uri)} refuses: {text[:300]}") from error
    except OSError as error:  # requests' exceptions are OSErrors too
        raise TransientError(f"MLflow at {shown(uri)} cannot be used ({shown(str(error))}); {REMEDY}") from error


def artifact_root(uri: str, runs_dir: Path) -> str | None:
    """Where a new experiment keeps its files: beside a sqlite file, or beside the runs where the store is a database
    that we write to ourselves; a server decides for itself (None)."""
    if uri.startswith("sqlite"):
        runs_dir = Path(uri.removeprefix("sqlite:///")).parent
    elif _scheme(uri) not in DATABASES:
        return None
    return (runs_dir / "mlartifacts").resolve().as_uri()


def quiet() -> None:
    """MLflow says only what is wrong, sends no telemetry, and gives up on a dead server in seconds, not minutes.

    What the user set in the environment stays.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import mlflow  # noqa: F401  its import configures the loggers below

    for name in ("mlflow", "alembic", "huey", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"mlflow\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"mlflow\.")


def _reach(uri: str) -> None:
    """Raises TransientError within seconds where nothing answers; MLflow itself would try for minutes."""
    parts = _parts(uri)
    scheme = _scheme(uri)
    if scheme == "sqlite":
        _reach_file(Path(uri.removeprefix("sqlite:///")))
    elif scheme in ("http", "https"):
        host = parts.netloc.rpartition("@")[2]  # urllib takes no credentials, and this page needs none
        health = parts._replace(netloc=host, path=f"{parts.path.rstrip('/')}/health").geturl()
        try:
            with urllib.request.urlopen(health, timeout=TIMEOUT):
                pass
        except urllib.error.HTTPError:
            pass  # something answers; MLflow's first call says what is wrong with it
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLError):
                return  # it answers; whether its certificate is to be trusted is MLflow's own setting
            raise TransientError(f"no MLflow server answers at {shown(uri)} ({reason}); {REMEDY}") from error
        except http.client.HTTPException as error:  # another protocol
            raise _stranger(uri) from error
    elif scheme in DATABASES:
        try:
            port = parts.port or DATABASES[scheme]
            with socket.create_connection((parts.hostname or "localhost", port), timeout=TIMEOUT):
                pass
        except OSError as error:
            raise TransientError(f"no database answers at {shown(uri)} ({error}); {REMEDY}") from error
        _log_in(uri)


def _log_in(uri: str) -> None:
    """Connects to a database once; MLflow would try ten times, and end in its driver's own words.

    Raises:
        ConfigError: its driver is not installed, or it lets nobody in. TransientError: it cannot be used just now.
    """
    from sqlalchemy import create_engine
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
    from sqlalchemy.pool import NullPool

    limits = {"connect_timeout": int(TIMEOUT)} if _scheme(uri) == "postgresql" else {}
    try:
        create_engine(uri, poolclass=NullPool, connect_args=limits).connect().close()
    except ImportError as error:
        what = "pip install 'mmsa-dist[postgres]'" if _scheme(uri) == "postgresql" else "see its driver's manual"
        raise ConfigError(
            f"tracking uri {shown(uri)}: the database's driver is not installed here ({error}); {what}"
        ) from error
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(f"tracking uri {shown(uri)}: {shown(_told(error))}") from error
    except SQLAlchemyError as error:
        text = shown(_told(getattr(error, "orig", None) or error))
        if re.search(r"authentication|password|does not exist|pg_hba|denied", text, re.IGNORECASE):
            raise ConfigError(
                f"the database at {shown(uri)} lets nobody in so ({text}); give user, password and database as they "
                "are, in MLFLOW_TRACKING_URI"
            ) from error
        raise TransientError(f"the database at {shown(uri)} cannot be used ({text}); {REMEDY}") from error


def _told(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _scheme(uri: str) -> str:
    """Without the driver's name: ``postgresql`` of ``postgresql+psycopg://…``."""
    return _parts(uri).scheme.split("+")[0]


def _parts(uri: str) -> SplitResult:
    """The parts of `uri`.

    Raises:
        ConfigError: it is no address.
    """
    try:
        parts = urlsplit(uri)
        valid = parts.port != 0
        if parts.scheme in ("http", "https"):
            valid = valid and bool(parts.hostname) and not re.search(r"\s", uri)
    except ValueError:  # its text would show a piece of a password that holds a "/"
        valid = False
    if not valid:
        raise ConfigError(
            f"tracking uri {shown(uri)!r} is no address; expected http://HOST:PORT, postgresql://HOST/DATABASE or "
            "sqlite:///FILE"
        )
    return parts


def _stranger(uri: str) -> ConfigError:
    return ConfigError(f"what answers at {shown(uri)} is not an MLflow server; give its address with --tracking-uri")


def _reach_file(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        created = not file.exists()
        with file.open("ab"):
            pass
        if created:
            file.unlink()
    except OSError as error:
        raise TransientError(
            f"{file}: MLflow's database cannot be written ({error.strerror}); "
            "give another with --tracking-uri sqlite:///FILE, or train without it (--tracking.no-enabled)"
        ) from error
    head = b"" if created else file.open("rb").read(16)
    if head and not head.startswith(b"SQLite format 3"):
        raise ConfigError(
            f"{file}: is not a sqlite database, so MLflow cannot keep runs in it; give another with --tracking-uri"
        )
    if head:
        _check_sound(file)


def _check_sound(file: Path) -> None:
    """Raises ConfigError where sqlite cannot make sense of its file; MLflow would try ten times to. One that is locked
    is whole."""
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=0.1)) as database:
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:
        pass
    except sqlite3.DatabaseError as error:
        raise ConfigError(
            f"{file}: MLflow's database is damaged ({error}); put a copy back, or give another with --tracking-uri"
        ) from error
