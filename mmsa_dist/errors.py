"""One exception root, one exit code a branch.

`ConfigError` (2) and `DataError` (3) are never retried, `TransientError` (75) may be. `TrainingError` (4) is a
run that cannot go on: a loss that is not finite, say.
"""

from shards.errors import ConfigError, DataError, MmsaError, TransientError


class TrainingError(MmsaError):
    """Training itself went wrong (loss not finite, diverged ranks). Never retried."""

    exit_code = 4


__all__ = ["ConfigError", "DataError", "MmsaError", "TrainingError", "TransientError"]
