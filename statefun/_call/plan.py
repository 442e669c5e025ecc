"""What is known of a call that has been made before: all that `fast` needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._state.cell import Cell
from .._state.structure import Structure
from .compiled import Compiled, Trace
from .forms import View
from .site import Site


class Plan:
    """What a hot call does, see `fast`: which `jax.jit` it calls with which States.

    A hot call has the States of its arguments in a list, and those that the program
    reaches otherwise behind them; `places` are positions there.
    """

    __slots__ = (
        *("_arg_cells", "_written", "cells", "closure", "compiled", "epoch", "n"),
        *("places", "structures"),
    )

    def __init__(self, site: Site, compiled: Compiled, structures: Sequence[Structure]):
        index, inputs = site.arg_cells, list(enumerate(compiled.cells))
        self.compiled = compiled
        self.closure = site.base.closure  # of the function; a live view
        self.n = len(structures)
        self.cells = [c for _, c in inputs if c not in index]
        self.structures = [compiled.structures[i] for i, c in inputs if c not in index]
        self.epoch = -1  # of `shared.structures`, when these last fitted
        self._arg_cells = index
        self._written: dict[Trace, list[Any]] = {}
        others = iter(range(self.n, self.n + len(self.cells)))
        places = [index[c] if c in index else next(others) for _, c in inputs]
        in_order = places == list(range(self.n + len(self.cells)))
        self.places = None if in_order else places

    def written(self, trace: Trace, held: Sequence[Cell]) -> Sequence[Cell]:
        """The States of a call that a program of it has written."""
        if not self.n:
            return trace.written
        places = self._written.get(trace)
        if places is None:
            places = [self._arg_cells.get(c, c) for c in trace.written]
            self._written[trace] = places
        return [held[x] if isinstance(x, int) else x for x in places]


def fits(site: Site, compiled: Compiled, structures: Sequence[Structure]) -> bool:
    """Whether the States of the arguments are what a program was compiled for."""
    index = site.arg_cells
    return len(index) == len(structures) and all(
        structures[index[cell]] is structure
        for cell, structure in zip(compiled.cells, compiled.structures, strict=True)
        if cell in index
    )


def with_forms(key: Any, views: list[View]) -> Any:
    """A key of `args.recall` as `args.split` has it, and its views in order."""
    if type(key) is View:
        views.append(key)
        return key.form()
    if type(key) is tuple:
        return tuple([with_forms(part, views) for part in key])
    return key
