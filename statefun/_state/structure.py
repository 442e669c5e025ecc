"""A value, split into its arrays and everything else.

A State keeps its value flat: the arrays in a list, and beside it a `Structure`, which
knows how to put the value together again. Flattening an `eqx.Module` runs Python code
for every node; done once, when the value is written, it is off the path of every call
that only passes the arrays on.

Structures are interned: two values with equal structure share one `Structure` object,
so the hot path compares with `is`.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import weakref
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax

from .._compat import Tracer, array_class
from .._state.static import static_key, treedef_key

TreeDef = Any
"""A `jax.tree_util.PyTreeDef`, which type checkers don't know as a type."""


class _ArraySlot:
    def __repr__(self) -> str:
        return "*"


ARRAY = _ArraySlot()
"""Stands for an array among the static leaves of a structure or a cache key."""


class Holder:
    """A leaf of a value that holds a value of its own: a State."""

    __slots__ = ()


class _Place(int):
    """Stands for the first, second, … State of a value in the form of its structure."""


class Structure:
    """How a value is put together from its arrays.

    **Attributes:**

    - `states`: the States in the value, each once, in the order of the leaves.
    - `form`: the structure with numbers in their place: two values that differ only in
        which States they hold have the same form.
    """

    __slots__ = (
        "__weakref__",
        "form",
        "key",
        "mutable_nodes",
        "slots",
        "states",
        "statics",
        "treedef",
    )

    def __init__(self, treedef: TreeDef, statics: tuple, key: Any):
        self.treedef = treedef
        self.statics = statics  # a leaf each; ARRAY where there is an array
        self.slots = tuple(i for i, leaf in enumerate(statics) if leaf is ARRAY)
        self.key = key
        self.mutable_nodes = _mutable_nodes(treedef)
        found = {id(x): x for x in statics if isinstance(x, Holder)}
        self.states: tuple[Any, ...] = tuple(found.values())
        self.form = self
        if found:
            place = {i: _Place(n) for n, i in enumerate(found)}
            form = tuple(place.get(id(leaf), leaf) for leaf in statics)
            self.form = _intern(treedef, form)

    @property
    def mutable(self) -> bool:
        """Whether a value can be changed in place."""
        return self.mutable_nodes is not None

    def around(self, states: Sequence[Any]) -> Structure:
        """The same form around other States, as many as there are in `states`."""
        statics = (
            states[leaf] if type(leaf) is _Place else leaf for leaf in self.form.statics
        )
        return _intern(self.treedef, tuple(statics))

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

    def state_paths(self) -> list[str]:
        """The first key path of every State, in the order of `states`."""
        tree = self.treedef.unflatten(self.form.statics)
        where: dict[int, str] = {}
        for path, leaf in jtu.tree_leaves_with_path(tree):
            if type(leaf) is _Place:
                where.setdefault(leaf, jtu.keystr(path))
        return [where[i] for i in sorted(where)]

    def __repr__(self) -> str:
        return f"Structure({self.treedef}, {self.statics})"


MutableNodes = tuple[type, Any, tuple]
"""The part of a tree that leads to mutable nodes: the kind of its root, the keys of a
dict (of other mutable nodes something that is not None), and for each child the same or
None."""


def _mutable_nodes(treedef: TreeDef) -> MutableNodes | None:
    node = treedef.node_data()
    if node is None:
        return None
    kind, keys = node
    children = tuple(map(_mutable_nodes, treedef.children()))
    if kind is dict or kind is list:
        return kind, keys, children
    immutable = tuple | types.NoneType | eqx.Module | functools.partial
    if not (issubclass(kind, immutable) or _is_frozen(kind)):
        return kind, (), children
    return None if all(child is None for child in children) else (kind, None, children)


@functools.lru_cache(maxsize=1024)
def _is_frozen(kind: type) -> bool:
    """Whether it is a dataclass that refuses to have its fields set."""
    if not dataclasses.is_dataclass(kind) or kind.__setattr__ is object.__setattr__:
        return False
    try:
        for field in dataclasses.fields(kind):
            setattr(object.__new__(kind), field.name, None)
    except dataclasses.FrozenInstanceError:
        return True
    except Exception:  # an own `__setattr__` may want more of an instance than this one
        return False
    return False


# Without a lock, which an interrupt might leave locked and a finalizer might wait for:
# the one step that matters, `setdefault`, is atomic.
_interned: dict[Any, weakref.ref[Structure]] = {}


def _ref(structure: Structure, key: Any) -> weakref.ref[Structure]:
    # `interned.pop(key, ref)`: no Python code runs when a structure goes.
    return weakref.ref(structure, functools.partial(_interned.pop, key))


def _intern(treedef: TreeDef, statics: tuple) -> Structure:
    # A State is itself, in frames (where it can be hashed) and outside; a structure keeps
    # its States, so their ids stay theirs.
    keys = (id(x) if isinstance(x, Holder) else static_key(x) for x in statics)
    key = treedef_key(treedef), tuple(keys)
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
    if type(value) is array_class():  # what most States hold
        return strengthen(value) if value.weak_type else value, LEAF
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


def is_shaped(x: Any) -> bool:
    """Whether it is an array, or a `jax.ShapeDtypeStruct` that stands for one."""
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def with_shapes(flat: Any, structure: Structure) -> tuple[Sequence[Any], Structure]:
    """The leaves and the structure of a value whose shapes are taken for arrays."""
    if not any(isinstance(x, jax.ShapeDtypeStruct) for x in structure.statics):
        return leaves_of(flat, structure), structure
    leaves = jtu.tree_leaves(structure.unflatten(flat))
    statics = tuple(ARRAY if is_shaped(leaf) else leaf for leaf in leaves)
    return [x for x in leaves if is_shaped(x)], _intern(structure.treedef, statics)


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
