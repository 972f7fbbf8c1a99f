"""What a registered model needs to be installed where it is to answer: few packages, and the versions of all that they
bring, as they were where it was logged."""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution

REQUIREMENTS = ("torch", "numpy", "safetensors", "pydantic", "pyyaml", "tyro", "pyarrow", "pandas", "mlflow")
"""What a model needs to answer; transformers beside them where it reads text through an encoder."""


def requirements(encoder: bool) -> list[str]:
    """`REQUIREMENTS`, pinned; without a local version such as ``+cpu``, which no index has.

    Args:
        encoder: the model reads text through one.
    """
    return [_pin(name) for name in (*REQUIREMENTS, *(["transformers"] if encoder else []))]


def constraints(names: Iterable[str]) -> list[str]:
    """The pins of `names` and of all that they bring, directly or not, as far as it is installed here.

    A file of them constrains: what another machine does not need (libraries of CUDA, say) is not installed there.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, str] = {}
    waiting = [(name, "") for name in names]
    seen = set(waiting)
    while waiting:
        name, extra = waiting.pop()
        try:
            package = distribution(name)
        except PackageNotFoundError:  # for another system, or it does without
            continue
        found[canonicalize_name(name)] = _pin(name)
        for text in package.requires or []:
            needed = Requirement(text)
            if needed.marker is not None and not needed.marker.evaluate({"extra": extra}):
                continue
            for each in [(needed.name, ""), *((needed.name, wanted) for wanted in needed.extras)]:
                if each not in seen:
                    seen.add(each)
                    waiting.append(each)
    return [found[name] for name in sorted(found)]


def _pin(name: str) -> str:
    return f"{name}=={distribution(name).version.partition('+')[0]}"
