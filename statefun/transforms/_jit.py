"""`filter_jit`: compile a function that reads and writes States."""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, TypeVar, overload

import jax
from jax.experimental.checkify import check_error, user_checks

from .._call.calls import Calls
from .._call.compiled import Options
from .._call.fast import AheadOfTime, Bound, Fast
from .._call.function import StatefulFunction, as_tuple, name_of
from .._errors import message
from .._state.static import exact_key
from .._trace.transaction import transaction
from ..ir import normalize_optimizations
from ._checkify import checkify as checkified
from ._sharing import Rewrapped, Same, calls_of, recognize

P = ParamSpec("P")
R = TypeVar("R")
Donate = Literal["all", "all-except-first", "warn", "warn-except-first", "none"]
_DONATE = ("all", "all-except-first", "warn", "warn-except-first", "none")


class Jitted(Fast, Rewrapped, Generic[P, R]):
    """What [`statefun.filter_jit`][] returns: call it like the function.

    **Attributes:**

    - `stateful_function`: the [`statefun.StatefulFunction`][] underneath, which says
        what States a call reads and writes, and hands out the jaxpr.
    - `__wrapped__`: the function.
    """

    def __init__(self, fun: Callable[P, R], given: tuple, calls: Calls, bound: tuple):
        self._given, self._calls, self._bound = given, calls, bound
        functools.update_wrapper(self, fun, updated=())

    if TYPE_CHECKING:
        __wrapped__: Callable[P, R]

        def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R: ...

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __repr__(self) -> str:
        return f"filter_jit({self._calls.options.name})"

    def __reduce__(self) -> str | tuple:
        # As functions are pickled: by name where it can be imported. `__main__` is
        # another module in another process; cloudpickle sends its functions by value.
        name = getattr(self, "__qualname__", "")
        found: Any = sys.modules.get(self.__module__)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is self and self.__module__ != "__main__":
            return name
        return _jitted, (self.__wrapped__, self._given, False)

    def __deepcopy__(self, memo: dict) -> Jitted[P, R]:
        # Not the options: shardings hold devices, of which there are no copies.
        return _jitted(copy.deepcopy(self.__wrapped__, memo), self._given, False)

    def _same(self) -> Same | None:
        inner = recognize(self.__wrapped__)
        if inner is None:
            return None
        given, build = self._given, inner.build
        return inner._replace(
            key=(Jitted, exact_key(given), inner.key),
            build=lambda *bound: _jitted(build(*bound), given),
        )

    @functools.cached_property
    def stateful_function(self) -> StatefulFunction[P, R]:
        return StatefulFunction._of(self.__wrapped__, self._calls, self._bound)

    def lower(self, /, *args: P.args, **kwargs: P.kwargs) -> Lowered:
        """Traces and lowers the function for these arguments, without running it.

        For other platforms than the default one: `.trace(…).lower(lowering_platforms=…)`.
        """
        return self.trace(*args, **kwargs).lower()

    def trace(self, /, *args: P.args, **kwargs: P.kwargs) -> Traced:
        """Traces the function for these arguments, without running it."""
        return Traced(self, args, kwargs)

    def eval_shape(self, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """The result, with a `jax.ShapeDtypeStruct` for every array. Runs nothing."""
        return self.stateful_function.get_out_shapes(*args, **kwargs)[0]

    def retraces(self) -> list[Any]:
        """Why the function was traced: the newest 100 times, oldest first.

        **Returns:** a list of [`statefun.Retrace`][].
        """
        return self.stateful_function.retraces()

    def clear_cache(self) -> None:
        """Forgets everything traced and compiled, for all that share it."""
        self._calls.clear()


class BoundJitted(Bound, Jitted):
    """What a module that is called is compiled to."""


class Checked(Jitted):
    """A function that returns `(error, out)`: raises before anything is written."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        def run() -> Any:
            error, out = self._calls.run(self._bound + args, kwargs)
            check_error(error)  # raises; in a trace, the transform around has to see it
            return out

        return transaction(run)


class Traced:
    """A function that was traced for certain arguments.

    **Attributes:**

    - `jaxpr`: the pure jaxpr, as `StatefulFunction.get_jaxpr` gives it.
    """

    def __init__(self, fn: Jitted, args: tuple, kwargs: dict):
        self.jaxpr = fn.stateful_function.get_jaxpr(*args, **kwargs)
        self._call = AheadOfTime(fn._calls, args, kwargs, fn._bound)

    def lower(self, *, lowering_platforms: tuple[str, ...] | None = None) -> Lowered:
        """Lowers the traced function to StableHLO.

        **Arguments:**

        - `lowering_platforms`: for which platforms, by default the present one.
        """
        lowered = self._call.traced.lower(lowering_platforms=lowering_platforms)
        return Lowered(self._call, lowered)


class Lowered:
    """A function that was lowered for certain arguments: see `jax.stages.Lowered`."""

    def __init__(self, call: AheadOfTime, lowered: Any):
        self._call = call
        self._lowered = lowered

    def as_text(self, dialect: str | None = None, *, debug_info: bool = False) -> str:
        """The program as text, by default StableHLO."""
        return self._lowered.as_text(dialect, debug_info=debug_info)

    def compiler_ir(self, dialect: str | None = None) -> Any:
        """The program as the compiler's own object, by default StableHLO."""
        return self._lowered.compiler_ir(dialect)

    def cost_analysis(self) -> Any:
        """What XLA expects the program to cost, before it is compiled."""
        return self._lowered.cost_analysis()

    def compile(
        self,
        compiler_options: dict[str, Any] | None = None,
        *,
        device_assignment: tuple[Any, ...] | None = None,
    ) -> Compiled:
        """Compiles it.

        **Arguments:**

        - `compiler_options`: of XLA.
        - `device_assignment`: on which devices it is to run.
        """
        compiled = self._lowered.compile(
            compiler_options, device_assignment=device_assignment
        )
        return Compiled(self._call, compiled)


class Compiled:
    """A function that was compiled for certain arguments: see `jax.stages.Compiled`.

    Call it with arguments of the same structure, shapes and dtypes. It reads the States'
    values when it is called, and writes them, as the function itself does.
    """

    def __init__(self, call: AheadOfTime, compiled: Any):
        self._call = call
        self._compiled = compiled

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._call.run(self._compiled, args, kwargs)

    def as_text(self) -> str:
        """The compiled program as text."""
        return self._compiled.as_text()

    def cost_analysis(self) -> Any:
        """What XLA expects the program to cost: flops, bytes read and written, …"""
        return self._compiled.cost_analysis()

    def memory_analysis(self) -> Any:
        """The sizes, in bytes, of arguments, outputs and temporaries."""
        return self._compiled.memory_analysis()

    def runtime_executable(self) -> Any:
        """The executable as the runtime's own object."""
        return self._compiled.runtime_executable()


@overload
def filter_jit(
    *,
    donate: Donate = "none",
    donate_states: bool = False,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Iterable[str] = (),
    ir_optimizations: str | Sequence[str] | None = None,
    name: str | None = None,
    in_shardings: Any = None,
    out_shardings: Any = None,
    checkify: bool | frozenset = False,
    **jitkwargs: Any,
) -> Callable[[Callable[P, R]], Jitted[P, R]]: ...


@overload
def filter_jit(
    fun: Callable[P, R],
    *,
    donate: Donate = "none",
    donate_states: bool = False,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Iterable[str] = (),
    ir_optimizations: str | Sequence[str] | None = None,
    name: str | None = None,
    in_shardings: Any = None,
    out_shardings: Any = None,
    checkify: bool | frozenset = False,
    **jitkwargs: Any,
) -> Jitted[P, R]: ...


def filter_jit(
    fun: Callable | None = None,
    *,
    donate: Donate = "none",
    donate_states: bool = False,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Iterable[str] = (),
    ir_optimizations: str | Sequence[str] | None = None,
    name: str | None = None,
    in_shardings: Any = None,
    out_shardings: Any = None,
    checkify: bool | frozenset = False,
    **jitkwargs: Any,
) -> Any:
    """As `equinox.filter_jit`, for functions that read and write States.

    Arrays among the arguments are traced, everything else is static, results may be
    anything. States are found by tracing: each one that the function reads is an input
    of the compiled program, each one that it writes an output, which is written back
    when the call has succeeded. If it raises, no State has changed.

    A State may be reached in any way: through a closure, as a global, as a leaf of a
    module that is an argument or whose method is called. Two modules of the same
    structure share one compiled program. A State may not be an argument or a result by
    itself or in a plain tuple, list or dict.

    The call returns when the work has been handed to the device. Only a function with a
    callback that may fail (`eqx.error_if`) is waited for.

    **Arguments:**

    - `fun`: the function; may be left out, to use the rest as a decorator.
    - `donate`: whether the arrays of the arguments may be overwritten: `"all"`,
        `"all-except-first"` (the first argument is spared), `"warn"` and
        `"warn-except-first"` (as these, with a warning if a buffer is of no use), or
        `"none"`.
    - `donate_states`: whether the buffers of the States that are written may be reused
        in place, which saves their memory once. An array that somebody else still holds
        (`old = state.value`) is copied first; an array that JAX made to share its buffer
        (`device_put` to another sharding of the same devices, `addressable_data`) can't
        be seen, and is deleted. Calls that share States then take turns. A function
        with a callback that may fail keeps the old values, and so do all while
        `jax.debug_nans` or `jax.debug_infs` is on.
    - `static_argnums`, `static_argnames`: arguments that are static as a whole.
    - `ir_optimizations`: see [`statefun.StatefulFunction`][].
    - `name`: what the compiled program is called.
    - `in_shardings`, `out_shardings`: as in `jax.jit`, for the positional arguments and
        the result: a sharding, or a tree of them that stands above the arrays.
    - `checkify`: True, or a set of kinds of error as in `jax.experimental.checkify`: a
        `checkify.check` in the function that fails raises, and no State is written. The
        call waits for the checks.
    - `jitkwargs`: passed on to `jax.jit`: `keep_unused`, `inline`, `compiler_options`,
        `device`, `backend`.

    **Returns:** a [`statefun.Jitted`][] function.

    **Raises:** `TypeError` if a State is passed or returned bare, or an argument that is
    no array can't be hashed.

    !!! example

        ```python
        import equinox as eqx, jax.numpy as jnp, statefun as sf

        mean = sf.State(jnp.zeros(3), name="mean")

        @sf.filter_jit
        def center(x):
            mean.value = 0.9 * mean.value + 0.1 * x
            return x - mean.value

        center(jnp.ones(3))
        ```

    !!! info

        The function is compiled once, also where `filter_jit(f)`,
        `filter_jit(filter_grad(f))`, `filter_jit(module)` or `filter_jit(module.method)`
        is written anew at every call: jitted functions with the same function and options
        share what was traced, `retraces()` and `clear_cache()`, and it is freed with the
        function. A module that is called is an argument like others: its arrays are
        inputs, its States parameters, and `donate` donates its arrays, unless it is
        `"none"`. Copies of a jitted function, and a `StatefulFunction`, share nothing.

    !!! info

        Another thread may write a State during a call that reads and writes it. The call
        then runs again, on the new values, so both are counted. A function with side
        effects (`jax.debug.print`, …) is not run twice: there, the last writer wins.

    !!! warning

        Which State a name means (a global, an attribute, a closed-over variable) is
        looked up when the function is traced. If the name is bound to another State
        while the old one is still in use elsewhere, the function keeps using the old
        one: pass the module that holds the State as an argument, or call `clear_cache`.
        Wrapping the function anew does not help.
    """
    if donate not in _DONATE:
        raise ValueError(f"`donate` is {donate!r}, but should be one of {_DONATE}.")
    given = tuple(
        (name, value)
        for name, value, default in (
            ("donate", donate, "none"),
            ("donate_states", donate_states, False),
            ("static_argnums", static_argnums, ()),
            ("static_argnames", static_argnames, ()),
            ("ir_optimizations", ir_optimizations, None),
            ("name", None if name is None else str(name), None),
            ("in_shardings", in_shardings, None),
            ("out_shardings", out_shardings, None),
            ("checkify", checkify, False),
        )
        if value is not default
    )
    given += tuple(sorted(jitkwargs.items()))
    if fun is None:
        _jit_options(jitkwargs)
        return functools.partial(_jitted, given=given)
    return _jitted(fun, given)


def _jitted(fun: Callable, given: tuple, share: bool = True) -> Jitted:
    """The jitted function.

    **Arguments:**

    - `given`: the options that are not the default.
    - `share`: what was traced; a copy has a cache of its own, which is empty.
    """
    if not callable(fun):
        raise TypeError(f"fun has to be callable, but is {fun!r}.")

    def options(bound: int) -> Options:
        return _options(fun, given, bound)

    errors = dict(given).get("checkify", False) if given else False
    if errors is False:
        calls, bound = calls_of(fun, given, options, share)
        return (BoundJitted if bound else Jitted)(fun, given, calls, bound)
    traced = checkified(fun, user_checks if errors is True else errors)
    calls, bound = calls_of(traced, given, options, share)
    return Checked(fun, given, calls, bound)


def _options(fun: Callable, given: tuple, bound: int) -> Options:
    how = dict(given)
    how.pop("checkify", None)
    how["name"] = how.get("name") or name_of(fun)
    how["static_argnums"] = as_tuple(how.get("static_argnums", ()), int)
    how["static_argnames"] = as_tuple(how.get("static_argnames", ()), str)
    how["ir_optimizations"] = normalize_optimizations(how.get("ir_optimizations"))
    rest = {k: how.pop(k) for k in list(how) if k not in Options._fields}
    return Options(**how, jit_options=_jit_options(rest), bound=bound)


class _Hashable(dict):
    """A dict that, like the other options, can be part of a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


def _jit_options(given: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    for name in ("donate_argnums", "donate_argnames"):
        if name in given:
            raise TypeError(
                message(
                    f"`filter_jit` has no `{name}`.",
                    "which positions the arrays of an argument take in the compiled "
                    "function is not the caller's affair.",
                    'write `donate="all"`, or `donate="all-except-first"` and put what '
                    "is to be spared into the first argument.",
                )
            )
    jax.jit(lambda: None, **given)  # raises where JAX knows no such argument
    return tuple(
        (name, _Hashable(x) if isinstance(x, dict) else x) for name, x in given.items()
    )
