"""How `--help` shows the options of the data commands."""

from typing import Annotated, Any

import tyro


def _default(value: str) -> str:
    """Nothing where the default is no value: the help says in words what happens then."""
    return "" if value in ("", "None") else f"(default: {value})"


def option(metavar: str) -> Any:
    """For `Annotated`: what stands for the value, and a default only where there is one."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=_default)


Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
"""Off unless given, which goes without saying."""
