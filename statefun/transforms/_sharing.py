"""Which functions are one and the same, and so share what was traced and compiled.

`filter_jit(f)`, `filter_jit(filter_grad(f))`, `filter_jit(module)` and
`filter_jit(module.method)` may be written anew at every call. What is around the user's
function is the *key*: two that are equal are one function, and have one `Calls`. A module
that is called is an argument like others, the first: its arrays are inputs, its States
parameters, and two modules of one structure share a program.

What is kept for a function (or a class) is an attribute of it, and so dies with it. A
table beside would keep it alive, however weak its keys: what is kept refers to the
function in many ways, a module's class in the structure of an argument among them.
"""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu

from .._call.calls import Calls
from .._call.compiled import Options
from .._call.forms import Unhashable, leaf_keys
from .._state.state import State
from .._state.static import exact_key, is_identity, is_weak, static_key, treedef_key
from .._trace.names import innermost
from ._twin import Wrapper

_ATTRIBUTE = "_statefun_calls"
_LIMIT = 128  # of keys for one function: options may be made up in a loop


class Same(NamedTuple):
    """A callable taken apart, to be recognized when it is made anew.

    **Attributes:**

    - `owner`: the user's function or class.
    - `key`: what is around it: equal for two callables that do the same.
    - `watched`: what the key speaks of by identity.
    - `bound`: the module that is called, if there is one.
    - `build`: makes the callable again, around `bound`, and is no reason for what is
        watched to be alive.
    """

    owner: Any
    key: tuple
    watched: tuple
    bound: tuple
    build: Callable[..., Callable]


class Rewrapped:
    """A callable made of a function, in the same way for every function."""

    def _same(self) -> Same | None:
        """See `recognize`."""
        raise NotImplementedError


def recognize(fun: Any) -> Same | None:
    """Takes a callable apart; None if it is equal to itself only.

    So are `functools.partial`s, methods and callables that are not modules: JAX traces
    those anew as well, and their attributes may change in place.
    """
    if type(fun) is types.FunctionType:
        return Same(fun, (), (), (), lambda: fun)
    if isinstance(fun, Rewrapped):
        return fun._same()
    if isinstance(fun, Wrapper):
        return _twin(fun)
    if isinstance(getattr(fun, "__self__", None), eqx.Module):
        return _method(fun)
    if isinstance(fun, eqx.Module):
        return _module(fun)
    return None


def _twin(twin: Wrapper) -> Same | None:
    fun = getattr(twin, "__wrapped__", None)  # one of `filter_closure_convert` has none
    inner, options = recognize(fun), _taken_apart(twin, fun)
    if inner is None or options is None:
        return None
    around, build = options.build, inner.build  # these alone, not what is watched
    return inner._replace(
        key=(type(twin), options.key, inner.key),
        watched=(*options.watched, *inner.watched),
        build=lambda *bound: around(build(*bound)),
    )


def _method(method: Any) -> Same | None:
    inner = recognize(method.__func__)
    if inner is None or inner.bound:
        return None
    build = inner.build
    return inner._replace(
        key=(types.MethodType, inner.key),
        bound=(method.__self__,),
        build=lambda module: types.MethodType(build(), module),
    )


def _module(module: eqx.Module) -> Same | None:
    # What a module of a library wraps is the user's.
    wraps = isinstance(module, eqx.Partial) or hasattr(module, "__wrapped__")
    owner = innermost(module) if wraps else type(module)
    if not isinstance(owner, types.FunctionType | type):
        return None
    try:
        _, arrays, states = leaf_keys(jtu.tree_leaves(module))
    except Unhashable:  # it can't be an argument
        return None
    if arrays or states:
        key = type(module), "called"
        return Same(owner, key, (), (module,), lambda module: module)
    parts = _taken_apart(module)
    if parts is None:
        return None
    key = type(module), parts.key
    return Same(owner, key, parts.watched, (), parts.build)


class _Parts(NamedTuple):
    key: tuple
    watched: tuple
    build: Callable[..., Any]


