"""The systems, one file each, behind one interface, found by name."""

from mmsa_dist.systems.base import DataSpec, Losses, Prediction, System, get_system, system, system_names

__all__ = ["DataSpec", "Losses", "Prediction", "System", "get_system", "system", "system_names"]
