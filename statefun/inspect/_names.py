"""The names of what a function closes over.

Reports and causes of traces speak of `model.norm.mean` and `config.layers`, the names
in the user's source.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from .._state import access
from .._state.cell import UNSET, Cell
from .._state.state import State
from .._trace.names import Parameters

_LIMIT = 20_000
"""Objects looked at in search of a name: beyond it things stay without one."""


class Captured:
    """Names of the States and arrays that a function can reach without its arguments.

    They are searched for where the function's code looks: in the variables it closes
    over, the globals it mentions, the attributes of these, and in the same places of
    the functions it mentions.

    **Attributes:**

    - `states`: from cell to name.
    - `arrays`: from id to name.
    """

    def __init__(self, fun: Any, arguments: Iterable[tuple[str, Any]] = ()):
        self.states: dict[Cell, str] = {}
        self.arrays: dict[int, str] = {}
        seen: dict[int, Any] = {}  # holds on to the objects, so that no id is reused
        # Breadth first, so that the shortest name is found.
        todo = [*_outset(fun), *arguments]
        while todo and len(seen) < _LIMIT:
            found = []
            for name, thing in todo:
                if id(thing) not in seen and not isinstance(thing, _PLAIN):
                    seen[id(thing)] = thing
                    found.extend(self._look(name, thing))
            todo = found

    def _look(self, name: str, thing: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(thing, State):
            self.states.setdefault(thing._cell, name)
            flat, structure = access.current(thing._cell)
            if flat is not UNSET:
                yield from _leaves(f"{name}.value", structure.unflatten(flat))
        elif eqx.is_array(thing):
            self.arrays.setdefault(id(thing), name)
        elif isinstance(thing, _FUNCTIONS) or hasattr(thing, "__wrapped__"):
            # What a helper closes over has a name of its own there.
            if not _of_a_library(getattr(thing, "__module__", "")):
                yield from _outset(thing)
        elif not jtu.all_leaves([thing]):
            yield from _leaves(name, thing)
        elif not _of_a_library(type(thing).__module__):
            for key, value in list(getattr(thing, "__dict__", {}).items()):
                yield f"{name}.{key}", value


_PLAIN = (str, bytes, bool, int, float, complex, type(None), type, types.ModuleType)
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)


# Their functions and objects hold no State of the user's that can't be reached
# otherwise, and mention thousands of things.
_LIBRARIES = {"jax", "jaxlib", "equinox", "numpy", "optax", "jaxtyping", "statefun"}
_LIBRARIES |= sys.stdlib_module_names - {"__main__"}


def _of_a_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES


def _leaves(name: str, tree: Any) -> Iterator[tuple[str, Any]]:
    try:
        leaves = jtu.tree_leaves_with_path(tree)
    except ValueError:  # a dict whose keys can't be sorted
        return
    for keys, leaf in leaves:
        yield name + jtu.keystr(keys), leaf


def _outset(fun: Any) -> Iterator[tuple[str, Any]]:
    """What a function's own code can name."""
    if isinstance(fun, functools.partial):
        yield from _outset(fun.func)
        names = Parameters(fun.func)
        for i, value in enumerate(fun.args):
            yield names.positional(i), value
        yield from fun.keywords.items()
    elif isinstance(fun, types.MethodType):
        yield _own_name(fun.__func__), fun.__self__
        yield from _outset(fun.__func__)
    elif isinstance(fun, types.FunctionType):
        code = fun.__code__
        for name, cell in zip(code.co_freevars, fun.__closure__ or (), strict=True):
            try:
                yield name, cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        for name in _globals_in(code):
            if name in fun.__globals__:
                yield name, fun.__globals__[name]
        for name, default in (fun.__kwdefaults__ or {}).items():
            yield name, default
        defaults = fun.__defaults__ or ()
        arguments = code.co_varnames[: code.co_argcount]
        yield from zip(
            arguments[len(arguments) - len(defaults) :], defaults, strict=True
        )
    elif hasattr(fun, "__wrapped__"):
        yield from _outset(fun.__wrapped__)
    elif callable(fun):
        yield "self", fun
        yield from _outset(vars(type(fun)).get("__call__"))


def _own_name(method: Callable) -> str:
    return Parameters(method).positional(0)


def _globals_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, types.CodeType):  # a function inside
            yield from _globals_in(const)
