"""`state_axes` and `state_specs`: which States a mapped function holds a piece of.

One rule serves all twins that map: a State that comes in as a leaf of a mapped argument
goes with the argument's arrays, one that is reached in any other way is shared, and
`state_axes` overrides both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from .._call.args import spread_prefix
from .._errors import StateTypeError, StateValueError, message
from .._state import access
from .._state.cell import UNSET, Cell
from .._state.state import State
from .._state.structure import leaves_of
from .._trace.result import bare_state


class Rule:
    """What holds for a State: the first pair that matches decides, then its argument.

    **Arguments:**

    - `keyword`: the name of the twin's keyword, for errors.
    - `spec`: None, something that holds for all States, or a list of pairs of a State, a
        kind or a predicate, and what holds for these.
    - `is_item`: whether it is something that can hold for a State.
    - `arguments`: what holds for the States that come in by a mapped argument.
    """

    def __init__(
        self,
        keyword: str,
        spec: Any,
        is_item: Callable[[Any], bool],
        arguments: Mapping[Cell, Any] | None = None,
    ):
        self._for_all = spec if is_item(spec) else None
        pairs = () if spec is None or is_item(spec) else _pairs(keyword, spec)
        self._arguments = arguments or {}
        for pattern, item in pairs:
            if item is not None and not is_item(item):
                raise _wrong(keyword, spec, f"{item!r} is given for {pattern!r}")
        # By cell: a State that is an argument as well has a stand-in.
        self._pairs = [(p._cell if isinstance(p, State) else p, i) for p, i in pairs]
        # A State that is named is part of the function, whatever that reaches it by.
        access.touch(p for p, _ in self._pairs if isinstance(p, Cell))

    def __call__(self, cell: Cell) -> Any:
        """What holds for the State; None if it is shared."""
        if self._for_all is not None:
            return self._for_all
        for pattern, item in self._pairs:
            if _matches(pattern, cell):
                return item
        return self._arguments.get(cell)


def _pairs(keyword: str, spec: Any) -> tuple[tuple[Any, Any], ...]:
    try:
        pairs = tuple((pattern, item) for pattern, item in spec)
    except (TypeError, ValueError) as error:
        raise _wrong(keyword, spec, f"it is {spec!r}") from error
    for pattern, _ in pairs:
        if not isinstance(pattern, State) and not callable(pattern):
            raise _wrong(keyword, spec, f"{pattern!r} stands for the States")
    return pairs


def _wrong(keyword: str, spec: Any, what: str) -> StateTypeError:
    named = [s._cell.describe() for s in jtu.tree_leaves(spec) if isinstance(s, State)]
    return StateTypeError(
        message(
            f"`{keyword}` can't be understood: {what}"
            + (f", beside {', '.join(named)}." if named else "."),
            "it says for all States, or for some, along which axis they are mapped or "
            "how they are split.",
            f"`{keyword}=[(state, item), …]`, with a State, a kind of State or a "
            "predicate in each pair, or one item for all States.",
        )
    )


def _matches(pattern: Any, cell: Cell) -> bool:
    if isinstance(pattern, Cell):
        return pattern is cell
    if isinstance(pattern, type):
        return issubclass(cell.kind, pattern)
    state = None if cell.handle is None else cell.handle()
    return state is not None and bool(pattern(state))


def is_axis(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


class Passed(eqx.Module):
    """On its way through a call. Bare States in it are arguments, as those of modules."""

    tree: Any

    @staticmethod
    def along(tree: Any) -> Any:
        """What is mapped, wrapped if it holds a bare State, for `open`."""
        return tree if bare_state(tree) is None else Passed(tree)

    @staticmethod
    def open(tree: Any) -> Any:
        return tree.tree if isinstance(tree, Passed) else tree


# -- by arguments --------------------------------------------------------------------


def items_of_states(twin: str, items: Any, tree: Any) -> dict[Cell, Any]:
    """What holds for each State in the arguments of a twin, by the place it stands in.

    States in the value of a State go with it.

    **Arguments:**

    - `items`: a prefix of the tree: an axis or a spec, None for what is shared, or a
        function of an array that says which.
    """
    found: dict[Cell, Any] = {}

    def note(item: Any, leaf: Any) -> None:
        if not isinstance(leaf, State):
            return
        cell = leaf._cell
        flat, structure = access.current(cell)
        if flat is UNSET:
            return
        mine = item
        if callable(item):
            each = list(dict.fromkeys(map(item, leaves_of(flat, structure))))
            mine = next(iter(each), None)
            if len(each) > 1:
                raise _two_places(twin, cell, each)
        if found.setdefault(cell, mine) != mine:
            raise _two_places(twin, cell, [found[cell], mine])
        for inner in structure.statics:
            note(item, inner)

    if any(isinstance(x, State) for x in jtu.tree_leaves(tree)):
        for item, leaf in zip(
            spread_prefix(items, tree), jtu.tree_leaves(tree), strict=True
        ):
            note(item, leaf)
    return {cell: item for cell, item in found.items() if item is not None}


def _two_places(twin: str, cell: Cell, items: list[Any]) -> StateValueError:
    return StateValueError(
        message(
            f"{cell.describe()} comes into `{twin}` along {items[0]} and along "
            f"{items[1]} (None: shared).",
            "it is one State, wherever it stands: it is mapped in one way, or shared.",
            "give all its places, and all arrays of its value, the same axis.",
        )
    )


def check_axis(
    twin: str, cell: Cell, avals: Iterable[Any], axis: int, size: int
) -> None:
    """Raises unless each array of a State has `size` entries along its axis."""
    for aval in avals:
        if not -aval.ndim <= axis < aval.ndim:
            what = "has no such axis"
        elif aval.shape[axis] != size:
            what = f"has {aval.shape[axis]} there"
        else:
            continue
        raise StateValueError(
            message(
                f"`{twin}` maps {cell.describe()} along axis {axis}, with {size} entries, "
                f"but its value, {aval.str_short()}, {what}.",
                "a State that comes in with a mapped argument, or that `state_axes` "
                "names, holds an entry for each lane or step.",
                "give the State such a value, or let it be shared: "
                "`state_axes=[(state, None)]`, or reach it by the function's closure.",
            )
        )


def mesh_axis(aval: Any, axis: int) -> Any:
    """The explicit axis of the mesh along which an axis of an array is sharded."""
    spec = aval.sharding.spec
    axis %= aval.ndim
    return spec[axis] if axis < len(spec) else None


def size_along(rule: Rule, *roots: Any) -> int | None:
    """How many entries the mapped States have, of those likely to be touched."""
    for cell in reachable(*roots):
        axis = rule(cell)
        flat, structure = access.current(cell)
        if axis is None or flat is UNSET:
            continue
        for x in leaves_of(flat, structure):
            if -x.ndim <= axis < x.ndim:
                return x.shape[axis]
    return None


def reachable(*roots: Any) -> dict[Cell, State]:
    """States that a function is likely to touch: in its arguments and its closure.

    What is missed here is found when it is read; that it is known before is only faster.
    """
    found: dict[Cell, State] = {}
    for root in roots:
        for state in _states_in(root, depth=3):
            found.setdefault(state._cell, state)
    return found


def _states_in(obj: Any, depth: int) -> Iterator[State]:
    for leaf in jtu.tree_leaves(obj):
        if isinstance(leaf, State):
            yield leaf
        elif callable(leaf) and depth > 0:
            for part in _parts(leaf):
                yield from _states_in(part, depth - 1)


def _parts(fun: Any) -> Iterator[Any]:
    if isinstance(fun, functools.partial):
        yield fun.func
        yield fun.args
        yield fun.keywords
    yield getattr(fun, "__self__", None)
    yield getattr(fun, "__wrapped__", None)
    for cell in getattr(fun, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
