"""Which objects behave the same?

Python compares closures by identity. Two closures do the same if they run the same code
on equal cells. That is what a fingerprint says, and it errs on the safe side: what it
can't look into is equal to itself only.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Hashable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from .static import _Identity, array_key, static_key, treedef_key


def fingerprint(obj: Any) -> Hashable:
    """A hashable that is equal for two objects only if they behave the same.

    **Arguments:**

    - `obj`: functions (with what they close over), named tuples, containers, arrays,
        modules. Anything else counts by its own `==` and hash.
    """
    return _Walk().of(obj)


class _Walk:
    def __init__(self) -> None:
        self._done: dict[int, Hashable] = {}
        self._open: dict[int, int] = {}  # a function may close over itself
        self._kept: list[Any] = []  # an id is only good while its object lives

    def of(self, obj: Any) -> Hashable:
        if id(obj) in self._done:
            return self._done[id(obj)]
        if id(obj) in self._open:
            return "again", self._open[id(obj)]
        self._open[id(obj)] = len(self._open)
        self._kept.append(obj)
        found = self._of(obj)
        del self._open[id(obj)]
        self._done[id(obj)] = found
        return found

    def _of(self, obj: Any) -> Hashable:
        kind = type(obj)
        if isinstance(obj, types.FunctionType):
            return kind, self._function(obj)
        if isinstance(obj, types.MethodType):
            return kind, self.of(obj.__func__), self.of(obj.__self__)
        if isinstance(obj, functools.partial):
            return kind, self.of((obj.func, obj.args, obj.keywords))
        if isinstance(obj, tuple | list):
            return kind, tuple(self.of(x) for x in obj)
        if isinstance(obj, dict):
            items = [(static_key(k), self.of(v)) for k, v in obj.items()]
            return kind, tuple(items)
        if isinstance(obj, set | frozenset):
            return kind, frozenset(static_key(x) for x in obj)
        if eqx.is_array(obj):
            return array_key(obj)
        if isinstance(obj, eqx.Module):
            leaves, treedef = jtu.tree_flatten(obj)
            return kind, treedef_key(treedef), tuple(self.of(x) for x in leaves)
        if _is_ours_to_open(obj):
            return kind, self.of(dict(vars(obj)))
        return static_key(obj)

    def _function(self, fun: types.FunctionType) -> Hashable:
        cells = []
        for cell in fun.__closure__ or ():
            try:
                cells.append(self.of(cell.cell_contents))
            except ValueError:  # not assigned yet
                cells.append(_Identity(cell))
        return (
            fun.__code__,
            fun.__code__.co_filename,
            _Identity(fun.__globals__),
            self.of(fun.__defaults__),
            self.of(fun.__kwdefaults__),
            tuple(cells),
        )


def _is_ours_to_open(obj: Any) -> bool:
    """Whether an object is what its attributes say.

    True of frozen dataclasses, and of optax's own classes (`MultiSteps`, schedules),
    which don't change once they are made. Of others that is not known.
    """
    if isinstance(obj, type) or not hasattr(obj, "__dict__"):
        return False
    if dataclasses.is_dataclass(obj):
        return bool(obj.__dataclass_params__.frozen)  # type: ignore[attr-defined]
    return type(obj).__module__.partition(".")[0] == "optax"
