"""Whether a Ray cluster can be where its address says; Ray itself would try for minutes."""

import socket

from shards.errors import ConfigError, TransientError


def check_listens(address: str, option: str) -> None:
    """Connects once.

    Args:
        address: ``host:port`` or ``ray://host:port``.
        option: that gave it, as messages name it.

    Raises:
        ConfigError: it is no such address. TransientError: nothing answers there.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{option}: {address!r} is not host:port, ray://host:port or auto")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise TransientError(
            f"{option}: no Ray cluster answers at {address}: {error.strerror or error}; start one (ray start --head) "
            "or leave the address out"
        ) from error
