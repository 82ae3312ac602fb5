from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel

Rule = TypeVar("Rule", bound=BaseModel)


def rules_among(names: Mapping[str, object], base: type[Rule]) -> tuple[type[Rule], ...]:
    """The rules of a slot: what a module has imported that derives from `base` and is not abstract itself."""
    return tuple(
        found
        for found in names.values()
        if isinstance(found, type)
        and issubclass(found, base)
        and found.__module__ != base.__module__
        and not inspect.isabstract(found)
    )
