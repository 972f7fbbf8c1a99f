"""Fields of JSON members."""

from typing import Any


def field_of(content: Any, name: str) -> Any:
    """A field of a parsed JSON member, None where it is not there. ``a.b`` is b in a, unless there is one called so."""
    if not name:
        return content
    if isinstance(content, dict) and name in content:
        return content[name]
    outer, _, inner = name.partition(".")
    return field_of(content[outer], inner) if inner and isinstance(content, dict) and outer in content else None
