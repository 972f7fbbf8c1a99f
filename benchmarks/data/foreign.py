"""Packages that only these benchmarks use, and that may be missing: see benchmarks/README.md."""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any


def installed(package: str) -> bool:
    """Whether it can be imported; an empty name always can."""
    return not package or package in sys.modules or importlib.util.find_spec(package) is not None


def streaming() -> Any:
    """The part of mosaicml-streaming that reads and writes.

    Its front door also imports data sets of pictures, and with them torchvision, which none of this uses and which no
    CPU build of torch goes with; so the door is passed by.
    """
    if "streaming" not in sys.modules:
        spec = importlib.util.find_spec("streaming")
        assert spec is not None and spec.submodule_search_locations is not None
        package = ModuleType("streaming")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["streaming"] = package
    return importlib.import_module("streaming.base")


def load(package: str) -> None:
    """Imports it before the clock starts."""
    if package == "streaming":
        streaming()
    elif package:
        importlib.import_module(package)
