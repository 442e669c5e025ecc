"""How every twin threads States through a JAX transform.

There are two ways, one for each kind of transform.

*On values* (grad, vmap, jvp, vjp, shard_map): `run_pure` makes of the user's function one
that runs under an overlay and returns the values of the States it has written beside its
result. The transform treats them as any other output; what comes out is handed on.

*By program* (scan, while_loop, cond, switch, checkpoint): `trace_body` traces the function
to a `Program` first. Then it is known which States there are, and the transform gets the
program's pure form; `values_of` supplies what States hold, `write` hands on the results.

Both run in a `transaction`, so that a twin is all or nothing also where no other encloses
it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._errors import StateValueError, message
from .._state import access
from .._state.cell import Cell, Value, Values
from .._state.state import Param, State
from .._state.structure import Structure, flatten
from .._trace import program as _program
from .._trace.escape import refuse_left_behind
from .._trace.frame import Overlay
from .._trace.names import Named
from .._trace.program import Program
from .._trace.result import pack, refuse_bare_state
from .._trace.transaction import transaction as transaction

# -- on values ----------------------------------------------------------------------


# Not an `eqx.Module`: these are made at every call, and a dataclass is ten times cheaper.
@functools.partial(
    jtu.register_dataclass, data_fields=["values"], meta_fields=["created", "checks"]
)
@dataclasses.dataclass(frozen=True)
class Updates:
    """The values of the States that a function has written, on their way out."""

    values: Values
    created: frozenset[Cell]
    checks: bool

    def without(self, cells: Container[Cell]) -> Updates:
        """Less some States."""
        kept = Values((c, v) for c, v in self.values.items() if c not in cells)
        return Updates(
            kept, frozenset(c for c in self.created if c in kept), self.checks
        )

    def write(self) -> None:
        """Passes the values to the frame around the transform."""
        frame = access.local.frame
        assert frame is not None, "a twin runs in a transaction"
        frame.checks |= self.checks
        frame.release(self.values)
        for cell, value in self.values.items():
            (frame.create if cell in self.created else frame.write)(cell, *value)


def run_pure(
    run: Callable[[], Any],
    inside: Mapping[Cell, Value] | None = None,
    keeps: bool = False,
    view: Callable[[Cell, Value], Value] | None = None,
    sealed: bool = False,
    backward: bool = False,
    ends: bool = False,
    changes: Callable[[Cell], bool] = lambda _: True,
) -> tuple[Any, Updates]:
    """Runs a function inside a JAX transform.

    **Arguments:**

    - `run`: the user's function with its arguments.
    - `inside`: what States hold in there, where it differs from outside.
    - `keeps`, `view`, `sealed`, `changes`: see `frame.Overlay`.
    - `backward`: whether a backward pass follows before what was written is handed on.
    - `ends`: whether the values of the States that the function makes end with the
        transform. Then they are not among what was written.

    **Returns:** the result, its new States packed, and what was written.
    """
    with Overlay(inside, keeps, view, sealed, changes) as frame:
        out = run()
        refuse_bare_state(out, "returned")
        out = pack(out, frame.created)
        written = Updates(Values(frame.writes), frozenset(frame.created), frame.checks)
    if ends:
        written = written.without(written.created)
        refuse_left_behind(frame.created, run, written.values)
    if backward:
        hold(written.values)
    return out, written


def hold(cells: Iterable[Cell]) -> None:
    """Keeps the backward pass that follows in this transaction away from States."""
    frame = access.local.frame
    assert frame is not None, "a twin runs in a transaction"
    frame.hold(cells)


@functools.partial(
    jtu.register_dataclass, data_fields=["value"], meta_fields=["cell", "whole"]
)
@dataclasses.dataclass(frozen=True)
class Opened:
    """A State in a tree, opened: its value stands there, for a transform to work on.

    Where only States in its value are opened (`whole` is False), `value` has these, and
    None in all other places.
    """

    value: Any
    cell: Cell
    whole: bool = True


def open_states(
    tree: Any, which: Callable[[State], bool]
) -> tuple[Any, dict[Cell, State]]:
    """Replaces States of a tree by their values, each once.

    `Param`s in the values of States are opened, too.

    **Returns:** the tree, and the States. A State that occurs twice is opened at its
    first place; at the others an empty `Opened` stands for it.
    """
    states: dict[Cell, State] = {}

    def replace(leaf: Any, which: Callable[[State], bool]) -> Any:
        if not isinstance(leaf, State):
            return leaf
        cell = leaf._cell
        if cell in states:
            return Opened(None, cell)
        flat, structure = access.read(cell) if which(leaf) else access.current(cell)
        inner = bool(structure.states)
        if which(leaf):
            states[cell] = leaf
            value = structure.unflatten(flat)
            return Opened(inside(value, False) if inner else value, cell)
        value = inside(structure.unflatten(flat), True) if inner else None
        if not any(map(is_opened, jtu.tree_leaves(value, is_leaf=is_opened))):
            return leaf
        states[cell] = leaf
        return Opened(value, cell, whole=False)

    def inside(value: Any, only: bool) -> Any:
        def one(leaf: Any) -> Any:
            new = replace(leaf, is_param)
            return None if only and not is_opened(new) else new

        return jtu.tree_map(one, value)

    return jtu.tree_map(lambda leaf: replace(leaf, which), tree), states


def close_states(
    tree: Any, states: Mapping[Cell, State]
) -> tuple[Any, dict[Cell, Value]]:
    """The inverse of `open_states`: the tree with its States, and what they now hold."""
    inside: dict[Cell, Value] = {}

    def replace(leaf: Any) -> Any:
        if not isinstance(leaf, Opened):
            return leaf
        if leaf.value is not None and leaf.cell not in inside:
            value = jtu.tree_map(replace, leaf.value, is_leaf=is_opened)
            if leaf.whole:
                inside[leaf.cell] = flatten(value)
        return states[leaf.cell]

    return jtu.tree_map(replace, tree, is_leaf=is_opened), inside


def is_opened(x: Any) -> bool:
    return isinstance(x, Opened)


def is_param(state: State) -> bool:
    return isinstance(state, Param)


def values_at(tree: Any) -> Any:
    """The values themselves in place of the `Opened`, in every place of a State."""
    by_cell: dict[Cell, Any] = {}

    def replace(node: Any) -> Any:
        if not is_opened(node):
            return node
        if node.value is not None:  # States in it are opened, too, as in a Hessian
            by_cell[node.cell] = jtu.tree_map(replace, node.value, is_leaf=is_opened)
        return by_cell.get(node.cell)

    return jtu.tree_map(replace, tree, is_leaf=is_opened)


def only_states(tree: Any) -> Any:
    """The tree with None in place of every leaf but States."""
    return jtu.tree_map(lambda x: x if isinstance(x, State) else None, tree)


class Lanes:
    """Shared States that hold another value in every lane, and go on after it.

    See `State._in_lane`. Lane `index()` of `size`; a single lane is like none.
    """

    def __init__(self, size: int, index: Callable[[], Any]):
        self._size = size
        self._index = index
        self._split: dict[Cell, None] = {}

    def splits(self, cell: Cell) -> bool:
        """Whether the lanes see different values of the State."""
        return cell.kind._in_lane is not None and self._size > 1

    def view(self, cell: Cell, value: Value) -> Value:
        in_lane = cell.kind._in_lane
        if in_lane is None or not self.splits(cell):
            return value
        self._split[cell] = None
        flat, structure = value
        return in_lane(flat, structure, self._index(), self._size), structure

    def take_out(self, written: Updates) -> tuple[Updates, list[Cell]]:
        """What was written less these States, and those of them that were written."""
        mine = [cell for cell in written.values if cell in self._split]
        return written.without(mine), mine

    def advance(self, cells: Iterable[Cell]) -> None:
        """Writes what the States hold after the lanes."""
        for cell in cells:
            after = cell.kind._after_lanes
            flat, structure = access.read(cell)
            access.write({cell: (after(flat, structure, self._size), structure)})


# -- by program ---------------------------------------------------------------------


def split_arrays(
    tree: Any, is_array: Callable[[Any], bool] = eqx.is_array
) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays of a tree, and how to put it together around others."""
    leaves, treedef = jtu.tree_flatten(tree)
    slots = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

    def build(arrays: Sequence[Any]) -> Any:
        new = list(leaves)
        for i, x in zip(slots, arrays, strict=True):
            new[i] = x
        return treedef.unflatten(new)

    return [leaves[i] for i in slots], build


