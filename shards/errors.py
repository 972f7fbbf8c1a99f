"""What goes wrong with data, said in a sentence: what is wrong, where, what was expected, what to do.

`mmsa_dist.errors` re-exports these; each branch has one exit code.
"""


class MmsaError(Exception):
    """Root of every error this project raises for its user; its text is the whole message they see."""

    exit_code = 1


class ConfigError(MmsaError):
    """The command, recipe or environment asks for something impossible. Never retried."""

    exit_code = 2


class DataError(MmsaError):
    """The data is not what it says it is. Never retried."""

    exit_code = 3


class TransientError(MmsaError):
    """Something outside (disk, network, server, peer) failed; trying again may help."""

    exit_code = 75
