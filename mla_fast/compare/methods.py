"""The methods that are compared, by name, and the hyperparameters that a search tries for each.

A method of ``mla_fast.baselines`` is a model; one of MLA is the options of its optimizer. To add one, put it into ``METHODS``
here or there.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mla_fast import baselines
from mla_fast.baselines import MLA_SETTINGS, JointModel
from mla_fast.baselines.missing import MISSING_METHODS, FittedModel

# Tried for every method, the default first: a factor of the learning rate, and weight decay.
COMMON_GRID: dict[str, Sequence[Any]] = {"lr_factor": (1.0, 0.3, 3.0), "weight_decay": (0.0, 1e-4, 1e-3)}


class Method(NamedTuple):
    """A joint model, or without one an MLAOptimizer with these settings, of which ``"interaction"`` is the head beside it.

    grid: the values of its own hyperparameters, the default first.
    """

    model: type[JointModel] | type[FittedModel] | None
    settings: Mapping[str, Any]
    grid: Mapping[str, Sequence[Any]]


METHODS: dict[str, Method] = {name: Method(model, {}, model.grid) for name, model in baselines.METHODS.items()}
METHODS |= {
    name: Method(None, settings, {} if settings["projection"] == "none" else {"alpha": (1.0, 0.1, 10.0)})
    for name, settings in MLA_SETTINGS.items()
}
METHODS |= {
    name: Method(None, {**MLA_SETTINGS["MLA window"], "interaction": gradient}, {"alpha": (1.0, 0.1, 10.0)})
    for name, gradient in (("MLA + interaction", "encoders"), ("MLA + detached interaction", "detached"))
}

# Made for missing modalities, at feature level: compared where some are taken away.
MISSING: dict[str, Method] = {name: Method(model, {}, model.grid) for name, model in MISSING_METHODS.items()}
TABLE_2 = ["Late fusion", "QMF", *MISSING, "MLA rls"]  # the rows of the paper's table


def find(name: str) -> Method:
    """Return a method of ``METHODS`` or ``MISSING``."""
    return METHODS[name] if name in METHODS else MISSING[name]


def trials(name: str, count: int) -> list[dict[str, Any]]:
    """Return the hyperparameters of each trial: the defaults, and then points of the grid in an order that is always the same.

    Raises ValueError if the method has fewer points than `count`.
    """
    grid = {**COMMON_GRID, **find(name).grid}
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if not 1 <= count <= len(points):
        raise ValueError(f"trials: expected 1 to {len(points)}, the points of the grid of {name}, got {count}")
    others = points[1:]
    random.Random(0).shuffle(others)
    return [points[0], *others[: count - 1]]


def select(names: Sequence[str], modalities: int, more: Mapping[str, Method] | None = None) -> tuple[list[str], list[str]]:
    """Return the methods to compare and those left out because they are defined for another number of modalities.

    names: of methods, or ``["all"]``; more: methods beside ``METHODS`` that may be named.

    Raises ValueError for an unknown name, and for one that is named and not defined.
    """
    known = [*METHODS, *(more or {})]
    wanted = list(METHODS) if list(names) == ["all"] else list(dict.fromkeys(names))
    for name in wanted:
        if name in MISSING and name not in known:
            raise ValueError(
                f"methods: expected --protocol beside {name}, which is for missing modalities, got none: --missing 0.3 "
                "--protocol cpm takes some away, --protocol cpm alone takes data that lack some as they are"
            )
        if name not in known:
            raise ValueError(f"methods: expected all, or some of {', '.join(known)}; got {name!r}")
    if not wanted:
        raise ValueError(f"methods: expected all, or some of {', '.join(known)}; got none")
    undefined = [name for name in wanted if _defined_for(name) not in (None, modalities)]
    if undefined and list(names) != ["all"]:
        expected = f"methods for {modalities} modalities"
        raise ValueError(f"methods: expected {expected}, got {undefined[0]!r}, which is for {_defined_for(undefined[0])}")
    return [name for name in wanted if name not in undefined], undefined


def _defined_for(name: str) -> int | None:
    model = find(name).model
    return None if model is None else model.defined_for
