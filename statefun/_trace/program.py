"""A traced function: a pure jaxpr, the States it reads and writes, its output's layout.

`trace` runs a function under a `TracedFrame` inside `jax.make_jaxpr`. Every State that
the function reads shows up in the jaxpr as a `state_read` equation; `lift` removes these
and makes their results inputs. What comes out is a `Program`: a value, pure, that any
transform can hand to JAX.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jec

from .. import _compat
from .._compat import Tracer
from .._errors import escaped_tracer
from .._state.access import StandIns
from .._state.cell import Cell, Value, Values
from .._state.structure import Structure, flat_of, leaves_of
from .._trace.result import OutTree, flatten_out, refuse_bare_state
from . import frame as _frame, stale
from .escape import refuse_left_behind
from .frame import TracedFrame
from .names import Named

_CALLBACKS = {"pure_callback", "io_callback"}


# -- programs -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A traced function.

    The inputs of `closed` are the dynamic leaves of the arguments, then the arrays of
    the States in `reads`; its outputs are the arrays of the result, then those of the
    States in `writes`. A program holds no tracer, unless the function closed over one;
    `closed_over_tracers` says so, and such a program must not outlive the trace.
    """

    closed: jec.ClosedJaxpr
    order: tuple[Cell, ...]  # all States, by first access
    reads: dict[Cell, Structure]
    writes: dict[Cell, Structure]
    out: OutTree
    in_avals: tuple  # of the arguments
    read_avals: dict[Cell, tuple]
    n_out: int  # arrays of the result
    reached: tuple[Cell, ...] = ()  # of `stand_ins`: those reached in another way

    @functools.cached_property
    def jaxpr(self) -> Any:
        return self.closed.jaxpr

    @functools.cached_property
    def consts(self) -> Sequence[Any]:
        return self.closed.consts

    def without_consts(self) -> Program:
        """The same, for what it closes over to be given when it is evaluated."""
        nothing = [None] * len(self.consts)
        return dataclasses.replace(self, closed=_compat.close(self.jaxpr, nothing))

    @functools.cached_property
    def closed_over_tracers(self) -> bool:
        return any(isinstance(c, Tracer) for c in self.consts)

    @functools.cached_property
    def may_fail(self) -> bool:
        """Whether running it may raise: a callback may, and `eqx.error_if` is one."""
        return bool(primitives_of(self.jaxpr) & _CALLBACKS)

    def written_avals(self, cell: Cell) -> tuple:
        written = unflatten_values(self.out_avals[self.n_out :], self.writes)
        return tuple(leaves_of(*written[cell]))

    def __call__(
        self,
        dynamic: Sequence[Any],
        values: Mapping[Cell, Value],
        consts: Sequence[Any] | None = None,
    ) -> tuple[list[Any], Values]:
        """Pure: the arrays of the result, and what the written States hold then."""
        consts = self.consts if consts is None else consts
        reads = [x for cell in self.reads for x in leaves_of(*values[cell])]
        return self.split(_compat.eval_jaxpr(self.jaxpr, consts, *dynamic, *reads))

    @functools.cached_property
    def out_avals(self) -> list[Any]:
        return [v.aval for v in self.jaxpr.outvars]

    @property
    def read_avals_flat(self) -> list[Any]:
        return [aval for cell in self.reads for aval in self.read_avals[cell]]

    def reads_with_avals(self) -> Iterator[tuple[Cell, Structure, tuple]]:
        for cell, structure in self.reads.items():
            yield cell, structure, self.read_avals[cell]

    def avals(self, cell: Cell) -> tuple:
        """Of the incoming value if it is read, else of the written one."""
        if cell in self.reads:
            return self.read_avals[cell]
        return self.written_avals(cell)

    def misfit(self, cell: Cell, flat: Any, structure: Structure) -> str | None:
        """Why a value can't stand in for the one that was traced; None if it can."""
        traced = self.reads[cell]
        if structure is not traced:
            return f"its structure is {structure}, and {traced} was traced"
        avals = [jax.typeof(x) for x in leaves_of(flat, structure)]
        for path, new, old in zip(
            structure.paths(), avals, self.read_avals[cell], strict=True
        ):
            if (new.shape, new.dtype) != (old.shape, old.dtype):
                at = f"the array at `{path}`" if path else "the array"
                return f"{at} is {new.str_short()}, and {old.str_short()} was traced"
        return None

    def unflatten_reads(self, leaves: Sequence[Any]) -> Values:
        return unflatten_values(leaves, self.reads)

    def split(self, outputs: Sequence[Any]) -> tuple[list[Any], Values]:
        """The outputs of the jaxpr as the result's arrays and the States' new values."""
        return list(outputs[: self.n_out]), unflatten_values(
            outputs[self.n_out :], self.writes
        )


def unflatten_values(
    arrays: Sequence[Any], structures: Mapping[Cell, Structure]
) -> Values:
    values, start = Values(), 0
    for cell, structure in structures.items():
        stop = start + len(structure.slots)
        values[cell] = flat_of(arrays[start:stop], structure), structure
        start = stop
    return values


