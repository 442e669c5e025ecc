"""What JAX's errors call a traced function and its arguments.

What is traced is a function of ours, which takes arrays one by one and calls the user's.
JAX says in its errors which function and which argument a value comes from. It looks for
them where `inspect` does, so that the user's names can be lent to ours.
"""

from __future__ import annotations

import functools
import inspect
import keyword
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu


class Parameters:
    """Names the places in a call's `(args, kwargs)`: `net.norm.mean`."""

    def __init__(self, fun: Any):
        self._fun = fun

    @functools.cached_property
    def _parameters(self) -> list[inspect.Parameter]:
        try:
            return list(inspect.signature(self._fun).parameters.values())
        except (ValueError, TypeError):  # a builtin has no signature
            return []

    def positional(self, index: int) -> str:
        names = [
            p.name
            for p in self._parameters
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        if index < len(names):
            return names[index]
        for parameter in self._parameters:
            if parameter.kind is parameter.VAR_POSITIONAL:
                return f"{parameter.name}[{index - len(names)}]"
        return f"args[{index}]"

    def path(self, keys: tuple) -> str:
        """The name of a leaf of `(args, kwargs)`."""
        which, first, *inner = keys
        name = self.positional(first.idx) if which.idx == 0 else str(first.key)
        return name + jtu.keystr(tuple(inner))


class Named(NamedTuple):
    """The user's function, and the names of the arrays that it is given."""

    fun: Callable[..., Any]
    labels: Sequence[str]

    def lend_to(self, flat: Callable[..., Any]) -> None:
        """Makes JAX's errors call `flat` and its arguments by these names."""
        flat.__wrapped__ = innermost(self.fun)  # type: ignore[attr-defined]
        parameters: dict[str, inspect.Parameter] = {}
        for i, label in enumerate(self.labels):
            if label in parameters or keyword.iskeyword(label):
                label = f"{label} (array {i})"
            name = _AnyName(label)
            kind = inspect.Parameter.POSITIONAL_ONLY
            parameters[label] = inspect.Parameter(name, kind)
        signature = inspect.Signature(list(parameters.values()))
        flat.__signature__ = signature  # type: ignore[attr-defined]


class _AnyName(str):
    """`net.norm.mean`: `inspect.Parameter` asks for an identifier, JAX does not."""

    def isidentifier(self) -> bool:
        return True


def named(
    fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any] | None = None
) -> Named:
    """The names of the arrays among arguments of `fun`, in the order of the leaves."""
    parameters = Parameters(fun)
    leaves = jtu.tree_leaves_with_path((tuple(args), kwargs or {}))
    return Named(fun, [parameters.path(p) for p, x in leaves if eqx.is_array(x)])


def named_at(fun: Callable[..., Any], paths: Iterable[tuple]) -> Named:
    """As `named`, for arrays at certain places of `(args, kwargs)`."""
    return Named(fun, [*map(Parameters(fun).path, paths)])


def innermost(fun: Any) -> Any:
    """The function that stands in the user's source."""
    while not isinstance(fun, types.FunctionType):
        if isinstance(fun, functools.partial | eqx.Partial):
            fun = fun.func
        elif hasattr(fun, "__wrapped__"):
            fun = fun.__wrapped__
        elif isinstance(fun, types.MethodType):
            fun = fun.__func__
        elif isinstance(call := type(fun).__call__, types.FunctionType):
            fun = call
        else:  # written in C
            return fun
    return inspect.unwrap(fun)
