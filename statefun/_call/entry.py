"""What was traced and compiled for one function, by the static part of its arguments."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from .._compat import Tracer
from .._errors import StateValueError, message
from .._state import access
from .._state.cell import Cell, Value
from .._state.state import State
from .._state.static import treedef_key
from .._state.structure import leaves_of
from .._trace import program as _program
from ..ir import optimize_jaxpr
from . import args as _args
from .cache import CacheKey, Record, Records, TracingLock, trace_context
from .compiled import Compiled, Inputs, Options


class Elsewhere(Exception):
    """This entry can't serve the call: look again for one that can."""


class Observer:
    """Is told of every trace, and of what is forgotten. A call that hits tells nobody.

    This one does nothing. `statefun.inspect` puts one in its place that keeps the
    reasons of traces; code further down must not import from there.
    """

    def tracing(
        self, entry: Entry, dynamic: Sequence[Any], known: dict[Cell, Value]
    ) -> None:
        """A function is about to be traced; raising forbids it."""

    def traced(self, entry: Entry, record: Record) -> None:
        """It was traced."""

    def forgetting(self, traces: Traces, records: Sequence[Record], why: str) -> None:
        """Records of a function are gone."""

    def history(self, traces: Traces) -> list[Any]:
        """Why the function was traced, oldest first."""
        return []


observer: Observer = Observer()


class Traces:
    """All that was traced and compiled for one function."""

    def __init__(self, fun: Callable, options: Options):
        self.fun = fun
        self.options = options
        self.records = Records()
        self.entries: dict[Any, Entry] = {}
        # For calls with nothing but arrays, by how many there are: see `call.Fast`.
        self.fast: dict[int, Compiled] = {}
        self.tracing = TracingLock()
        self.history: Any = None  # of its traces: the observer's

    def remove(self, entry: Entry | None) -> None:
        if entry is None:
            return
        if entry.dead:
            observer.forgetting(self, entry.records, "gone")
        self.records.remove(entry.records)
        self.fast.clear()
        for key, other in list(self.entries.items()):
            if other is entry:
                self.entries.pop(key, None)

    def refile(self, record: Record) -> None:
        """A record was dropped to make room, and is used again."""
        for entry in self.entries.values():
            if entry.owns(record):
                entry.file(record)

    def forget(self, records: Sequence[Record]) -> None:
        for entry in list(self.entries.values()):
            if entry.drop(records):
                self.remove(entry)

    def clear(self) -> None:
        observer.forgetting(self, self.records.all(), "cleared")
        self.entries.clear()
        self.fast.clear()
        self.records.clear()


