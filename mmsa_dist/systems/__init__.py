"""The systems, one file each, behind one interface, found by name."""

from mmsa_dist.systems.base import DataSpec, Losses, Prediction, System, get_system, make_system, system, system_names
from mmsa_dist.systems.iam import Iam
from mmsa_dist.systems.mult import MulT
from mmsa_dist.systems.pmr import PMR
from mmsa_dist.systems.self_mm import SelfMM
from mmsa_dist.systems.sugrm import Sugrm
from mmsa_dist.systems.tam_ulag import TamUlag
from mmsa_dist.systems.ufen_mtfn import UfenMtfn

__all__ = [
    "PMR",
    "DataSpec",
    "Iam",
    "Losses",
    "MulT",
    "Prediction",
    "SelfMM",
    "Sugrm",
    "System",
    "TamUlag",
    "UfenMtfn",
    "get_system",
    "make_system",
    "system",
    "system_names",
]
