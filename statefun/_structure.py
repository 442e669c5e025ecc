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
import dataclasses
import itertools
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax

from ._compat import Tracer

TreeDef = Any
"""A `jax.tree_util.PyTreeDef`, which type checkers don't know as a type."""


class _ArraySlot:
    def __repr__(self) -> str:
        return "*"


ARRAY = _ArraySlot()
"""Stands for an array among the static leaves of a structure or a cache key."""


class _Identity:
    """A key for an object that can't be hashed: equal to itself only."""

    __slots__ = ("obj",)

    def __init__(self, obj: Any):
        self.obj = obj

    def __hash__(self) -> int:
        return id(self.obj)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.obj is other.obj

    def __repr__(self) -> str:
        return repr(self.obj)


_PLAIN_KEYS = frozenset({str, bytes, int, bool, type(None), type, types.FunctionType})


def static_key(leaf: Any) -> Any:
    """A hashable that is equal for two static leaves exactly if they are the same.

    Type and value count: `1`, `1.0` and `True` are three keys, and so are `0.0` and
    `-0.0`; `nan` is equal to itself, or every call with one would retrace. The same
    holds for what sits in a tuple, a frozenset or a frozen dataclass.
    """
    kind = type(leaf)
    if kind in _PLAIN_KEYS:
        return kind, leaf
    try:
        hash(leaf)
    except TypeError:
        return kind, _Identity(leaf)
    numbers: list[Any] = []
    _numbers_in(leaf, numbers)
    if not numbers:
        return kind, leaf
    exact = tuple(numbers)
    # A nan is not equal to another nan: there the bits have to do.
    return (kind, exact) if isinstance(leaf, _NUMBERS) else (kind, leaf, exact)


def is_identity(key: Any) -> bool:
    """Whether a `static_key` stands for an object that can't be hashed."""
    return type(key[1]) is _Identity


def treedef_key(treedef: TreeDef) -> Any:
    """`treedef`, made strict about the static fields of modules.

    Tree structures compare static fields with `==`, under which `1`, `1.0` and `True`
    are the same. The numbers among them are added, exactly.
    """
    known = _keys.get(treedef)
    fingerprint = _fingerprint(treedef)
    if known is not None and known[0] == fingerprint:
        return known[1]
    numbers: list[Any] = []
    _numbers_of(treedef, numbers)
    key = (treedef, tuple(numbers)) if numbers else treedef
    while len(_keys) >= 256:
        _keys.pop(next(iter(_keys), None), None)
    _keys[treedef] = fingerprint, key
    return key


# Looking for the numbers visits every node in Python. For a tree that was seen before it
# is enough that it is equal, and that its static fields are the very same objects. The
# treedef that is kept here keeps these alive, so that their ids stay theirs.
_keys: dict[TreeDef, tuple[list[int], Any]] = {}


def _fingerprint(treedef: TreeDef) -> list[int]:
    found: list[Any] = []
    treedef.walk(lambda _, aux: found.append(aux), id, range(treedef.num_leaves))
    flat = itertools.chain.from_iterable(
        aux if type(aux) in (tuple, list) else (aux,) for aux in found
    )
    return [id(x) for x in flat]


_BUILTIN = (tuple, list, type(None), dict)


def _numbers_of(treedef: TreeDef, out: list[Any]) -> None:
    node = treedef.node_data()
    if node is None:  # a leaf
        return
    kind, aux = node
    if kind not in _BUILTIN:
        _numbers_in(aux, out)
    for child in treedef.children():
        _numbers_of(child, out)


_NUMBERS = (bool, int, float, complex, np.generic)