def trace(
    run: Callable[..., Any],
    dynamic: Sequence[Any],
    *,
    known: Mapping[Cell, Value] | None = None,
    arg_index: Mapping[Cell, int] | None = None,
    axis_env: Any = None,
    stand_ins: Mapping[Cell, Cell] | None = None,
    named: Named | None = None,
    static: Sequence[Any] = (),
    view: Callable[[Cell, Value], Sequence[Any] | None] | None = None,
) -> Program:
    """Traces `run(*dynamic)`, once, to a `Program`.

    **Arguments:**

    - `run`: takes the dynamic leaves one by one and returns any pytree.
    - `dynamic`: arrays, or anything else `jax.make_jaxpr` takes.
    - `known`, `view`: see `frame.TracedFrame`.
    - `arg_index`: the stand-ins for States of arguments, by position.
    - `axis_env`: as in `jax.make_jaxpr`.
    - `stand_ins`: for States of the arguments, by the States that they stand for.
    - `named`: what JAX's errors shall call the function and its arguments.
    - `static`: the arguments that are not arrays, where `run` doesn't refer to them.

    **Raises:** `TypeError` if a State is returned bare or in a plain container;
    `StateTraceError` if the function leaves a State that it made anywhere else.
    """
    at_top = _compat.at_top_level()
    seen_as = StandIns(stand_ins) if stand_ins else None
    frame = TracedFrame(known, seen_as, view)
    found: dict[str, Any] = {}

    def flat(*leaves: Any) -> list[Any]:
        with frame:
            out = run(*leaves)
            refuse_bare_state(out, "returned")
            arrays, found["out"] = flatten_out(out, frame.created, arg_index)
            found["n_out"] = len(arrays)
            mine = [c for c in frame.order if c in frame.writes]
            writes = {c: frame.writes[c] for c in mine if c not in frame.created}
            found["reads"] = {c: v[1] for c, v in frame.reads.items()}
            found["writes"] = {c: v[1] for c, v in writes.items()}
            for values in (writes, frame.reads):
                for value in values.values():
                    arrays.extend(leaves_of(*value))
            return arrays

    if named is not None:
        named.lend_to(flat)
    try:
        with stale.trace_context():
            closed = jax.make_jaxpr(flat, axis_env=axis_env)(*dynamic)
        if at_top and any(isinstance(x, Tracer) for x in closed.consts):
            # No trace is left that it could belong to.
            raise escaped_tracer([c for c in frame.order if c in frame.kept])
        refuse_left_behind(frame.created, run, static, found["out"], found["writes"])
    except BaseException:
        # JAX has cached what raw transforms made inside; without a jaxpr there are no
        # probes to look for.
        if frame.kept:
            stale.forget_inner_traces()
        raise
    n_reads = sum(len(s.slots) for s in found["reads"].values())
    closed, probes = lift(closed, n_reads)
    # A probe marks each read inside a raw transform. Those that are not at the top level
    # of the jaxpr are in one that the transform has made, and that JAX keeps. Transforms
    # that keep nothing (grad, vmap) leave theirs at the top level.
    if frame.probes != len(set(probes)):
        stale.forget_inner_traces()
    return Program(
        closed=closed,
        order=tuple(c for c in frame.order if c not in frame.created),
        reached=tuple(seen_as.reached) if seen_as is not None else (),
        in_avals=tuple(v.aval for v in closed.jaxpr.invars[: len(dynamic)]),
        read_avals=frame.avals,
        **found,
    )


def lift(closed: jec.ClosedJaxpr, n_reads: int) -> tuple[jec.ClosedJaxpr, list[int]]:
    """Makes the reads of States inputs of the jaxpr.

    **Arguments:**

    - `closed`: a jaxpr with `state_read` equations at its top level, whose last
        `n_reads` outputs are the results of these (which also keeps JAX from dropping
        the names of results that nothing uses).

    **Returns:** the jaxpr without these equations and outputs, its inputs extended by
    their results; and the tokens of the probes found.
    """
    jaxpr = closed.jaxpr
    keep = len(jaxpr.outvars) - n_reads
    kept, probes = [], []
    for eqn in jaxpr.eqns:
        if eqn.primitive is stale.state_probe_p:
            probes.append(eqn.params["token"])
        elif eqn.primitive is not _frame.state_read_p:
            kept.append(eqn)
    lifted = jaxpr.replace(
        eqns=kept,
        constvars=jaxpr.constvars,
        invars=[*jaxpr.invars, *jaxpr.outvars[keep:]],
        outvars=jaxpr.outvars[:keep],
    )
    return _compat.close(lifted, closed.consts), probes


# -- questions to a jaxpr -----------------------------------------------------------


def primitives_of(jaxpr: Any) -> set[str]:
    """The names of all primitives in a jaxpr, sub-jaxprs included."""
    names: set[str] = set()
    todo, seen = [jaxpr], set()
    while todo:
        jaxpr = todo.pop()
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        if id(jaxpr) in seen:
            continue
        seen.add(id(jaxpr))
        for eqn in jaxpr.eqns:
            names.add(eqn.primitive.name)
            todo.extend(jec.jaxprs_in_params(eqn.params))
    return names
