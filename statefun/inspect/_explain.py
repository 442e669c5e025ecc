"""`explain`: what a function would do, without doing it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jec
import jax.tree_util as jtu

from .._call.args import Static
from .._call.calls import Calls
from .._call.compiled import Options, Trace
from .._call.function import StatefulFunction, name_of
from .._call.site import Site
from .._state.cell import Cell
from .._state.state import State
from .._state.structure import ARRAY, Structure
from .._trace.names import Parameters
from .._trace.program import Program
from .._trace.result import Argument, Reference
from ..ir import OPTIMIZATIONS, optimize_jaxpr
from ..transforms import Jitted
from ._boxes import box_of, count
from ._causes import aval_text, leaves_with_path, text
from ._history import unobserved
from ._names import Captured
from ._report import Cost, Leaf, Report, StateUse, type_of


def explain(
    fn: Callable[..., Any], /, *args: Any, compile: bool = False, **kwargs: Any
) -> Report:
    """Says what a function does with States, arguments and memory. Runs nothing.

    The function is traced for these arguments in a separate cache: no State changes,
    and the function's own cache stays as it is. (A jitted function that is called
    inside is traced as usual, and caches that.)

    **Arguments:**

    - `fn`: a jitted function, a [`statefun.StatefulFunction`][], a method of a module, or
        any other callable that JAX can trace.
    - `args`, `kwargs`: its arguments. Bind an argument that is named `compile` with
        `functools.partial`.
    - `compile`: whether to compile it as well, for XLA's cost analysis.

    **Returns:** a [`statefun.Report`][]: print it, or use its `to_dict()` or
    `diagram()`.

    !!! example

        ```python
        import equinox as eqx, jax, jax.numpy as jnp, statefun as sf

        model = sf.Param(eqx.nn.Linear(2, 3, key=jax.random.key(0)), name="model")
        count = sf.State(jnp.array(0), name="count")

        @sf.filter_jit
        def step(x):
            count.value += 1
            return model.value(x)

        report = sf.explain(step, jnp.ones(2), compile=True)
        print(report)  # a table
        report.to_dict()["states"]
        print(report.diagram("mermaid"))
        ```
    """
    fun, options, args = _unwrapped(fn, args)
    passes = options.ir_optimizations or OPTIMIZATIONS
    calls = unobserved(Calls(fun, options._replace(ir_optimizations=())))
    # There would be nothing to see in a function that runs eagerly.
    with jax.disable_jit(False):
        site, trace, *_ = calls.find(args, kwargs)
        assert trace is not None, "a trace was asked for"
        program = trace.program
        optimized = optimize_jaxpr(program.closed, passes)
        cost = None
        if compile:
            if options.ir_optimizations:
                # What is compiled is what the function itself would compile.
                trace.program = dataclasses.replace(program, closed=optimized)
            cost = _cost(calls.trace_ahead(args, kwargs)[2].lower().compile())
    looked_at = _Traced(fun, options, site, trace, program)
    return Report(
        name=options.name,
        states=looked_at.states(),
        arguments=looked_at.arguments(),
        outputs=looked_at.outputs(),
        constants=looked_at.constants(),
        equations=_sorted(count(program.jaxpr)),
        optimized=_sorted(count(optimized.jaxpr)),
        optimizations=tuple(passes),
        effects=tuple(sorted(map(str, program.jaxpr.effects))),
        cost=cost,
        box=box_of(options.name, program.closed),
    )


def _unwrapped(fn: Any, args: tuple) -> tuple[Any, Options, tuple]:
    """The function underneath, how it is to be compiled, and all its arguments."""
    bound = getattr(fn, "__self__", None)
    function = getattr(fn, "__func__", None)
    if bound is not None and isinstance(function, Jitted):
        fn, args = function, (bound, *args)  # a jitted method
    if not callable(fn):
        raise TypeError(f"explain takes a function and its arguments, not {fn!r}.")
    if isinstance(fn, Jitted | StatefulFunction):
        return fn._calls.fun, fn._calls.options, fn._bound + args
    return fn, Options(name=name_of(fn)), args


class _Traced:
    """A trace, and the names of what is in it."""

    def __init__(
        self,
        fun: Any,
        options: Options,
        site: Site,
        trace: Trace,
        program: Program,
    ):
        self.options, self.site, self.trace = options, site, trace
        self.program = program
        self.parameters = Parameters(fun)
        self.leaves = [
            (self.parameters.path(keys), leaf.value if type(leaf) is Static else leaf)
            for keys, leaf in leaves_with_path(site.signature)
        ]
        # What is passed may be a function, too: the body of a scan.
        self.captured = Captured(
            fun, [pair for pair in self.leaves if callable(pair[1])]
        )

    # -- States --

    def states(self) -> tuple[StateUse, ...]:
        return tuple(map(self._use, self.program.order))

    def _use(self, cell: Cell) -> StateUse:
        program = self.program
        read, written = cell in program.reads, cell in program.writes
        structure = program.reads[cell] if read else program.writes[cell]
        arrays = _leaves(structure, program.avals(cell))
        becomes = None
        if written:
            new = _leaves(program.writes[cell], program.written_avals(cell))
            if [x.type for x in new] != [x.type for x in arrays]:
                becomes = type_of(new)
        donates = self.options.donate_states and not self.trace.may_fail
        return StateUse(
            path=self._path(cell),
            kind=cell.kind.__name__,
            name=cell.name,
            created_at=cell.where,
            arrays=arrays,
            becomes=becomes,
            read=read,
            written=written,
            donated=donates and read and written,
        )

    def _path(self, cell: Cell) -> str | None:
        for path, leaf in self.leaves:
            # A State that is also reached in another way has no stand-in.
            mine = isinstance(leaf, State) and leaf._cell is cell
            if mine or (type(leaf) is Reference and leaf.cell is cell):
                return path
        return self.captured.states.get(cell) or cell.path

    # -- arrays --

    def arguments(self) -> tuple[Leaf, ...]:
        donated = set() if self.trace.may_fail else set(self.site.donated_leaves)
        avals = iter(enumerate(self.program.in_avals))
        found = []
        for path, leaf in self.leaves:
            if leaf is ARRAY:
                i, aval = next(avals)
                found.append(_leaf(path, aval, donated=i in donated))
            elif not isinstance(leaf, State) and type(leaf) is not Reference:
                found.append(Leaf(path, static=text(leaf)))
        return tuple(found)

    def outputs(self) -> tuple[Leaf, ...]:
        out = self.program.out
        tree = out.treedef.unflatten(range(len(out.leaves)))
        avals = iter(self.program.out_avals)
        found = []
        for keys, i in jtu.tree_leaves_with_path(tree):
            path, leaf = "result" + jtu.keystr(keys), out.leaves[i]
            if leaf is ARRAY:
                found.append(_leaf(path, next(avals)))
            elif type(leaf) is Reference:
                found.append(Leaf(path, static=self._described(leaf.cell)))
            elif type(leaf) is Argument:
                stand_in = self.site.signature.stand_ins[leaf.index]
                found.append(Leaf(path, static=self._described(stand_in._cell)))
            else:
                found.append(Leaf(path, static=text(leaf)))
        return tuple(found)

    def _described(self, cell: Cell) -> str:
        label = self._path(cell) or cell.name or f"created at {cell.where}"
        return f"{cell.kind.__name__} {label}"

    def constants(self) -> tuple[Leaf, ...]:
        consts = {id(c): c for c in _consts(self.program.closed)}
        names = self.captured.arrays
        return tuple(
            _leaf(names.get(i, "(no name)"), jax.typeof(c)) for i, c in consts.items()
        )


def _consts(closed: Any) -> Iterable[Any]:
    yield from getattr(closed, "consts", ())
    for eqn in closed.eqns:
        for sub in jec.jaxprs_in_params(eqn.params):
            yield from _consts(sub)


def _leaves(structure: Structure, avals: Sequence[Any]) -> tuple[Leaf, ...]:
    return tuple(map(_leaf, structure.paths(), avals))


def _leaf(path: str, aval: Any, donated: bool = False) -> Leaf:
    dtype, shape = getattr(aval, "dtype", None), getattr(aval, "shape", None)
    if dtype is None or shape is None:  # a token, a ref
        return Leaf(path, static=aval_text(aval), donated=donated)
    n = int(getattr(dtype, "itemsize", 0))
    for size in shape:
        n *= int(size)
    return Leaf(path, tuple(map(int, shape)), str(dtype), n, donated=donated)


def _sorted(counts: Any) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _cost(compiled: Any) -> Cost:
    # Some backends return a list, or nothing at all.
    costs = compiled.cost_analysis() or {}
    if isinstance(costs, list | tuple):
        costs = costs[0] if costs else {}
    memory = compiled.memory_analysis()

    def of(name: str) -> int | None:
        found = getattr(memory, f"{name}_in_bytes", None)
        return None if found is None else int(found)

    return Cost(
        flops=costs.get("flops"),
        bytes_accessed=costs.get("bytes accessed"),
        argument_bytes=of("argument_size"),
        output_bytes=of("output_size"),
        temporary_bytes=of("temp_size"),
        aliased_bytes=of("alias_size"),
        peak_bytes=of("peak_memory"),
    )
