"""What `.value` has given out, and whether it was changed in place since."""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any

import jax.tree_util as jtu

from .._compat import Tracer
from .static import treedef_key
from .structure import MutableNodes, Structure, same


class Handed:
    """A value as a State has given it out.

    Whether it was changed is asked at every call of a function that takes the State. So
    once the whole value has been compared, only the mutable nodes are looked at: whether
    each list or dict has the very items that it had.

    A `Cell` or a frame has it for the value that it gave out, and nobody else changes it.
    """

    __slots__ = (
        "__weakref__",
        "_items",
        "_leaves",
        "flat",
        "next",
        "structure",
        "value",
    )

    def __init__(self, flat: Any, structure: Structure, value: Any):
        self.value = value
        self.renew(flat, structure)

    def renew(self, flat: Any, structure: Structure) -> None:
        """Says what the value is known to hold now."""
        self._items: _Items | None = None
        # Of this very object: a node may make its children when it is put together.
        self._leaves = jtu.tree_leaves(self.value) if structure.mutable else ()
        self.structure = structure
        # What is about to be committed, in case an exception arrives right after that.
        self.flat = self.next = flat

    def is_of(self, flat: Any) -> bool:
        """Whether it is the value of a State that holds this."""
        return flat is self.flat or flat is self.next

    def changed(self) -> bool:
        if self.structure.mutable_nodes is None:
            return False
        if self._items is not None and self._items.same():
            return False
        if self._differs():
            return True
        dicts: list[dict] = []
        lists: list[list] = []
        complete = _find(self.value, self.structure.mutable_nodes, dicts, lists)
        self._items = _Items(dicts, lists) if complete else None
        return False

    def _differs(self) -> bool:
        leaves, treedef = jtu.tree_flatten(self.value)
        if treedef_key(treedef) != treedef_key(self.structure.treedef):
            return True
        pairs = zip(self._leaves, leaves, strict=True)
        others = [(i, a, b) for i, (a, b) in enumerate(pairs) if a is not b]
        if not others:
            return False
        # A node that makes its children anew each time it is flattened says nothing by
        # their identity.
        again = jtu.tree_leaves(self.value)
        return any(b is again[i] or not _alike(a, b) for i, a, b in others)


def _alike(a: Any, b: Any) -> bool:
    return isinstance(a, Tracer) or isinstance(b, Tracer) or same(a, b)


class _Items:
    """The items of some lists and dicts, to compare with what they are later on.

    All loops are in C: a value may have a hundred dicts.
    """

    def __init__(self, dicts: list[dict], lists: list[list]):
        self._dicts = dicts
        self._all = [*dicts, *lists]
        self._sizes = list(map(len, self._all))
        self._keys_and_items = list(chain.from_iterable(self._all))
        self._values = list(chain.from_iterable(map(dict.values, dicts)))

    def same(self) -> bool:
        now = chain.from_iterable(self._all)
        values = chain.from_iterable(map(dict.values, self._dicts))
        return (
            list(map(len, self._all)) == self._sizes
            and all(map(is_, now, self._keys_and_items))
            and all(map(is_, values, self._values))
        )


def _find(
    value: Any, nodes: MutableNodes, dicts: list[dict], lists: list[list]
) -> bool:
    """Collects the mutable nodes; False if one can't be looked at without flattening."""
    kind, keys, inner = nodes
    if kind is dict:
        dicts.append(value)
        children = [value[key] for key in keys]
    elif kind is list:
        lists.append(value)
        children = value
    else:
        children = jtu.tree_leaves(value, is_leaf=lambda x: x is not value)
        if keys is not None:
            # An object whose children are its attributes, as those of a dataclass are.
            attributes = getattr(value, "__dict__", {})
            items = attributes.values()
            if not all(any(child is x for x in items) for child in children):
                return False
            dicts.append(attributes)
    pairs = zip(children, inner, strict=True)
    return all(n is None or _find(child, n, dicts, lists) for child, n in pairs)
