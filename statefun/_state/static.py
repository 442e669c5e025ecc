"""Keys of what is static: type and value count, for leaves and for static fields."""

from __future__ import annotations

import dataclasses
import itertools
import types
import weakref
from typing import Any

import numpy as np

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
    numbers: list[Any] = []
    _numbers_in(leaf, numbers)
    if not numbers:
        return kind, leaf
    exact = tuple(numbers)
    # A nan is not equal to another nan: there the bits have to do.
    return (kind, exact) if isinstance(leaf, _NUMBERS) else (kind, leaf, exact)


def is_weak(key: Any) -> bool:
    """Whether a `static_key` holds its leaf weakly."""
    return type(key) is tuple and type(key[1]) in _WEAK_KEYS


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
