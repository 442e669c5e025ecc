"""`StatefulFunction`: a function, its traces, and which States they read and write."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, ParamSpec, TypeVar

import jax
import jax.extend.core as jec
import jax.tree_util as jtu

from .. import _compat
from .._errors import StateValueError, message
from .._state import access
from .._state.cell import Cell, Values
from .._state.numbers import normalise
from .._state.state import State, is_state
from .._state.static import TreeDef
from .._state.structure import flatten, leaves_of
from .._trace.program import Program
from ..ir import normalize_optimizations
from .calls import Calls
from .compiled import Options, Trace
from .fast import Bound, Fast
from .keys import CacheKey
from .site import Site


class StateTrace(NamedTuple):
    """What a trace has seen.

    **Attributes:**

    - `states`: every State that the function touched, in order of first access.
    - `reads`: those whose incoming value is used.
    - `writes`: those that are assigned.
    - `avals`: for each of `states` the abstract values of its arrays: of the incoming
        value where it is read, else of the value that is written.
    """

    states: tuple[State, ...]
    reads: tuple[State, ...]
    writes: tuple[State, ...]
    avals: tuple[tuple, ...]


class _Found(NamedTuple):
    """A trace that was asked for, and the States it is about (None: gone)."""

    trace: Trace
    states: Sequence[State | None]  # in the order of the program
    arguments: Sequence[Any]  # those among the arguments, by position
    dynamic: Sequence[Any] = ()

    @property
    def program(self) -> Program:
        return self.trace.program

    @property
    def key(self) -> CacheKey:
        return self.trace.key


P = ParamSpec("P")
R = TypeVar("R")


class StatefulFunction(Fast, Generic[P, R]):
    """A function that reads and writes States, traced to a pure jaxpr.

    It is what `filter_jit` is built on, and says of a function which States it touches.
    Arrays among the arguments (`eqx.is_array`) are dynamic, everything else is static.
    States are found by tracing, however the function reaches them.

    **Arguments:**

    - `fun`: a function, a `functools.partial`, an `eqx.Module` with `__call__`, or a
        bound method of one.
    - `static_argnums`, `static_argnames`: arguments that are static as a whole. They
        have to be hashable. Negative positions count from the end.
    - `axis_env`: `[("i", 4), …]`: names and sizes of mapped axes, to trace code with
        collectives outside of the transform that binds the axis.
    - `name`: what the compiled program is called; by default the function's name.
    - `return_only_write`: whether the jaxpr returns only the States that are written, or
        all of them.
    - `ir_optimizations`: a name, or a sequence of names, of the passes to run on the
        jaxpr: see [`statefun.optimize_jaxpr`][].

    The methods take the function's own arguments and trace the function if they have to.
    The last 128 traces are kept. Each `…_by_cache` method takes a
    [`statefun.CacheKey`][] and answers from the newest trace that is filed under it.

    Where the function has a keyword argument with the name of one of ours
    (`compile_if_miss`), bind it with `functools.partial` first.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        count = sf.State(jnp.array(0), name="count")

        def step(x):
            count.value += 1
            return x * count.value

        fn = sf.StatefulFunction(step)
        print(fn.get_jaxpr(2.0).jaxpr)
        print(fn.get_write_states(2.0))
        (new_count,), out = fn.jaxpr_call((jnp.array(9),), 2.0)  # pure
        fn(2.0)  # compiled; writes the State
        ```
    """

    def __init__(
        self,
        fun: Callable[P, R],
        static_argnums: int | Sequence[int] = (),
        static_argnames: str | Iterable[str] = (),
        axis_env: Sequence[tuple[Any, int]] | None = None,
        name: str | None = None,
        return_only_write: bool = True,
        ir_optimizations: str | Sequence[str] | None = None,
    ):
        if not callable(fun):
            raise TypeError(f"fun has to be callable, but is {fun!r}.")
        self.fun = fun
        self.static_argnums = as_tuple(static_argnums, int)
        self.static_argnames = as_tuple(static_argnames, str)
        self.axis_env = axis_env
        self.name = name if name is not None else name_of(fun)
        self.return_only_write = return_only_write
        self.ir_optimizations = ir_optimizations
        options = Options(
            name=self.name,
            static_argnums=self.static_argnums,
            static_argnames=self.static_argnames,
            axis_env=axis_env,
            ir_optimizations=normalize_optimizations(ir_optimizations),
        )
        self._calls = Calls(fun, options)

    @classmethod
    def _of(
        cls, fun: Callable[P, R], calls: Calls, bound: tuple
    ) -> StatefulFunction[P, R]:
        """That of a jitted function, which it shares the traces of."""
        how = calls.options
        new = (BoundFunction if bound else cls)(
            fun,
            how.static_argnums,
            how.static_argnames,
            how.axis_env,
            how.name,
            ir_optimizations=how.ir_optimizations,
        )
        new._calls, new._bound = calls, bound
        return new

    def __repr__(self) -> str:
        return f"StatefulFunction({self.name})"

    # Copies have the options, and a cache of their own, which is empty.

    def __reduce__(self) -> tuple:
        arguments = (
            self.fun,
            self.static_argnums,
            self.static_argnames,
            self.axis_env,
            self.name,
            self.return_only_write,
            self.ir_optimizations,
        )
        return StatefulFunction, arguments, self._calls.options._replace(bound=0)

    def __setstate__(self, options: Options) -> None:
        self._calls = Calls(self.fun, options)

    def __deepcopy__(self, memo: dict) -> StatefulFunction[P, R]:
        # Not the options: shardings hold devices, of which there are no copies.
        kind, (fun, *rest), options = self.__reduce__()
        new = kind(copy.deepcopy(fun, memo), *rest)
        new.__setstate__(options)
        return new

    # -- tracing and asking --

    def make_jaxpr(self, /, *args: Any, **kwargs: Any) -> StatefulFunction:
        """Traces the function for these arguments, unless it has been.

        **Returns:** the `StatefulFunction` itself.

        **Raises:** `TypeError` if a State is passed or returned bare or in a plain
        tuple, list or dict; `ValueError` if `static_argnums` names a position that the
        call doesn't have.
        """
        self._find(args, kwargs, True)
        return self

    def get_arg_cache_key(
        self, /, *args: Any, compile_if_miss: bool = False, **kwargs: Any
    ) -> CacheKey:
        """The key under which a trace for these arguments is filed.

        **Arguments:**

        - `compile_if_miss`: whether to trace the function if there is no such trace.
        """
        if compile_if_miss:
            return self._find(args, kwargs, True).key
        site, dynamic, _ = self._calls.site_ahead(self._bound + args, kwargs)
        return _key(site, dynamic)

    def get_jaxpr(
        self, /, *args: Any, compile_if_miss: bool = True, **kwargs: Any
    ) -> jec.ClosedJaxpr:
        """The jaxpr.

        Its inputs are the dynamic leaves of the arguments, then the arrays of the States
        whose incoming value is used, in the order of `get_states`. Its outputs are the
        arrays of the result, then those of the States (only of the written ones with
        `return_only_write`), in the same order.

        **Arguments:** those of the function; and, here and in all `get_…` below,

        - `compile_if_miss`: whether to trace the function if there is no trace for these
            arguments.

        **Raises:** `ValueError`, with `compile_if_miss=False`, if there is none.
        """
        return self._jaxpr(self._find(args, kwargs, compile_if_miss))

    def get_jaxpr_by_cache(self, key: CacheKey, /) -> jec.ClosedJaxpr:
        """As `get_jaxpr`, for a key of `get_arg_cache_key`."""
        return self._jaxpr(self._by_key(key))

    def get_out_shapes(
        self, /, *args: Any, compile_if_miss: bool = True, **kwargs: Any
    ) -> tuple[Any, tuple]:
        """What comes out.

        **Returns:** the result, and a tuple of the values of the States that the jaxpr
        returns, in each case with a `jax.ShapeDtypeStruct` for every array.
        """
        return self._out_shapes(self._find(args, kwargs, compile_if_miss))

    def get_out_shapes_by_cache(self, key: CacheKey, /) -> tuple[Any, tuple]:
        """As `get_out_shapes`, for a key of `get_arg_cache_key`."""
        return self._out_shapes(self._by_key(key))

    def get_out_treedef(
        self, /, *args: Any, compile_if_miss: bool = True, **kwargs: Any
    ) -> TreeDef:
        """The tree structure of what `get_out_shapes` returns."""
        found = self._find(args, kwargs, compile_if_miss)
        return jtu.tree_structure(self._out_shapes(found))

    def get_out_treedef_by_cache(self, key: CacheKey, /) -> TreeDef:
        """As `get_out_treedef`, for a key of `get_arg_cache_key`."""
        return jtu.tree_structure(self.get_out_shapes_by_cache(key))

    def get_states(
        self, /, *args: Any, compile_if_miss: bool = True, **kwargs: Any
    ) -> tuple[State, ...]:
        """All States that the function touches, in order of first access."""
        return self._trace(self._find(args, kwargs, compile_if_miss)).states

    def get_states_by_cache(self, key: CacheKey, /) -> tuple[State, ...]:
        """As `get_states`, for a key of `get_arg_cache_key`."""
        return self._trace(self._by_key(key)).states

    def get_read_states(
        self, /, *args: Any, compile_if_miss: bool = True, **kwargs: Any
    ) -> tuple[State, ...]:
        """The States whose incoming value is used, in order of first access."""
        return self._trace(self._find(args, kwargs, compile_if_miss)).reads

    def get_read_states_by_cache(self, key: CacheKey, /) -> tuple[State, ...]:
        """As `get_read_states`, for a key of `get_arg_cache_key`."""
        return self._trace(self._by_key(key)).reads

    def get_write_states(
        self, /, *args: Any, compile_if_miss: bool = True, **kwargs: Any
    ) -> tuple[State, ...]:
        """The States that are assigned, in order of first access."""
        return self._trace(self._find(args, kwargs, compile_if_miss)).writes

    def get_write_states_by_cache(self, key: CacheKey, /) -> tuple[State, ...]:
        """As `get_write_states`, for a key of `get_arg_cache_key`."""
        return self._trace(self._by_key(key)).writes

    def get_state_trace(
        self, /, *args: Any, compile_if_miss: bool = True, **kwargs: Any
    ) -> StateTrace:
        """What the trace has seen: States, reads, writes, abstract values."""
        return self._trace(self._find(args, kwargs, compile_if_miss))

    def get_state_trace_by_cache(self, key: CacheKey, /) -> StateTrace:
        """As `get_state_trace`, for a key of `get_arg_cache_key`."""
        return self._trace(self._by_key(key))

    # -- calling --

    if TYPE_CHECKING:

        def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R: ...

    def jaxpr_call_auto(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs the function, compiled, on the States' current values and commits."""
        return self._calls.run(self._bound + args, kwargs)

    def jaxpr_call(
        self, state_vals: Sequence[Any], /, *args: Any, **kwargs: Any
    ) -> tuple[tuple, Any]:
        """Evaluates the jaxpr on given values of the States: pure.

        It reads and writes no State, and so works under any JAX transform.

        **Arguments:**

        - `state_vals`: one value for each State, in the order of `get_states`. The value
            of a State that is only written is not used.

        **Returns:** `(new_state_vals, out)`, with one value for each State: `None` for
        one that is only read, if `return_only_write`.

        **Raises:** `ValueError` on a wrong number of values, or on one whose structure,
        shape or dtype is not that of the trace.
        """
        found = self._find(args, kwargs, True, ahead=False)
        program = found.program
        values = _check_values(found, state_vals)
        leaves, writes = program(found.dynamic, values)
        new = writes if self.return_only_write else values | writes
        new_vals = tuple(
            new[cell][1].unflatten(new[cell][0]) if cell in new else None
            for cell in program.order
        )
        return new_vals, program.out.build(leaves, found.arguments)

    # -- the cache --

    def get_cache_stats(self) -> dict[str, dict[str, Any]]:
        """Size, limit, hits, misses and rate of hits of the cache."""
        return {"compilation_cache": self._calls.stats()}

    def clear_cache(self) -> None:
        """Forgets everything that was traced and compiled."""
        self._calls.clear()

    def retraces(self) -> list[Any]:
        """Why the function was traced: the newest 100 times, oldest first.

        **Returns:** a list of [`statefun.Retrace`][].
        """
        return Calls.observer.history(self._calls)

    def validate_states(self, key: CacheKey, /) -> bool:
        """Whether the States still fit what was traced under `key`.

        **Raises:** `ValueError` that names the States that are gone, or have a value of
        another structure, shape or dtype.
        """
        problems = _misfits(self._by_key(key))
        if problems:
            raise StateValueError(
                message(
                    f"{self.name}: {len(problems)} of the States don't fit the trace.\n"
                    + "\n".join(f"- {p}" for p in problems),
                    "a trace is about values of one structure, shape and dtype.",
                    "call the function, or `make_jaxpr`, to have it traced again.",
                )
            )
        return True

    def validate_all_states(self) -> dict[CacheKey, bool | str]:
        """For every key True, or what `validate_states` says."""
        found: dict[CacheKey, bool | str] = {}
        for key in [t.key for t in self._calls.all_traces()] + [*self._calls.lost]:
            try:
                found[key] = self.validate_states(key)
            except StateValueError as error:
                found[key] = str(error)
        return found

    # -- inside --

    def _find(
        self, args: tuple, kwargs: dict, trace: bool, ahead: bool = True
    ) -> _Found:
        args = self._bound + args
        site, found, dynamic, states = self._calls.find(args, kwargs, trace, ahead)
        if found is None:
            self._calls.misses += 1
            raise self._unknown(_key(site, dynamic))
        return _Found(found, _states_of(found, states), states, dynamic)

    def _by_key(self, key: CacheKey) -> _Found:
        traces = self._calls.with_key(key)
        if not traces and key in self._calls.lost:
            raise _gone(f"{self.name}: {self._calls.lost[key]}")
        if not traces:
            raise self._unknown(key)
        arguments = [ref() for ref in traces[0].arguments]
        # The trace may have been made for another module: the States are those of this.
        mine = {x._cell: x for x in jtu.tree_leaves(self._bound) if is_state(x)}
        arguments[: len(mine)] = mine.values()
        return _Found(traces[0], _states_of(traces[0], arguments), arguments)

    def _unknown(self, key: CacheKey) -> ValueError:
        known = dict.fromkeys(r.key for r in self._calls.all_traces())
        listed = "\n".join(f"- {k}" for k in known) or "(none)"
        return ValueError(
            f"{self.name}: nothing was traced for this key.\n\nAsked for: {key}\n\n"
            f"Known:\n{listed}\n\nInstead: call `make_jaxpr` with the arguments first, "
            "or a method that takes the arguments."
        )

    def _trace(self, found: _Found) -> StateTrace:
        program = found.program
        by_cell = dict(zip(program.order, found.states, strict=True))
        missing = [c for c, state in by_cell.items() if state is None]
        if missing:
            raise _gone(f"{self.name}: {missing[0].describe()} of the trace")
        states: dict[Cell, Any] = by_cell
        return StateTrace(
            states=tuple(states.values()),
            reads=tuple(states[c] for c in program.order if c in program.reads),
            writes=tuple(states[c] for c in program.order if c in program.writes),
            avals=tuple(program.avals(c) for c in program.order),
        )

    def _returned(self, program: Program) -> list[Cell]:
        """The States whose values the jaxpr returns."""
        if self.return_only_write:
            return list(program.writes)
        return list(program.order)

    def _jaxpr(self, found: _Found) -> jec.ClosedJaxpr:
        program = found.program
        if self.return_only_write:
            return program.closed
        jaxpr = program.jaxpr
        values = program.split(jaxpr.outvars)[1]
        invars = jaxpr.invars[len(program.in_avals) :]
        values = program.unflatten_reads(invars) | values
        outvars = list(jaxpr.outvars[: program.n_out])
        for cell in program.order:
            outvars.extend(leaves_of(*values[cell]))
        full = jaxpr.replace(constvars=jaxpr.constvars, outvars=outvars)
        return _compat.close(full, program.consts)

    def _out_shapes(self, found: _Found) -> tuple[Any, tuple]:
        program = found.program
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in program.out_avals]
        out = program.out.build(shapes[: program.n_out], found.arguments)
        values = program.split(shapes)[1]
        reads = program.unflatten_reads(
            [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in program.read_avals_flat]
        )
        values = reads | values
        return out, tuple(
            values[c][1].unflatten(values[c][0]) for c in self._returned(program)
        )


class BoundFunction(Bound, StatefulFunction):
    """What a module that is called is compiled to."""


def make_jaxpr(
    fun: Callable[..., Any],
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Iterable[str] = (),
    axis_env: Sequence[tuple[Any, int]] | None = None,
    return_shape: bool = False,
    return_only_write: bool = False,
) -> Callable[..., tuple]:
    """As `jax.make_jaxpr`, for functions that read and write States.

    **Arguments:** as of [`statefun.StatefulFunction`][]; and

    - `return_shape`: whether the shapes of the result are returned, too.

    **Returns:** a function that takes the arguments of `fun` and returns
    `(closed_jaxpr, states)`, or `(closed_jaxpr, states, out_shapes)`, where `out_shapes`
    is the result with a `jax.ShapeDtypeStruct` for every array. For the inputs and
    outputs of the jaxpr see `StatefulFunction.get_jaxpr`.

    !!! example

        ```python
        import jax.numpy as jnp, statefun as sf

        count = sf.State(jnp.array(0))
        jaxpr, states = sf.make_jaxpr(lambda x: x + count.value)(1)
        ```
    """
    traced = StatefulFunction(
        fun,
        static_argnums,
        static_argnames,
        axis_env,
        return_only_write=return_only_write,
    )

    @functools.wraps(fun, updated=())
    def jaxpr_of(*args: Any, **kwargs: Any) -> tuple:
        found = traced._find(args, kwargs, True)
        answer = traced._jaxpr(found), traced._trace(found).states
        return (*answer, traced._out_shapes(found)[0]) if return_shape else answer

    return jaxpr_of


def name_of(fun: Any) -> str:
    """What a callable is called: that of a partial is the name of its function."""
    while isinstance(fun, functools.partial):
        fun = fun.func
    return getattr(fun, "__name__", type(fun).__name__)


def as_tuple(x: Any, kind: type) -> tuple:
    """A single value of the kind, or several, as a tuple."""
    return (x,) if isinstance(x, kind) else tuple(x)


def _key(site: Site, dynamic: Sequence[Any]) -> CacheKey:
    return site.cache_key([jax.typeof(x) for x in dynamic])


def _states_of(trace: Trace, arguments: Sequence[Any]) -> list[State | None]:
    """The States of a program, in its order."""
    places = zip(trace.program.order, trace.positions, strict=True)
    return [
        arguments[i] if i is not None else cell.handle and cell.handle()
        for cell, i in places
    ]


def _check_values(found: _Found, values: Sequence[Any]) -> Values:
    program = found.program
    cells = program.order
    if len(values) != len(cells):
        named = ", ".join(c.describe() for c in cells) or "none"
        raise ValueError(
            f"state_vals has {len(values)} values, but the function touches "
            f"{len(cells)} States: {named}."
        )
    fitting = Values()
    for cell, value in zip(cells, values, strict=True):
        if cell not in program.reads:
            continue
        flat, structure = flatten(normalise(value))
        problem = program.misfit(cell, flat, structure)
        if problem:
            raise StateValueError(
                message(
                    f"state_vals has a value for {cell.describe()} that doesn't fit: "
                    f"{problem}.",
                    "the jaxpr was traced for values of one structure, shape and dtype.",
                    "pass a value like the State's present one, or trace again with "
                    "the State holding such a value.",
                )
            )
        fitting[cell] = flat, structure
    return fitting


def _gone(which: str) -> StateValueError:
    return StateValueError(
        message(
            f"{which} is gone.",
            "a trace doesn't keep its States alive, and says nothing about others.",
            "keep the State, or ask with the arguments of a call, which traces again.",
        )
    )


def _misfits(found: _Found) -> list[str]:
    problems = []
    for cell, state in zip(found.program.order, found.states, strict=True):
        if state is None:
            problems.append(f"{cell.describe()} is gone")
        elif cell in found.program.reads:
            problem = found.program.misfit(cell, *access.current(state._cell))
            if problem:
                problems.append(f"{cell.describe()}: {problem}")
    return problems
