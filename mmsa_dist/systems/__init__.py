"""The systems, one file each, behind one interface, found by name."""

from mmsa_dist.systems.base import DataSpec, Losses, Prediction, System, get_system, system, system_names
from mmsa_dist.systems.self_mm import SelfMM
from mmsa_dist.systems.ufen_mtfn import UfenMtfn

__all__ = [
    "DataSpec",
    "Losses",
    "Prediction",
    "SelfMM",
    "System",
    "UfenMtfn",
    "get_system",
    "system",
    "system_names",
]
