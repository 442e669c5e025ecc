"""All calls of a function whose arguments have the same static part."""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from .. import _compat
from .._state import access
from .._state.cell import Cell, Value, Values
from .._state.state import State, keeping_attributes
from .._state.structure import Structure, leaves_of
from .._trace import program as _program
from .._trace.names import named_at
from ..ir import optimize_jaxpr
from .args import Signature
from .compiled import Compiled, Restart, Trace, present
from .keys import CacheKey, jax_configuration

if TYPE_CHECKING:
    from .calls import Calls


class Site:
    """What was traced and compiled for one static part of the arguments.

    The States of the arguments are stand-ins here, and *positions* elsewhere: a program
    speaks of the first, second, … State of the arguments, and serves every module of
    the same structure.

    Everything here is changed under the tracing lock of its `Calls`, and by nobody else.

    **Arguments:**

    - `pins`: States of the arguments that the function reaches in another way as well
        (a global, its closure), by position. They are part of the key.
    """

    def __init__(
        self,
        calls: Calls,
        key: Any,
        signature: Signature,
        base: Site | None = None,
        pins: Mapping[int, Cell] | None = None,
    ):
        self.calls = calls
        self.key = key
        self.signature = signature
        self.base = base or self
        self.pins = pins or {}
        self.arg_cells = {s._cell: i for i, s in enumerate(signature.stand_ins)}
        self.traces: list[Trace] = []
        # What the programs need, all of them together, in the order it was found.
        self.inputs: dict[Cell, None] = {}
        self.updated: dict[Cell, None] = {}  # both read and written
        self.consts: dict[int, Any] = {}
        self.may_fail = False
        self.effects = False
        # Reached otherwise than by an argument, each with a weak reference that takes
        # this site away when the State is gone.
        self.closure: dict[Cell, Any] = {}
        self._seen: dict[tuple, Structure] = {}  # see `to_stand_ins`
        self._variants: dict[tuple, Compiled] = {}
        self._in_trace: dict[Trace, Compiled] = {}
        self._evicted = 0
        options = calls.options
        self._donated_leaves = signature.donated(options.donate, options.bound)
        self._shardings = signature.spread(options.in_shardings, options.bound)
        self._watched = [self._watch(leaf) for leaf in signature.weak_leaves()]
        for cell in self.pins.values():
            self._reach(cell)

    # -- the States of a call --

    def cells_of(self, cells: Iterable[Cell], states: Sequence[State]) -> list[Cell]:
        """The States of a call in place of the stand-ins, as the frame there is sees
        them."""
        index = self.arg_cells
        return [
            states[index[c]]._cell if c in index else access.resolve(c) for c in cells
        ]

    def inside(self, states: Sequence[State]) -> dict[Cell, Value]:
        """What the stand-ins hold in a call with these States."""
        values = [access.current(state._cell) for state in states]
        values = self.to_stand_ins(self.arg_cells, values, states)
        return dict(zip(self.arg_cells, values, strict=True))

    def to_stand_ins(
        self, cells: Iterable[Cell], values: Sequence[Value], states: Sequence[State]
    ) -> list[Value]:
        """Values of `cells`, as the traced function sees them: States in the value of a
        State of the arguments are of the arguments, too, and so stand-ins.

        **Raises:** `Restart` if another thread has put other States there meanwhile.
        """
        if not self.signature.nested:
            return list(values)
        index = {state._cell: i for i, state in enumerate(states)}

        def seen(structure: Structure) -> Structure:
            places = tuple(index.get(x._cell, -1) for x in structure.states)
            if -1 in places:
                raise Restart
            key = structure.form, places
            if key not in self._seen:
                stand_ins = [self.signature.stand_ins[i] for i in places]
                self._seen[key] = structure.around(stand_ins)
            return self._seen[key]

        return [
            (flat, seen(s)) if cell in self.arg_cells and s and s.states else (flat, s)
            for cell, (flat, s) in zip(cells, values, strict=True)
        ]

    def from_stand_ins(
        self, cells: Sequence[Cell], values: Sequence[Value], states: Sequence[State]
    ) -> dict[Cell, Value]:
        """What a program has written to `cells`, with the States of this call in it."""

        def back(cell: Cell, structure: Structure) -> Structure:
            real = [
                states[self.arg_cells[x._cell]] if x._cell in self.arg_cells else x
                for x in structure.states
            ]
            present = access.structure_of(cell)
            if present is not None and present.form is structure.form:
                if all(x is y for x, y in zip(present.states, real, strict=True)):
                    return present  # not even looked up
            return structure.around(real)

        return {
            cell: (flat, back(cell, s) if s.states and self.arg_cells else s)
            for cell, (flat, s) in zip(cells, values, strict=True)
        }

    # -- tracing --

    def cache_key(self, avals: Sequence[Any]) -> CacheKey:
        static_args, static_kwargs, n = self.signature.key(self.pins)
        return CacheKey(static_args, tuple(avals[:n]), static_kwargs, tuple(avals[n:]))

    def find(
        self, dynamic: Sequence[Any], states: Sequence[State], trace: bool = True
    ) -> Trace | None:
        """The trace for these arguments and States: one that there is, or a new one.

        **Raises:** `Restart` if the function turns out to reach one of the States in
        another way, too: the trace is filed where the next look-up finds it.
        """
        # NumPy arrays as JAX takes them: 64 bits are 32 where x64 is off.
        dynamic = [
            x
            if isinstance(x, jax.Array | jax.ShapeDtypeStruct)
            else np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype))
            for x in dynamic
        ]
        return self.calls.tracing(
            lambda: self._find(dynamic, self.inside(states), trace)
        )

    def _find(
        self, dynamic: Sequence[Any], values: Mapping[Cell, Value], trace: bool = True
    ) -> Trace | None:
        in_avals = tuple(jax.typeof(x) for x in dynamic)
        configuration = jax_configuration()
        for found in reversed(self.traces):
            if (
                found.program.in_avals == in_avals
                and found.configuration is configuration
                and all(
                    _fits(values.get(c) or access.current(access.resolve(c)), s, avals)
                    for c, s, avals in found.program.reads_with_avals()
                )
            ):
                found.tick = self.calls.lookups
                return found
        return self._trace(dynamic, values, configuration) if trace else None

    def _trace(
        self,
        dynamic: Sequence[Any],
        values: Mapping[Cell, Value],
        configuration: Any,
    ) -> Trace:
        calls, states = self.calls, present.states
        assert states is not None, "a trace belongs to a call"
        calls.observer.tracing(self, dynamic, values)
        calls.misses += 1
        fun = calls.fun

        def run(*leaves: Any) -> Any:
            args, kwargs = self.signature.build(leaves)
            with keeping_attributes(self.signature.stand_ins):
                return fun(*args, **kwargs)

        stand_ins = {
            state._cell: cell
            for cell, state in zip(self.arg_cells, states, strict=True)
        }
        program = _program.trace(
            run,
            dynamic,
            known=values,
            arg_index=self.arg_cells,
            axis_env=calls.options.axis_env,
            stand_ins=stand_ins,
            named=named_at(fun, self.signature.paths()),
            static=(self.signature.leaves, self.signature.weak_leaves()),
        )
        if calls.options.ir_optimizations:
            closed = optimize_jaxpr(program.closed, calls.options.ir_optimizations)
            program = dataclasses.replace(program, closed=closed)
        site = self
        also = {self.arg_cells[stand_ins[c]]: c for c in program.reached}
        if also.keys() - self.pins.keys():
            site = calls.pinned(self.base, {**self.pins, **also})
        trace = Trace(program, site.cache_key(program.in_avals), configuration)
        trace.positions = tuple(map(self.arg_cells.get, program.order))
        trace.arguments = tuple(map(weakref.ref, states))
        if not program.closed_over_tracers:  # tracers must not outlive their trace
            calls.file(site, trace)
        calls.observer.traced(site, trace)
        site.learn(trace)
        if site is not self:
            raise Restart
        return trace

    def learn(self, trace: Trace) -> None:
        """Takes in what a program needs."""
        program, before = trace.program, self._size()
        for cell in (*program.order, *program.out.cells()):
            if cell not in self.arg_cells:
                self._reach(cell)
        if program.closed_over_tracers:
            return
        for cell in program.reads:
            self.inputs.setdefault(cell)
            if cell in program.writes:
                self.updated.setdefault(cell)
        self.may_fail |= trace.may_fail
        self.effects |= trace.effects
        for const in program.consts:
            self.consts.setdefault(id(const), const)
        if self._size() != before:
            self._variants.clear()
            self.calls.plans.clear()

    def _reach(self, cell: Cell) -> None:
        for site in (self, self.base):
            if cell not in site.closure:
                site.closure[cell] = site._watch_state(cell)

    def _size(self) -> tuple:
        sizes = map(len, (self.inputs, self.updated, self.consts))
        return (*sizes, self.may_fail, self.effects)

    # -- what is gone --

    def _watch_state(self, cell: Cell) -> Any:
        """When a State is gone that the function reached by a name, the name now means
        another one (a model that was made anew in a notebook): the function has to be
        traced again. Until then the cell alone is kept, not the State."""
        state = cell.handle() if cell.handle is not None else None
        return None if state is None else self._watch(state)

    def _watch(self, thing: Any) -> Any:
        site = weakref.ref(self)

        def died(_: Any, finalizing: Any = sys.is_finalizing) -> None:
            # May run at any moment, the end of the interpreter included.
            self = site()
            if self is not None and not finalizing():
                self.calls.drop(self)

        return weakref.ref(thing, died)

    def gone(self) -> list[Cell]:
        """The States that the function reached by a name and that are gone."""
        return [c for c, ref in self.closure.items() if ref is None or ref() is None]

    # -- compiling --

    def compiled(self, structures: tuple[Structure, ...]) -> Compiled:
        """The `Compiled` for States of these structures; made if there is none."""
        key = structures, _compat.checks_results()
        compiled = self._variants.get(key)
        if compiled is None:
            compiled = self.calls.tracing(lambda: self._compile(structures))
            self._variants[key] = compiled
        return compiled

    @property
    def spares(self) -> bool:
        """Whether nothing is donated for now, though it may be in a later call."""
        options = self.calls.options
        donates = options.donate_states or self._donated_leaves
        return bool(donates) and _compat.checks_results()

    @property
    def donated(self) -> list[int]:
        """Which of the inputs are donated.

        Where a run may fail the old values are needed afterwards, and a callback may
        read them meanwhile: nothing is.
        """
        may_fail = self.may_fail or _compat.checks_results()
        if not self.calls.options.donate_states or may_fail or self.effects:
            return []
        return [i for i, cell in enumerate(self.inputs) if cell in self.updated]

    @property
    def donated_leaves(self) -> list[int]:
        """Which of the dynamic leaves are donated."""
        may_fail = self.may_fail or _compat.checks_results()
        return [] if may_fail else self._donated_leaves

    def _compile(self, structures: tuple[Structure, ...]) -> Compiled:
        return Compiled(
            self._find_covered,
            self.calls.options,
            tuple(self.inputs),
            structures,
            tuple(self.consts.values()),
            donated=self.donated,
            donated_leaves=self.donated_leaves,
            shardings=self._shardings,
            may_fail=self.may_fail,
        )

    def _find_covered(
        self, compiled: Compiled, dynamic: Sequence[Any], values: Values
    ) -> Trace:
        # States that are no input here (yet) have the values that they have now.
        states = present.states
        assert states is not None

        def find() -> Trace | None:
            return self._find(dynamic, Values({**self.inside(states), **values}))

        trace = self.calls.tracing(find)
        assert trace is not None
        self.learn(trace)
        if not compiled.covers(trace):
            raise Restart
        return trace

    def compiled_in_trace(self, trace: Trace) -> Compiled:
        """For one program alone: the trace around it sees no other State read."""
        if trace not in self._in_trace:
            program = trace.program
            self._in_trace[trace] = Compiled(
                self._find_covered,
                self.calls.options,
                tuple(program.reads),
                tuple(program.reads.values()),
                tuple({id(c): c for c in program.consts}.values()),
                shardings=self._shardings,
                # The outermost call looks after checks: here it is told of them.
                may_fail=trace.may_fail,
            )
        return self._in_trace[trace]

    def evict(self, traces: Sequence[Trace]) -> bool:
        """Forgets traces; True if none is left."""
        kept = [t for t in self.traces if t not in traces]
        self._evicted += len(self.traces) - len(kept)
        self.traces = kept
        for trace in traces:
            self._in_trace.pop(trace, None)
        if self._evicted >= self.calls.maxsize:
            # JAX can only forget all versions of a function. The programs at hand are
            # kept, so those still in use are compiled again, but not traced.
            for compiled in self._variants.values():
                compiled.jit.clear_cache()  # type: ignore[attr-defined]
            self._evicted = 0
        return not kept


def _fits(value: Value, structure: Any, avals: tuple) -> bool:
    flat, now = value
    if now is not structure:
        return False
    return tuple(jax.typeof(x) for x in leaves_of(flat, structure)) == avals
