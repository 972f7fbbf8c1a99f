"""What can go wrong on the way to a cluster, each with the exit code that the front door returns."""


class ClusterError(Exception):
    """Root of this package's errors; the text is the whole message. `exit_code` is read by the front door."""

    exit_code = 1


class ConfigError(ClusterError):
    """The command or the environment asks for something impossible. Never retried."""

    exit_code = 2


class TransientError(ClusterError):
    """The cluster cannot be reached or lost the job; trying again may help."""

    exit_code = 75
