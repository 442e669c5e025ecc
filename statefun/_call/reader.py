"""Another module of a form that is known: read node by node, not flattened.

A network whose arrays were replaced is a new object, which nothing is remembered of. But
most often it is made of the same nodes as the one before.
"""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from .._compat import array_class
from .._state.state import State
from .._state.static import static_key
from .._state.structure import ARRAY
from .forms import Form


class Unreadable(Exception):
    """A module is not what a `Reader` is for."""


class Reader:
    """Takes modules of one form apart, quicker than JAX does, and finds no key for it.

    It goes through the nodes level by level, and makes sure that each is as in the module
    that it was made from: its class, its size, the static fields by identity. Where there
    is any difference JAX is asked.
    """

    __slots__ = ("_nodes", "_order", "_statics")

    def __init__(self, module: Any, form: Form):
        # For each node: which of all it is, its class, how many items it has, what picks
        # its children out of its fields, and what else there is.
        self._nodes: list[tuple[int, type, bool, int, Any, list]] = []
        self._statics: list[tuple[int, Any]] = []
        order: dict[int, int] = {}
        numbers: Any = form.treedef.unflatten(range(form.treedef.num_leaves))
        queue: list[tuple[Any, Any]] = [(module, numbers)]
        for i, (node, number) in enumerate(queue):  # it grows meanwhile
            if isinstance(node, State):
                raise Unreadable
            if type(number) is int:
                if form.keys[number] is ARRAY:
                    order[number] = i
                else:
                    self._statics.append((i, form.keys[number]))
            elif node is None:
                self._statics.append((i, None))
            elif isinstance(node, eqx.Module | dict):
                names = [key for key, _ in children(node)]
                if not all(type(name) is str for name in names):  # True is found at 1
                    raise Unreadable
                get, fields = _picker(names), _fields(node)
                rest = [(k, v) for k, v in fields.items() if k not in names]
                is_module = isinstance(node, eqx.Module)
                self._nodes.append((i, type(node), is_module, len(fields), get, rest))
                queue += zip(get(fields), get(_fields(number)), strict=True)
            else:
                self._nodes.append((i, type(node), False, len(node), None, []))
                queue += zip(node, number, strict=True)
        self._order = [order[number] for number in sorted(order)]

    def read(self, module: Any) -> list[Any]:
        """The arrays of the module.

        **Raises:** `Unreadable`, or `KeyError`, if it is of another form.
        """
        queue = [module]
        getattribute = object.__getattribute__  # Equinox looks at each, in Python
        for i, kind, is_module, size, get, rest in self._nodes:
            fields = node = queue[i]
            if type(node) is not kind:
                raise Unreadable
            if is_module:
                fields = getattribute(node, "__dict__")
            if len(fields) != size:
                raise Unreadable
            for name, value in rest:
                if fields[name] is not value:
                    raise Unreadable
            queue += fields if get is None else get(fields)
        for i, key in self._statics:
            leaf = queue[i]
            if leaf is not None if key is None else static_key(leaf) != key:
                raise Unreadable
        arrays = [queue[i] for i in self._order]
        concrete = array_class()
        if not all(type(x) is concrete or eqx.is_array(x) for x in arrays):
            raise Unreadable
        return arrays


def _fields(node: Any) -> dict[str, Any]:
    return node if type(node) is dict else object.__getattribute__(node, "__dict__")


def _picker(names: list[str]) -> Callable[[dict[str, Any]], tuple]:
    if len(names) > 1:
        return operator.itemgetter(*names)
    return lambda fields: tuple([fields[name] for name in names])


def children(node: Any) -> list[tuple[Any, Any]]:
    """The children of a node, as JAX sees them, each with its name, key or index."""
    items = jtu.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    if isinstance(node, eqx.Module):
        return [(key.name, child) for (key,), child in items]
    if isinstance(node, dict):
        return [(key.key, child) for (key,), child in items]
    return [(i, child) for i, (_, child) in enumerate(items)]


# The forms that modules of a class had, those with a `Reader` first.
_forms_of: weakref.WeakKeyDictionary[type, list[weakref.ref[Form]]] = (
    weakref.WeakKeyDictionary()
)
_MAX_FORMS = 4


def read(module: Any, dynamic: list[Any]) -> Form | None:
    """Takes a module apart that is of a form which others of its class had."""
    for ref in _forms_of.get(type(module), ()):
        form = ref()
        if form is not None and form.reader is not None:
            with contextlib.suppress(Unreadable, KeyError):
                dynamic += form.reader.read(module)
                return form
    return None


def learn_to_read(module: Any, form: Form, is_constant: Callable[[], Any]) -> None:
    """Makes a `Reader` when a second module of a form is seen.

    **Arguments:**

    - `is_constant`: says that nothing in the module can change, where that isn't known.
    """
    known = [ref for ref in _forms_of.get(type(module), []) if ref() is not None]
    if form.reader is None and form.steady and any(ref() is form for ref in known):
        with contextlib.suppress(Unreadable, KeyError):
            form.reader = Reader(module, form) if is_constant() else None
    if all(ref() is not form for ref in known):
        known = [weakref.ref(form), *known][:_MAX_FORMS]
    _forms_of[type(module)] = known
