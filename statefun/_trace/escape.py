"""States that a traced function makes, and that outlive its trace.

A State in the result comes out as a new one in every run. One that the function leaves
somewhere else (in a dict, an attribute, a closure) has a value for as long as the trace
goes on, and is neither read nor written by the compiled function, which is what runs from
then on: that has to be an error, at the end of the trace.

Not every State that is alive then was left somewhere. JAX keeps closures: those of custom
rules and callbacks in the jaxpr, others in the caches of its jitted functions. So a State
counts as left behind only if the function itself can reach it.
"""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Iterable
from typing import Any

from .._errors import left_behind
from .._state.cell import Cell


def refuse_left_behind(created: Iterable[Cell], *roots: Any) -> None:
    """Raises if one of the States can still be reached.

    **Arguments:**

    - `created`: the States that were made in a trace that is over, and whose values end
        with it.
    - `roots`: the function, and whatever else lives on.
    """
    if not _alive(created):
        return
    gc.collect()  # a recursive function or a caught exception makes a cycle
    alive = _alive(created)
    cell = _first_reached(roots, alive) if alive else None
    if cell is not None:
        raise left_behind(cell)


def _alive(created: Iterable[Cell]) -> dict[int, Cell]:
    return {
        id(cell.handle()): cell
        for cell in created
        if cell.handle is not None and cell.handle() is not None
    }


def _first_reached(roots: Iterable[Any], wanted: dict[int, Cell]) -> Cell | None:
    """One of the objects that can be reached by way of anything but JAX's own."""
    closed = {
        id(vars(module))
        for name, module in list(sys.modules.items())
        if isinstance(module, types.ModuleType) and _root(name) in _LIBRARIES
    }
    seen: set[int] = set()
    todo = [*roots]
    while todo:
        found = {id(x): x for x in gc.get_referents(*todo)}
        for key in found.keys() & wanted.keys():
            return wanted[key]
        todo = [
            x
            for key, x in found.items()
            if key not in seen and key not in closed and not _is_jax(x)
        ]
        seen.update(found)
    return None


_LIBRARIES = ("jax", "jaxlib", "equinox")


def _root(module: Any) -> str:
    return str(module).partition(".")[0]


def _is_jax(x: Any) -> bool:
    return _root(type(x).__module__) in ("jax", "jaxlib")