_NOTHING: Any = object()


def _taken_apart(tree: Any, hole: Any = _NOTHING) -> _Parts | None:
    """A tree but for `hole`, to be put together around another one.

    States, arrays and functions are watched: an array may be of any size, and what a
    function closes over, too.
    """
    leaves, treedef = jtu.tree_flatten(tree, is_leaf=lambda x: x is hole)
    keys: list[Any] = []
    watched: list[Any] = []
    makers: list[Callable[[Any], Any]] = []
    for leaf in leaves:
        key = None if leaf is hole or isinstance(leaf, State) else static_key(leaf)
        if leaf is hole:
            keys.append(hole is not _NOTHING)
            makers.append(lambda filling: filling)
        elif key is None or is_weak(key) or eqx.is_array(leaf):
            try:
                ref = weakref.ref(leaf)
            except TypeError:
                return None
            if isinstance(leaf, types.MethodType):  # made for the occasion
                return None
            watched.append(leaf)
            keys.append((type(leaf), id(leaf)))
            makers.append(lambda _, ref=ref: ref())
        elif is_identity(key):
            return None
        else:
            keys.append(key)
            makers.append(lambda _, leaf=leaf: leaf)

    def build(filling: Any = None) -> Any:
        return treedef.unflatten([make(filling) for make in makers])

    return _Parts((treedef_key(treedef), *keys), tuple(watched), build)


class _Rebuilt:
    """The function that is traced: makes what it stands for, and calls it."""

    def __init__(self, same: Same, fun: Any):
        # Not `same`, which holds what is watched.
        self._build, self._bound = same.build, len(same.bound)
        self.__wrapped__ = same.owner
        self.__signature__ = _signature(fun, self._bound)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        n = self._bound
        return self._build(*args[:n])(*args[n:], **kwargs)


def _signature(fun: Any, n: int) -> inspect.Signature:
    """Of the function with the module, or `self`, as first argument."""
    try:
        parameters = list(inspect.signature(fun).parameters.values())
    except (ValueError, TypeError):  # written in C
        parameters = [
            inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),
            inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
        ]
    name = "self"
    while name in [p.name for p in parameters]:
        name += "_"
    first = inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY)
    return inspect.Signature([first] * n + parameters)


class _Kept:
    """The attribute: the calls of a function, by what is around it and by options."""

    __slots__ = ("calls", "owner")

    def __init__(self, owner: Any):
        self.owner = weakref.ref(owner)
        self.calls: dict[Any, tuple[Calls, list[weakref.ref]]] = {}

    def __reduce__(self) -> tuple:
        return dict, ()  # of a copy nothing has been traced


def _kept(owner: Any) -> _Kept:
    kept = vars(owner).get(_ATTRIBUTE)
    # `functools.wraps` copies the attributes of a function to the one around it.
    if type(kept) is not _Kept or kept.owner() is not owner:
        kept = _Kept(owner)
        setattr(owner, _ATTRIBUTE, kept)
    return kept


def calls_of(
    fun: Any, given: tuple, options: Callable[[int], Options], share: bool = True
) -> tuple[Calls, tuple]:
    """The `Calls` of a function compiled in a certain way, and what is to be passed first.

    **Arguments:**

    - `given`: the options, as the user has given them.
    - `options`: makes them what `Calls` takes; is told how many arguments are bound.
    - `share`: whether to take those that there are.
    """
    same = recognize(fun)
    if same is None:
        return Calls(fun, options(0)), ()
    table = _kept(same.owner).calls if share else {}
    key = same.key, exact_key(given) if given else ()
    found = table.get(key)
    if found is None:
        traced = fun if same.owner is fun else _Rebuilt(same, fun)
        calls = Calls(traced, options(len(same.bound)))

        def forget(_: Any) -> None:
            table.pop(key, None)

        watched = [weakref.ref(x, forget) for x in same.watched]
        found = table.setdefault(key, (calls, watched))
        while len(table) > _LIMIT:
            table.pop(next(iter(table)), None)
    return found[0], same.bound