def jax_arrays(tree: Any) -> Any:
    """NumPy arrays and numbers, which `jax.lax` may return uncompiled, as jax arrays."""

    def convert(x: Any) -> Any:
        plain = isinstance(x, np.ndarray | np.generic | bool | int | float | complex)
        return jnp.asarray(x) if plain else x

    return jtu.tree_map(convert, tree)


def trace_body(
    run: Callable[..., Any],
    dynamic: Sequence[Any],
    named: Named | None = None,
    view: Callable[[Cell, Value], Sequence[Any] | None] | None = None,
) -> Program:
    """Traces the body of a transform; `run` takes the arrays one by one.

    `named` is the user's function, and what it calls these arrays: see `names.named`;
    `view` as of `frame.TracedFrame`.
    """
    return _program.trace(run, dynamic, named=named, view=view)


def values_of(cells: Iterable[Cell]) -> Values:
    """What the States hold, as reads of the frame around the transform."""
    return Values((cell, access.read(cell)) for cell in cells)


def note_checks(*programs: Program, always: bool = False) -> None:
    """Tells the frame around the transform of callbacks that may fail."""
    frame = access.local.frame
    assert frame is not None, "a twin runs in a transaction"
    frame.checks |= always or any(p.may_fail for p in programs)


def unchanged_types(
    name: str,
    program: Program,
    present_avals: Mapping[Cell, tuple[Sequence, Structure]],
) -> None:
    """Refuses a State that a loop body writes with another structure, shape or dtype."""
    for cell, structure in program.writes.items():
        old, present = present_avals[cell]
        new = program.written_avals(cell)
        if structure is not present:
            what = f"a value of structure {structure}, in place of {present}"
        elif [(a.shape, a.dtype) for a in old] != [(a.shape, a.dtype) for a in new]:
            pairs = zip(old, new, strict=True)
            a, b = next(
                p for p in pairs if (p[0].shape, p[0].dtype) != (p[1].shape, p[1].dtype)
            )
            what = f"{b.str_short()} in place of {a.str_short()}"
        else:
            continue
        raise StateValueError(
            message(
                f"the body of `{name}` wrote {what} to {cell.describe()}.",
                "every iteration runs the same compiled code, so what a State holds must "
                "keep its structure, shapes and dtypes.",
                "write a value like the one that is there (`x.astype(…)`), or give the "
                "State such a value before the loop.",
            )
        )


# -- wrappers -----------------------------------------------------------------------


class Wrapper(eqx.Module):
    """A callable made of a function, that binds as a method: base class of twins.

    A module, so that arrays and States in the function are seen by what it is passed to.
    """

    def _run(self, args: tuple, kwargs: dict) -> Any:
        """The call, in a transaction."""
        raise NotImplementedError

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        run = type(self)._run  # `self._run` makes a module of it, which takes its time
        return transaction(lambda: run(self, args, kwargs))

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else eqx.Partial(self, instance)  # type: ignore[call-arg]
