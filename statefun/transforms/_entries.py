"""States of which each step of a loop sees one entry."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jec
import jax.numpy as jnp

from .._errors import StateValueError, message
from .._state import access
from .._state.cell import UNSET, Cell, Value, Values
from .._state.state import State
from .._state.structure import flat_of, leaves_of
from ._state_axes import check_axis, mesh_axis
from ._twin import run_pure


class Entries:
    """States of which each step of a loop sees one entry, as of an array in `xs`.

    **Arguments:**

    - `twin`: its name, for errors.
    - `axis_of`: the axis of a State along which it is sliced; None if it is shared.
    - `steps`: how many there are.
    """

    def __init__(self, twin: str, axis_of: Callable[[Cell], int | None], steps: int):
        self._twin = twin
        self.axis_of = axis_of
        self.steps = steps

    def avals(self, cell: Cell, value: Value) -> list[Any] | None:
        """What a step sees of a State's arrays; None if it is shared.

        **Raises:** `statefun.StateValueError` if there is not one entry for each step.
        """
        axis = self.axis_of(cell)
        if axis is None or value[0] is UNSET:
            return None
        avals = [jax.typeof(x) for x in leaves_of(*value)]
        check_axis(self._twin, cell, avals, axis, self.steps)
        self._check_sharding(cell, avals, axis)
        return [jec.mapped_aval(self.steps, axis % a.ndim, a) for a in avals]

    def _check_sharding(self, cell: Cell, avals: list[Any], axis: int) -> None:
        for aval in avals:
            if mesh_axis(aval, axis) is not None:
                raise StateValueError(
                    message(
                        f"`{self._twin}` maps {cell.describe()} along axis {axis}, which "
                        f"is sharded by {mesh_axis(aval, axis)}.",
                        "the axes of the mesh are explicit, and then JAX wants what a "
                        "loop takes step by step to be whole on every device.",
                        "shard another axis of the State's value, by `jax.device_put`, or "
                        "make the axes of the mesh `jax.sharding.AxisType.Auto`.",
                    )
                )

    def in_front(self) -> list[tuple[Any, int | None]]:
        """The `state_axes` of a twin inside that sees the entries along axis 0."""
        return [(lambda s: self.axis_of(s._cell) is not None, 0), (State, None)]

    def to_front(self, cell: Cell, value: Value) -> Value:
        """The value with the entries along axis 0."""
        return _moved(value, self.axis_of(cell) or 0, 0)

    def from_front(self, cell: Cell, value: Value) -> Value:
        """The inverse of `to_front`."""
        return _moved(value, 0, self.axis_of(cell) or 0)


NO_ENTRIES = Entries("", lambda cell: None, 0)


def _moved(value: Value, source: int, to: int) -> Value:
    if source == to:
        return value
    return _on_arrays(lambda x: jnp.moveaxis(x, source, to), value)


def _on_arrays(f: Callable[..., Any], value: Value, *rest: Value) -> Value:
    structure = value[1]
    arrays = map(f, *(leaves_of(flat, structure) for flat, _ in (value, *rest)))
    return flat_of(list(arrays), structure), structure


def run_on_part(
    entries: Entries, run: Callable[[], Any], start: int, shape: tuple[int, ...]
) -> Any:
    """Runs a function that sees a part of the States that hold entries.

    Of each of them it sees the entries from `start` on, as many as `shape` has place for
    and arranged as it says, along the leading axes; what it writes takes their place.

    **Returns:** the result, its new States packed.
    """
    stop = start + math.prod(shape)

    def part(x: Any) -> Any:
        return part_of(x, start, shape)

    def whole(old: Any, new: Any) -> Any:
        new = new.reshape(stop - start, *old.shape[1:])
        if stop - start == old.shape[0]:
            return new
        return jnp.concatenate([old[:start], new, old[stop:]])

    def view(cell: Cell, value: Value) -> Value:
        if entries.avals(cell, value) is None:
            return value
        return _on_arrays(part, entries.to_front(cell, value))

    def updated(cell: Cell, value: Value) -> Value:
        if entries.axis_of(cell) is None:
            return value
        before = entries.to_front(cell, access.read(cell))
        _check_unchanged(cell, _on_arrays(part, before), value)
        return entries.from_front(cell, _on_arrays(whole, before, value))

    out, written = run_pure(run, view=view)
    written = written.without(written.created)
    values = Values((c, updated(c, v)) for c, v in written.values.items())
    dataclasses.replace(written, values=values).write()
    return out


def part_of(x: Any, start: int, shape: tuple[int, ...]) -> Any:
    """Entries of an array from `start` on, arranged along leading axes of that shape."""
    return x[start : start + math.prod(shape)].reshape(*shape, *x.shape[1:])


def _check_unchanged(cell: Cell, old: Value, new: Value) -> None:
    before, after = ([jax.typeof(x) for x in leaves_of(*v)] for v in (old, new))
    if old[1] is not new[1]:
        what = f"a value of structure {new[1]}, in place of {old[1]}"
    elif [(a.shape, a.dtype) for a in before] != [(a.shape, a.dtype) for a in after]:
        show = [", ".join(a.str_short() for a in avals) for avals in (after, before)]
        what = f"{show[0]} in place of {show[1]}"
    else:
        return
    raise StateValueError(
        message(
            f"{what} was written to {cell.describe()}.",
            "the State holds several entries, of which one was to be replaced; they keep "
            "one structure, shape and dtype.",
            "write a value like the one that is there.",
        )
    )
