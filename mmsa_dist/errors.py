"""One exception root, one exit code a branch.

`ConfigError` (2) and `DataError` (3) are never retried, `TransientError` (75) may be. `TrainingError` (4) is a
run that cannot go on: a loss that is not finite, say. `StoppedError` (129, 130, 143) is none: somebody asked for it.
"""

import signal

from shards.errors import ConfigError, DataError, MmsaError, TransientError


class TrainingError(MmsaError):
    """Training itself went wrong (loss not finite, diverged ranks). Never retried."""

    exit_code = 4


class StoppedError(MmsaError):
    """A run was asked to end by a signal, and did in good order: it can be gone on with."""

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


__all__ = ["ConfigError", "DataError", "MmsaError", "StoppedError", "TrainingError", "TransientError"]
