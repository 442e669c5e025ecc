"""The static part of an argument, interned: what the key of a call is made of."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax.tree_util as jtu

from .._compat import array_class
from .._state.cell import Cell
from .._state.state import State
from .._state.static import TreeDef, is_identity, static_key, treedef_key
from .._state.structure import ARRAY, Structure

if TYPE_CHECKING:
    from .modules import Watchlist
    from .reader import Reader


class Form:
    """What is static about an argument, and how its States are shared: interned.

    Equal to itself only, which makes it a key that is compared in no time.
    """

    __slots__ = (
        *("__weakref__", "keys", "passed", "reader", "steady", "treedef"),
        *("views", "watchlist"),
    )

    def __init__(self, treedef: TreeDef, keys: tuple):
        self.treedef = treedef
        self.keys = keys  # of the leaves
        self.passed = False  # whether a module of this form was an argument
        self.reader: Reader | None = None  # made for the second module of this form
        self.steady = True  # until a node or a static value is found that may change
        self.watchlist: Watchlist | None = None  # for modules with all fields frozen
        self.views: dict[tuple[Structure, ...], View] = {}


class View:
    """A form together with the structures that the States' values have: interned."""

    __slots__ = ("form", "structures")

    def __init__(self, form: Form, structures: tuple[Structure, ...]):
        self.form = weakref.ref(form)
        self.structures = structures


class Unhashable(TypeError):
    """A static leaf is no possible key. Whoever knows its path says so."""


# Without a lock, as structures are: the step that matters, `setdefault`, is atomic.
_forms: dict[Any, weakref.ref[Form]] = {}


def _intern(treedef: TreeDef, keys: tuple) -> Form:
    key = treedef_key(treedef), keys
    known = _forms.get(key)
    form = None if known is None else known()
    while form is None:
        if known is not None and _forms.get(key) is known:
            _forms.pop(key, None)
        new = Form(treedef, keys)
        gone = functools.partial(_forms.pop, key)  # gone(ref) runs no Python code
        known = _forms.setdefault(key, weakref.ref(new, gone))
        form = known()
    return form


def leaf_keys(leaves: Sequence[Any]) -> tuple[tuple, list[Any], list[State]]:
    """A key for every leaf, the arrays, and the States, each once.

    The key of a State says which of the States it is, so how they are shared.
    """
    keys, dynamic = [], []
    states: list[State] = []
    index: dict[Cell, int] = {}
    concrete = array_class()
    for leaf in leaves:
        if type(leaf) is concrete or eqx.is_array(leaf):
            dynamic.append(leaf)
            keys.append(ARRAY)
        elif isinstance(leaf, State):
            at = index.setdefault(leaf._cell, len(index))
            if at == len(states):
                states.append(leaf)
            keys.append((type(leaf), at, leaf._static_key()))
        else:
            key = static_key(leaf)
            if is_identity(key):
                raise Unhashable
            keys.append(key)
    return tuple(keys), dynamic, states


def flatten_anew(
    arg: Any, visit: Callable[[Any], Any] | None = None
) -> tuple[Form, list[Any], list[State]]:
    """Takes an argument apart by JAX, and shows each of its nodes on the way."""
    leaves, treedef = jtu.tree_flatten(arg, is_leaf=visit)
    keys, dynamic, states = leaf_keys(leaves)
    return _intern(treedef, keys), dynamic, states
