"""A value, split into its arrays and everything else.

A State keeps its value flat: the arrays in a list, and beside it a `Structure`, which
knows how to put the value together again. Flattening an `eqx.Module` runs Python code
for every node; done once, when the value is written, it is off the path of every call
that only passes the arrays on.

Structures are interned: two values with equal structure share one `Structure` object,
so the hot path compares with `is`.
"""

from __future__ import annotations

import collections
import functools
import weakref
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax

from .._compat import Tracer
from .._state.static import static_key, treedef_key

TreeDef = Any
"""A `jax.tree_util.PyTreeDef`, which type checkers don't know as a type."""


class _ArraySlot:
    def __repr__(self) -> str:
        return "*"


ARRAY = _ArraySlot()
"""Stands for an array among the static leaves of a structure or a cache key."""


class Structure:
    """How a value is put together from its arrays."""

    __slots__ = ("__weakref__", "key", "mutable", "slots", "statics", "treedef")

    def __init__(self, treedef: TreeDef, statics: tuple, key: Any):
        self.treedef = treedef
        self.statics = statics  # a leaf each; ARRAY where there is an array
        self.slots = tuple(i for i, leaf in enumerate(statics) if leaf is ARRAY)
        self.key = key
        self.mutable = _has_mutable_node(treedef)

    def unflatten(self, flat: Any) -> Any:
        if self is LEAF:
            return flat
        if len(self.slots) == len(self.statics):
            return self.treedef.unflatten(flat)
        leaves = list(self.statics)
        for i, array in zip(self.slots, flat, strict=True):
            leaves[i] = array
        return self.treedef.unflatten(leaves)

    def paths(self) -> list[str]:
        """The key path of every array, in the order of the flat value."""
        tree = self.treedef.unflatten(range(len(self.statics)))
        where = {i: jtu.keystr(path) for path, i in jtu.tree_leaves_with_path(tree)}
        return [where[i] for i in self.slots]

    def __repr__(self) -> str:
        return f"Structure({self.treedef}, {self.statics})"


def _has_mutable_node(treedef: TreeDef) -> bool:
    node = treedef.node_data()
    if node is None:
        return False
    if issubclass(node[0], list | dict | collections.deque):
        return True
    return any(map(_has_mutable_node, treedef.children()))


# Without a lock, which an interrupt might leave locked and a finalizer might wait for:
# the one step that matters, `setdefault`, is atomic.
_interned: dict[Any, weakref.ref[Structure]] = {}


def _ref(structure: Structure, key: Any) -> weakref.ref[Structure]:
    # `interned.pop(key, ref)`: no Python code runs when a structure goes.
    return weakref.ref(structure, functools.partial(_interned.pop, key))


def _intern(treedef: TreeDef, statics: tuple) -> Structure:
    key = treedef_key(treedef), tuple(map(static_key, statics))
    known = _interned.get(key)
    structure = None if known is None else known()
    while structure is None:
        if known is not None and _interned.get(key) is known:
            _interned.pop(key, None)
        new = Structure(treedef, statics, key)
        known = _interned.setdefault(key, _ref(new, key))
        structure = known()
    return structure


LEAF = _intern(jtu.tree_structure(0), (ARRAY,))
"""The structure of a value that is one array: its flat form is the array itself."""


def flatten(value: Any) -> tuple[Any, Structure]:
    """Splits a value into its arrays and its structure.

    The flat form of a single array is the array, of everything else a list of arrays.
    """
    leaves, treedef = jtu.tree_flatten(value)
    flat, statics = [], []
    for leaf in leaves:
        if eqx.is_array(leaf):
            flat.append(strengthen(leaf))
            statics.append(ARRAY)
        else:
            statics.append(leaf)
    structure = _intern(treedef, tuple(statics))
    return (flat[0] if structure is LEAF else flat), structure


def leaves_of(flat: Any, structure: Structure) -> Sequence[Any]:
    """The arrays of a flat value, as a sequence also where there is only one."""
    return (flat,) if structure is LEAF else flat


def flat_of(leaves: Sequence[Any], structure: Structure) -> Any:
    """The inverse of `leaves_of`."""
    return leaves[0] if structure is LEAF else list(leaves)


def strengthen(array: Any) -> jax.Array:
    """A jax array without weak type.

    A weakly typed State would change type at the first `value + 1` with a strong
    operand, and the second step would be traced anew.
    """
    if not isinstance(array, jax.Array):
        array = jnp.asarray(array)
    if getattr(array, "weak_type", False):  # typed keys have none
        array = lax.convert_element_type(array, array.dtype)
    return array


def same(a: Any, b: Any) -> bool:
    """Whether two leaves are the same, to the bit: a nan is the same as a nan.

    **Raises:** `TypeError` if one of them is a tracer, of which that can't be known.
    """
    if a is b:
        return True
    if not (eqx.is_array(a) and eqx.is_array(b)):
        return bool(static_key(a) == static_key(b))
    if isinstance(a, Tracer) or isinstance(b, Tracer):
        raise TypeError("it is not known yet whether two traced arrays are the same")
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()