class Entry:
    """All calls whose arguments have the same static part."""

    def __init__(
        self,
        traces: Traces,
        leaves: Sequence[Any],
        treedef: Any,
        keys: tuple,
        states: Sequence[State],
        stand_in: bool,
    ):
        self.traces = traces
        self.signature = _args.Signature(leaves, treedef, stand_in)
        self.arg_cells = {s._cell: i for i, s in enumerate(self.signature.stand_ins)}
        self.records: list[Record] = []
        self.dead = False
        self.plain = False  # positional arguments only, each an array
        self.current: Compiled | None = None
        # What the programs need, all of them together, in the order it was found.
        self.inputs: dict[Cell, None] = {}
        self.updated: dict[Cell, None] = {}  # both read and written
        self.consts: dict[int, Any] = {}
        self.may_fail = False
        self.effects = False
        self._closure: dict[Cell, Any] = {}  # reached otherwise than by an argument
        self._variants: dict[tuple, Compiled] = {}
        self._present = threading.local()
        self._dropped = 0
        options = traces.options
        self.donated = self.signature.donated(options.donate)
        self.in_shardings = self.signature.spread(options.in_shardings)
        args, kwargs = treedef.children()
        n = args.num_leaves
        aliases = () if stand_in else tuple(s._cell for s in states)
        self._key = (
            (treedef_key(args), keys[:n], *aliases),
            (treedef_key(kwargs), keys[n:]),
            sum(i < n for i in self.signature.dynamic),
        )

    # -- tracing --

    def cache_key(self, avals: Sequence[Any]) -> CacheKey:
        static_args, static_kwargs, n = self._key
        return CacheKey(static_args, tuple(avals[:n]), static_kwargs, tuple(avals[n:]))

    def record(self, dynamic: Sequence[Any], known: dict[Cell, Value]) -> Record:
        """The program for these arguments and States: a cached one, or traced now."""
        with self.traces.tracing():
            record = self._find(dynamic, known)
            return record or self._trace(dynamic, known)

    def look_up(
        self, dynamic: Sequence[Any], states: Sequence[State], trace: bool
    ) -> Record | None:
        """As `record`, for States with their present values."""
        if self.dead:
            raise Elsewhere
        # NumPy arrays as JAX takes them: 64 bits are 32 where x64 is off.
        dynamic = tuple(
            x
            if isinstance(x, jax.Array)
            else np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype))
            for x in dynamic
        )
        known = {c: access.current(states[i]._cell) for c, i in self.arg_cells.items()}
        with self.traces.tracing(), self.about(states):
            record = self._find(dynamic, known)
            if record is not None:
                record.tick = self.traces.records.lookups
            elif trace:
                record = self._trace(dynamic, known)
                self.learn(record)
            return record

    def _find(self, dynamic: Sequence[Any], known: dict[Cell, Value]) -> Record | None:
        avals = tuple(jax.typeof(x) for x in dynamic)
        context = trace_context()
        for record in reversed(self.records):
            program = record.program
            if (
                program.in_avals == avals
                and record.context is context
                and all(
                    _fits(known.get(cell) or access.current(cell), structure, avals)
                    for cell, structure, avals in program.reads_with_avals()
                )
            ):
                return record
        return None

    @contextlib.contextmanager
    def about(self, states: Sequence[State]) -> Iterator[None]:
        """While a call is under way, which States the arguments hold."""
        before = getattr(self._present, "states", ())
        self._present.states = states
        try:
            yield
        finally:
            self._present.states = before

    def _trace(self, dynamic: Sequence[Any], known: dict[Cell, Value]) -> Record:
        traces, options = self.traces, self.traces.options
        observer.tracing(self, dynamic, known)
        traces.records.misses += 1

        def run(*leaves: Any) -> Any:
            args, kwargs = self.signature.build(leaves)
            return traces.fun(*args, **kwargs)

        program = _program.trace(
            run,
            dynamic,
            known=known,
            arg_index=self.arg_cells,
            axis_env=options.axis_env,
        )
        if options.ir_optimizations:
            closed = optimize_jaxpr(program.closed, options.ir_optimizations)
            program = dataclasses.replace(program, closed=closed)
        key = self.cache_key(program.in_avals)
        record = Record(program, key, trace_context(), self.arg_cells)
        record.states = tuple(  # type: ignore[assignment]
            cell.handle or _gone for cell in self._actual(program.order)
        )
        if not program.closed_over_tracers:  # tracers must not outlive their trace
            self.file(record)
        observer.traced(self, record)
        return record

    def owns(self, record: Record) -> bool:
        return record.key == self.cache_key(record.program.in_avals)

    def file(self, record: Record) -> None:
        """Keeps a record: a new one, or one that was dropped but is still compiled."""
        if record not in self.records:
            self.records.append(record)
        gone = self.traces.records.add(record)
        if gone:
            observer.forgetting(self.traces, gone, "full")
            self.traces.forget(gone)

    def _actual(self, cells: Sequence[Cell]) -> list[Cell]:
        """The States of the call that is under way, in place of the stand-ins."""
        present, index = self._present.states, self.arg_cells
        return [present[index[c]]._cell if c in index else c for c in cells]

    def learn(self, record: Record) -> bool:
        """Takes in what a program needs; False if there was nothing new."""
        program, before = record.program, self._size()
        for cell in (*program.order, *program.out.cells()):
            if cell not in self.arg_cells and cell not in self._closure:
                self._closure[cell] = self._watch(cell)
        for cell in program.reads:
            self.inputs.setdefault(cell)
            if cell in program.writes:
                self.updated.setdefault(cell)
        self.may_fail |= record.may_fail
        self.effects |= record.effects
        for const in program.consts:
            if not isinstance(const, Tracer):
                self.consts.setdefault(id(const), const)
        if self._size() == before:
            return False
        self.current = None
        self.traces.fast.clear()
        self._variants.clear()
        return True

    def _watch(self, cell: Cell) -> Any:
        """When a State is gone that the function reached by a name, the name now means
        another one (a model that was made anew in a notebook): the function has to be
        traced again. Until then the cell alone is kept, not the State."""
        state = cell.handle() if cell.handle is not None else None
        entry = weakref.ref(self)

        def died(_: Any) -> None:  # may run at any moment: take no lock here
            self = entry()
            if self is not None:
                self.dead = True
                for compiled in list(self._variants.values()):
                    compiled.epoch = -1

        return None if state is None else weakref.ref(state, died)

    def _size(self) -> tuple:
        sizes = map(len, (self._closure, self.inputs, self.updated, self.consts))
        return (*sizes, self.may_fail, self.effects)

    def variant(
        self, states: Sequence[State], fixed: Compiled | None = None
    ) -> Compiled:
        """The `Compiled` for the present structures of the States; built if new."""
        if fixed is not None:
            cells = cells_of(fixed.targets, states)
            present = [access.current(cell)[1] for cell in cells]
            misfits = zip(cells, present, fixed.structures, strict=True)
            raise StateValueError(
                message(
                    "a function compiled ahead of time was called with a State of "
                    "another structure: "
                    + ", ".join(c.describe() for c, s, t in misfits if s is not t),
                    "it was compiled for values of one structure.",
                    "lower and compile it again, or call the function itself.",
                )
            )
        if self.dead:
            raise Elsewhere
        with self.traces.tracing():
            targets = self.targets(self.inputs)
            # Without waiting for a donating call to give a State back: that call may be
            # waiting to trace, and a State that is lent keeps its structure.
            structures = tuple(access.current(c)[1] for c in cells_of(targets, states))
            compiled = self._variants.get(structures)
            if compiled is None:
                compiled = self._compile(targets, structures)
                self._variants[structures] = compiled
            self.current = compiled
            self.traces.fast.clear()
            return compiled

    def targets(self, cells: Iterable[Cell]) -> tuple[Cell | int, ...]:
        """Positions among the arguments' States in place of the stand-ins."""
        return tuple(self.arg_cells.get(cell, cell) for cell in cells)

    def _compile(self, targets: tuple, structures: tuple) -> Compiled:
        options = self.traces.options
        # Where a run may fail the old values are needed afterwards, and a callback may
        # read them meanwhile: nothing is donated.
        donate_states = options.donate_states and not (self.may_fail or self.effects)
        inputs = Inputs(
            cells=tuple(self.inputs),
            targets=targets,
            structures=structures,
            consts=tuple(self.consts.values()),
            donated=tuple(
                i
                for i, cell in enumerate(self.inputs)
                if donate_states and cell in self.updated
            ),
            donated_leaves=() if self.may_fail else tuple(self.donated),
            shardings=None if self.in_shardings is None else tuple(self.in_shardings),
            may_fail=self.may_fail,
        )
        return Compiled(self, inputs, options)

    def compile_in_trace(self, record: Record) -> Compiled:
        """For one program alone: the trace around it sees no other State read."""
        if record.compiled is not None:
            return record.compiled
        program = record.program
        inputs = Inputs(
            cells=tuple(program.reads),
            targets=self.targets(program.reads),
            structures=tuple(program.reads.values()),
            consts=tuple({id(c): c for c in program.consts}.values()),
            shardings=None if self.in_shardings is None else tuple(self.in_shardings),
            # The outermost call looks after checks: here it is told of them.
            may_fail=record.may_fail,
        )
        compiled = Compiled(self, inputs, self.traces.options)
        record.compiled = compiled
        return compiled

    def prepare(self, dynamic: Sequence[Any], states: Sequence[State]) -> Compiled:
        """Makes a `Compiled` where there is none: before the first call, or after a
        call has found out that something was missing."""
        if not self._closure and not self.records:
            # On its first call the function is traced here and not inside `jax.jit`,
            # where what it needs would be found out too late.
            self.look_up(dynamic, states, trace=True)
        if states and self.aliases(states):
            raise Elsewhere
        return self.variant(states)

    def aliases(self, states: Sequence[State]) -> bool:
        return any(state._cell in self._closure for state in states)

    def drop(self, records: Sequence[Record]) -> bool:
        """Forgets records; True if none is left."""
        kept = [r for r in self.records if r not in records]
        self._dropped += len(self.records) - len(kept)
        self.records = kept
        if self._dropped >= self.traces.records.maxsize:
            # JAX can only forget all versions of a function. The programs at hand are
            # kept, so those still in use are compiled again, but not traced.
            for compiled in self._variants.values():
                compiled.jit.clear_cache()  # type: ignore[attr-defined]
            self._dropped = 0
        return not kept

    def used(self, record: Record) -> None:
        record.tick = self.traces.records.lookups
        if not record.filed:
            self.file(record)


def _gone() -> None:
    """Stands for a weak reference whose State is gone."""


def cells_of(targets: Any, states: Sequence[State]) -> list[Cell]:
    return [t if type(t) is Cell else states[t]._cell for t in targets]


def _fits(value: Value, structure: Any, avals: tuple) -> bool:
    flat, present = value
    if present is not structure:
        return False
    return tuple(jax.typeof(x) for x in leaves_of(flat, structure)) == avals