def _numbers_in(static: Any, out: list[Any]) -> None:
    """Appends what `==` doesn't tell apart: numbers exactly, and the types of subclasses
    (an enum member is equal to its value, a named tuple to a tuple)."""
    kind = type(static)
    if kind is str or static is None:
        return
    if isinstance(static, np.generic):
        out.append((kind, static.dtype, static.tobytes()))
    elif isinstance(static, float):
        out.append((kind, static.hex()))
    elif isinstance(static, complex):
        out.append((kind, static.real.hex(), static.imag.hex()))
    elif isinstance(static, int):
        out.append((kind, int(static)))
    elif isinstance(static, str | bytes):
        out.append(kind)
    elif isinstance(static, tuple | list):
        if kind is not tuple:
            out.append(kind)
        for item in static:
            _numbers_in(item, out)
    elif isinstance(static, dict):
        if kind is not dict:
            out.append(kind)
        for key, item in static.items():
            _numbers_in(key, out)
            _numbers_in(item, out)
    elif isinstance(static, set | frozenset):
        inside: list[Any] = []
        for item in static:
            _numbers_in(item, inside)
        out.append((kind, frozenset(inside)))
    elif dataclasses.is_dataclass(static) and not isinstance(static, type):
        for field in dataclasses.fields(static):
            _numbers_in(getattr(static, field.name, None), out)


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


# Re-entrant: a finalizer that touches a State may run anywhere in here.
_lock = threading.RLock()
_interned: weakref.WeakValueDictionary[Any, Structure] = weakref.WeakValueDictionary()


def _intern(treedef: TreeDef, statics: tuple) -> Structure:
    key = treedef_key(treedef), tuple(map(static_key, statics))
    with _lock:
        structure = _interned.get(key)
        if structure is None:
            structure = _interned[key] = Structure(treedef, statics, key)
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


def normalise(value: Any, old: Callable[[], Any] = lambda: None) -> Any:
    """Numbers and NumPy arrays of a value become jax arrays.

    This holds for the value itself and inside its plain tuples, lists and dicts. Inside
    an `eqx.Module` Equinox's rule stands: a Python float is static.

    **Arguments:**

    - `value`: what is written.
    - `old`: gives the value that is replaced. A Python number takes the dtype of the
        array at its place; `old` is called only if there is a number.

    **Raises:** `TypeError` if a Python number doesn't fit the dtype it has to take.
    """
    kind = type(value)
    if kind is dict:
        return {
            k: normalise(v, lambda k=k: _item(old(), dict, k)) for k, v in value.items()
        }
    if kind is tuple or kind is list:
        return kind(
            normalise(v, lambda i=i: _item(old(), kind, i)) for i, v in enumerate(value)
        )
    if kind in _PYTHON_NUMBERS:
        present = old()
        if isinstance(present, jax.Array):
            return _number_like(value, present.dtype)
        return jnp.asarray(value)
    if isinstance(value, np.ndarray | np.number | np.bool_):
        return jnp.asarray(value)
    return value


_PYTHON_NUMBERS = (bool, int, float, complex)


def _item(container: Any, kind: type, key: Any) -> Any:
    if type(container) is not kind:
        return None
    if kind is dict:
        return container.get(key)
    return container[key] if key < len(container) else None


def _number_like(value: Any, dtype: Any) -> jax.Array:
    """The number as an array of this dtype, if it stays the same number."""
    refusal = TypeError(f"the number {value!r} does not fit the dtype {dtype}")
    if jnp.issubdtype(dtype, jnp.inexact):
        if isinstance(value, complex) and not jnp.issubdtype(
            dtype, jnp.complexfloating
        ):
            raise refusal
        try:
            overflows = np.isfinite(value) and abs(value) > float(jnp.finfo(dtype).max)
        except OverflowError:
            raise refusal from None
        except TypeError:  # an integer that is too large for NumPy
            overflows = abs(value) > float(jnp.finfo(dtype).max)
        if overflows:
            raise refusal
    elif dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.integer):
        low, high = (0, 1) if dtype == jnp.bool_ else _range(dtype)
        if isinstance(value, complex) or value != value // 1:
            raise refusal
        if not low <= value <= high:
            raise refusal
    else:  # a random key
        raise refusal
    return jnp.asarray(value, dtype)


def _range(dtype: Any) -> tuple[int, int]:
    info = jnp.iinfo(dtype)
    return int(info.min), int(info.max)


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
