"""Keys of what is static: type and value count, for leaves and for static fields."""

from __future__ import annotations

import dataclasses
import itertools
import types
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._compat import Tracer

TreeDef = Any
"""A `jax.tree_util.PyTreeDef`, which type checkers don't know as a type."""


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


_PLAIN_KEYS = frozenset({str, bytes, int, bool, type(None), type})
_WEAK_KEYS = (weakref.ref, weakref.WeakMethod)


class _ByEq:
    """A key for an object whose own `==` decides, where that gives an answer.

    The `==` of an array gives an array, and that of some classes raises, which must not
    happen in a look-up among unrelated keys: such an object is equal to itself only.
    """

    __slots__ = ("_hash", "obj")

    def __init__(self, obj: Any):
        self.obj = obj
        try:
            self._hash = hash(obj)
        except TypeError:
            self._hash = hash(type(obj))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _ByEq):
            return False
        if self.obj is other.obj:
            return True
        try:
            return type(self.obj) is type(other.obj) and bool(self.obj == other.obj)
        except Exception:  # whatever it raises, it has not said that they are equal
            return False

    def __repr__(self) -> str:
        return repr(self.obj)


def static_key(leaf: Any) -> Any:
    """A hashable that is equal for two static leaves exactly if they are the same.

    Type and value count: `1`, `1.0` and `True` are three keys, and so are `0.0` and
    `-0.0`; `nan` is equal to itself, or every call with one would retrace. The same
    holds for what sits in a tuple, a frozenset or a frozen dataclass.

    What is equal to itself only (a function, an object without `__eq__`) is held weakly:
    once it is gone nobody can pass it again, and a key must not keep it, nor what it
    closes over, alive.
    """
    kind = type(leaf)
    if kind in _PLAIN_KEYS:
        return kind, leaf
    if kind is types.FunctionType:
        return kind, weakref.ref(leaf)
    if kind is types.MethodType and type(leaf.__self__).__eq__ is object.__eq__:
        return kind, weakref.WeakMethod(leaf)
    if kind.__eq__ is object.__eq__ and kind.__weakrefoffset__:
        return kind, weakref.ref(leaf)
    try:
        hash(leaf)
    except TypeError:
        return kind, _Identity(leaf)
    return exact_key(leaf)


def is_weak(key: Any) -> bool:
    """Whether a `static_key` holds its leaf weakly."""
    return type(key) is tuple and type(key[1]) in _WEAK_KEYS


def is_identity(key: Any) -> bool:
    """Whether a `static_key` stands for an object that can't be hashed."""
    return type(key[1]) is _Identity


_LARGE = 1 << 20  # bytes; such an array is not read back from its device to compare it


def array_key(array: Any) -> Any:
    """A hashable that is equal for two arrays of the same type and content."""
    if isinstance(array, Tracer) or array.nbytes > _LARGE:
        return type(array), _Identity(array)
    dtype = array.dtype
    weak = getattr(array, "weak_type", False)  # NumPy's arrays have none
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    array = np.asarray(array)
    if array.dtype.hasobject:
        return type(array), _Identity(array)
    return type(array), dtype, weak, array.shape, array.tobytes()


def exact_key(static: Any) -> Any:
    """As `static_key`, and for lists, dicts, sets and arrays by what they hold.

    `==` doesn't tell apart some numbers, nor a subclass from its base (an enum member is
    equal to its value, a named tuple to a tuple).
    """
    kind = type(static)
    if kind in _PLAIN_KEYS:
        return kind, static
    if isinstance(static, np.generic):
        return kind, static.dtype, static.tobytes()
    if isinstance(static, float):
        return kind, static.hex()
    if isinstance(static, complex):
        return kind, static.real.hex(), static.imag.hex()
    if isinstance(static, int):
        return kind, int(static)
    if isinstance(static, tuple | list):
        return kind, tuple(map(exact_key, static))
    if isinstance(static, dict):
        return kind, tuple((exact_key(k), exact_key(v)) for k, v in static.items())
    if isinstance(static, set | frozenset):
        return kind, frozenset(map(exact_key, static))
    if isinstance(static, np.ndarray | jax.Array):
        return array_key(static)
    if dataclasses.is_dataclass(static) and not isinstance(static, type):
        # Its `==` may compare less than its fields, and takes 1 for 1.0 in them.
        fields = [
            getattr(static, f.name, None)
            for f in dataclasses.fields(static)
            if f.compare
        ]
        return kind, _ByEq(static), tuple(map(exact_key, fields))
    return kind, _ByEq(static)


class TreeKey:
    """What a tree structure is filed under: exact about the static fields of modules.

    Tree structures compare static fields with `==`: there `1`, `1.0` and `True` are the
    same, and arrays raise.
    """

    __slots__ = ("_exact", "_hash", "treedef")

    def __init__(self, treedef: TreeDef):
        self.treedef = treedef
        self._exact = _exact_treedef(treedef)
        self._hash = hash(self._exact)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, TreeKey)
            and self._hash == other._hash
            and self._exact == other._exact
        )

    def __repr__(self) -> str:
        return repr(self.treedef)


def treedef_key(treedef: TreeDef) -> TreeKey:
    """A hashable that is equal for two structures exactly if they are the same."""
    place = _place(treedef)
    known = _keys.get(place)
    if known is not None:
        key, watched = known
        unchanged = all(exact_key(obj) == exact for obj, exact in watched)
        if unchanged and key.treedef == treedef:
            return key
    key = TreeKey(treedef)
    while len(_keys) >= 256:
        _keys.pop(next(iter(_keys), None), None)
    _keys[place] = key, [(obj, exact_key(obj)) for obj in _mutable_statics(treedef)]
    return key


# Making a key visits every node in Python. For a tree that was seen before it is enough
# that it is equal, that its static fields are the very same objects (which `==` of
# structures sees first, so no `==` of a user's class is asked), and that those which can
# change in place have not. The treedef that is kept here keeps these alive, so that their
# ids stay theirs.
_keys: dict[Any, tuple[TreeKey, list[tuple[Any, Any]]]] = {}


def _place(treedef: TreeDef) -> tuple[int, ...]:
    found: list[Any] = []
    treedef.walk(lambda _, aux: found.append(aux), id, range(treedef.num_leaves))
    flat = itertools.chain.from_iterable(
        aux if type(aux) in (tuple, list) else (aux,) for aux in found
    )
    return hash(treedef), *map(id, flat)


def _exact_treedef(treedef: TreeDef) -> Any:
    node = treedef.node_data()
    if node is None:
        return None  # a leaf
    kind, aux = node
    return kind, exact_key(aux), tuple(map(_exact_treedef, treedef.children()))


def _mutable_statics(treedef: TreeDef) -> list[Any]:
    """The static fields that a user may change in place."""
    found: list[Any] = []

    def look(static: Any) -> None:
        if isinstance(static, tuple | frozenset):
            for item in static:
                look(item)
        elif isinstance(static, list | dict | set | np.ndarray) or (
            dataclasses.is_dataclass(static) and not isinstance(static, type)
        ):
            found.append(static)

    def visit(_: Any, aux: Any) -> None:
        if type(aux) is not list:  # the keys of a dict, made for the occasion
            look(aux)

    treedef.walk(visit, id, range(treedef.num_leaves))
    return found
