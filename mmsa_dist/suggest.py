"""The nearest valid name, for every message about an unknown one."""

from shards.suggest import nearest

__all__ = ["nearest"]
