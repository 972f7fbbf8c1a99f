"""Words of a command that look like secrets: everybody who sees the dashboard sees a job's command line."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from cluster.errors import ConfigError

KINDS = {
    "a password within an address": re.compile(
        r"[a-z][a-z0-9+.-]*://[^/\s:@]*:(?!\d+/)[^\s@]+@|https?://[^/\s:@?#]{16,}@", re.IGNORECASE
    ),
    "an AWS access key": re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    "an access token": re.compile(
        r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}|xox[abprs]-[\w-]{10,}"
        r"|sk-[\w-]{20,}|AIza[\w-]{35}|ya29\.[\w-]{20,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+)"
    ),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a signed address": re.compile(
        r"[?&](?:X-Amz-Signature|X-Goog-Signature|Signature|sig|token|access_token|api_key|password|passwd|pwd)=[^&\s]+"
    ),
}
"""What it is -> how it looks, wherever in a word it stands."""
NAMED = re.compile(
    r"(?:^|[-_.])(?:password|passwd|pwd|secret|token|api[-_]?key|access[-_]?key|secret[-_]?key|credentials?)$",
    re.IGNORECASE,
)
"""Names of options and variables whose values are secrets, unless they say where one lies."""

KEY = re.compile(r"access[-_]?key$", re.IGNORECASE)
"""Those of them whose values are never the place of one."""


def refuse(command: list[str]) -> None:
    """Refuses a command that tells a secret.

    Raises:
        ConfigError: one of its words looks like one; the message does not show it.
    """
    for where, kind in _found(command):
        raise ConfigError(
            f"{where} holds {kind}, and a job's command line is shown to everybody who sees the cluster's dashboard; "
            "give it to the nodes instead: in a file that they have, or in the environment that the cluster is started "
            "with (MLFLOW_TRACKING_URI, MLFLOW_TRACKING_PASSWORD, AWS_SHARED_CREDENTIALS_FILE, …)"
        )


def _found(command: list[str]) -> Iterator[tuple[str, str]]:
    for at, word in enumerate(command):
        option, equals, value = word.partition("=")
        before = command[at - 1] if at else ""
        follows = before.startswith("--") and before != "--" and "=" not in before
        where = option if word.startswith("--") and equals else before if follows else f"word {at + 1} of the command"
        for kind, looks in KINDS.items():
            if looks.search(word):
                yield where, kind
        inner, inner_equals, inner_value = value.partition("=")  # --env=NAME=value
        if inner_equals and NAMED.search(inner) and _tells(inner_value, KEY.search(inner) is not None):
            yield option, "a secret"
        if equals and NAMED.search(option) and _tells(value, KEY.search(option) is not None):
            yield option, "a secret"
        elif not word.startswith("--") and NAMED.search(before) and _tells(word, KEY.search(before) is not None):
            yield before, "a secret"


def _tells(value: str, key: bool = False) -> bool:
    """Whether a value is a secret rather than the place of one, or a switch.

    Args:
        key: of an option for an access key, which may begin like a path.
    """
    place = PurePosixPath(value).is_absolute() and not key
    return bool(value) and not place and value.lower() not in ("true", "false", "none")
