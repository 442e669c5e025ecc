"""What a function returns: how it is taken apart, and put together in every run."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Container, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from .._errors import StateTypeError, message
from .._state import access
from .._state.cell import Cell
from .._state.state import Shell, State
from .._state.static import TreeDef
from .._state.structure import ARRAY, flatten


class Packed(eqx.Module):
    """In a result, the place of a State that the function made: its value, a subtree.

    Transforms see the arrays (vmap stacks them), and every run makes its own State.
    """

    value: Any
    shell: Shell = eqx.field(static=True)
    index: int = eqx.field(static=True)  # among the new States, so that sharing is kept


@dataclasses.dataclass(frozen=True)
class Argument:
    """In a result, the place of a State that came in as a leaf of an argument."""

    index: int


class Reference:
    """The place of a State in something that is cached: held weakly.

    A cache must not keep a State alive; its owner notices when it is gone.
    """

    __slots__ = ("_state", "cell")

    def __init__(self, state: State):
        self.cell = state._cell
        self._state = weakref.ref(state)

    def __call__(self) -> State:
        state = self._state()
        assert state is not None, "what refers to a State that is gone is not used"
        return state


def pack(
    out: Any, created: Container[Cell], arg_index: Mapping[Cell, int] | None = None
) -> Any:
    """A result with its new States taken apart: a tree that JAX can work on.

    **Arguments:**

    - `out`: what the function returned.
    - `created`: the States that were made while it ran.
    - `arg_index`: the stand-ins for the States of the arguments, by position.
    """
    made: dict[Cell, Packed] = {}

    def replace(leaf: Any) -> Any:
        if not isinstance(leaf, State):
            return leaf
        cell = leaf._cell
        if arg_index is not None and cell in arg_index:
            return Argument(arg_index[cell])
        if cell not in created:
            return leaf
        if cell in made:  # its value comes with the first occurrence
            return Packed(None, leaf._shell(), made[cell].index)
        made[cell] = Packed(None, leaf._shell(), len(made))
        flat, structure = access.current(cell)
        value = jtu.tree_map(replace, structure.unflatten(flat))
        return Packed(value, leaf._shell(), made[cell].index)

    return jtu.tree_map(replace, out)


def unpack(tree: Any, arg_states: Sequence[Any] = ()) -> Any:
    """The inverse of `pack`: makes new States."""
    made: dict[int, State] = {}

    def replace(leaf: Any) -> Any:
        if type(leaf) is Argument:
            return arg_states[leaf.index]
        if type(leaf) is Reference:
            return leaf()
        if type(leaf) is Packed:
            if leaf.index not in made:
                made[leaf.index] = leaf.shell.state(*flatten(inside(leaf.value)))
            return made[leaf.index]
        return leaf

    def inside(tree: Any) -> Any:
        return jtu.tree_map(replace, tree, is_leaf=lambda x: type(x) is Packed)

    return inside(tree)


_LEAF = jtu.tree_structure(0)
_NONE = jtu.tree_structure(None)


@dataclasses.dataclass(frozen=True)
class OutTree:
    """How a result is put together from the arrays that the jaxpr returns."""

    treedef: TreeDef
    leaves: tuple  # ARRAY, or a static leaf
    only_arrays: bool
    packed: bool  # whether there is anything to unpack

    @property
    def is_array(self) -> bool:
        return self.only_arrays and self.treedef == _LEAF

    @property
    def is_none(self) -> bool:
        return self.treedef == _NONE

    def cells(self) -> list[Cell]:
        """The States that were there before and are part of the result."""
        return [leaf.cell for leaf in self.leaves if type(leaf) is Reference]

    def build(self, arrays: Sequence[Any], arg_states: Sequence[Any] = ()) -> Any:
        if self.only_arrays:
            tree = self.treedef.unflatten(arrays)
        else:
            rest = iter(arrays)
            tree = self.treedef.unflatten(
                [next(rest) if leaf is ARRAY else leaf for leaf in self.leaves]
            )
        return unpack(tree, arg_states) if self.packed else tree


def flatten_out(
    out: Any, created: Container[Cell], arg_index: Mapping[Cell, int] | None = None
) -> tuple[list[Any], OutTree]:
    """Splits a function's result into arrays and layout. Arguments as of `pack`."""
    leaves = jtu.tree_leaves(out)
    has_states = any(isinstance(leaf, State) for leaf in leaves)
    packed = pack(out, created, arg_index) if has_states else out
    leaves, treedef = jtu.tree_flatten(packed)
    arrays = [leaf for leaf in leaves if eqx.is_array(leaf)]
    spec = tuple(
        ARRAY
        if eqx.is_array(leaf)
        else Reference(leaf)
        if isinstance(leaf, State)
        else leaf
        for leaf in leaves
    )
    return arrays, OutTree(treedef, spec, len(arrays) == len(leaves), has_states)


def bare_state(tree: Any, path: str = "") -> tuple[str, State] | None:
    """The first State that is `tree` itself or sits in its plain tuples, lists, dicts."""
    if isinstance(tree, State):
        return path, tree
    if type(tree) in (tuple, list):
        items = [(f"[{i}]", x) for i, x in enumerate(tree)]
    elif type(tree) is dict:
        items = [(f"[{k!r}]", x) for k, x in tree.items()]
    else:
        return None
    for key, x in items:
        found = bare_state(x, path + key)
        if found is not None:
            return found
    return None


def refuse_bare_state(tree: Any, role: str) -> None:
    found = bare_state(tree)
    if found is None:
        return
    path, state = found
    raise StateTypeError(
        message(
            f"{state._cell.describe()} was {role}{f' at `{path}`' if path else ''}.",
            "a State is not data that flows through a function: the function reads and "
            "writes it in place.",
            "use the State through the function's closure or as a leaf of an "
            "`eqx.Module` argument; pass and return `state.value` where the value is "
            "meant.",
        )
    )
