"""What happens when a traced function is called.

A call of a jitted function goes like this:

1. Its arguments are taken apart (`_args`). What is static about them picks an `Entry`.
2. The entry has a `Compiled`: one `jax.jit`, and the States whose values go in. The
   values are read as one snapshot.
3. The `jax.jit` is called. Which compiled version runs is JAX's decision, made by its
   C++ cache from shapes, dtypes, shardings and configuration. Only where JAX misses,
   `Compiled._body` runs: there the function is traced to a program.
4. The result says which program it was (its `Record`), and so which States were written.
   They are committed in one step, if nobody else has written them meanwhile; else the
   call runs again on the new values.

If a program reads States, or closes over arrays, that its `Compiled` doesn't have as
inputs, the entry learns them and the call starts again from 2, with the program at hand:
the function is not traced twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.checkify import check_error

from . import _args, _frame, _program
from ._cache import CacheKey, Record, Records, TracingLock, trace_context
from ._compat import (
    TOP_LEVEL,
    Tracer,
    array_class,
    at_top_level,
    current_trace,
    jit_disabled,
)
from ._compiled import Compiled, Eager, Inputs, Options, Restart
from ._errors import StateTraceError, StateValueError, lesson
from ._frame import Cell, local, lock, shared
from ._state import State
from ._structure import leaves_of, treedef_key
from .ir import optimize_jaxpr


class _Elsewhere(Exception):
    """This entry can't serve the call: look again for one that can."""


class Observer:
    """Is told of every trace, and of what is forgotten. A call that hits tells nobody.

    This one does nothing. `statefun.inspect` puts one in its place that keeps the
    reasons of traces; code further down must not import from there.
    """

    def tracing(
        self, entry: Entry, dynamic: Sequence[Any], known: dict[Cell, _frame.Value]
    ) -> None:
        """A function is about to be traced; raising forbids it."""

    def traced(self, entry: Entry, record: Record) -> None:
        """It was traced."""

    def forgetting(self, caller: Caller, records: Sequence[Record], why: str) -> None:
        """Records that the caller had are gone."""

    def history(self, caller: Caller) -> list[Any]:
        """Why the function was traced, oldest first."""
        return []


observer: Observer = Observer()


class Caller:
    """Calls one function, and keeps what was traced and compiled for it."""

    def __init__(self, fun: Callable, options: Options):
        self.fun = fun
        self.options = options
        self.records = Records()
        self.entries: dict[Any, Entry] = {}
        # For calls with nothing but arrays, by how many there are: see `Fast`.
        self.fast: dict[int, Compiled] = {}
        self.tracing = TracingLock()
        self.history: Any = None  # of its traces: the observer's
        self.static = _args.StaticArguments(
            fun, options.static_argnums, options.static_argnames
        )

    def run(self, args: tuple, kwargs: dict) -> Any:
        self.records.lookups += 1
        while True:
            if jit_disabled():
                return self.eager(args, kwargs)
            entry, dynamic, states = self.entry(args, kwargs)
            inside = local.frame is not None or not at_top_level()
            run = entry.run_in_trace if inside else entry.run_at_top
            try:
                with entry.about(states):
                    return run(dynamic, states)
            except _Elsewhere:
                continue
            except Eager:
                return self.eager(args, kwargs)

    def eager(self, args: tuple, kwargs: dict) -> Any:
        """Runs the function without tracing it, with the same effect on States."""

        _args.check_arguments(args, kwargs)

        def run() -> Any:
            out = self.fun(*args, **kwargs)
            _program.refuse_bare_state(out, "returned")
            return out

        return _frame.transaction(lambda: _frame.nested(run))

    def key(self, args: tuple, kwargs: dict) -> Any:
        """Equal for calls with the same static part."""
        if self.static:
            args, kwargs = self.static.mark(args, kwargs)
        return _args.split(args, kwargs)[-1]

    def entry(self, args: tuple, kwargs: dict) -> tuple[Entry, tuple, list[State]]:
        if self.static:
            args, kwargs = self.static.mark(args, kwargs)
        leaves, dynamic, states, treedef, key = _args.split(args, kwargs)
        entry = self.entries.get(key)
        if entry is None or entry.dead:
            _args.check_arguments(args, kwargs)
            self.remove(entry)
            entry = Entry(self, leaves, treedef, key[1], states, stand_in=True)
            entry = self.entries.setdefault(key, entry)
            entry.plain = _is_plain(args, kwargs)
        if states and entry.aliases(states):
            # The function reaches one of these States by another way as well. Stand-ins
            # would make two of it, so these very States are part of the key.
            keys = key[1]
            key = key, tuple(state._cell for state in states)
            entry = self.entries.get(key)
            if entry is None or entry.dead:
                self.remove(entry)
                entry = Entry(self, leaves, treedef, keys, states, stand_in=False)
                entry = self.entries.setdefault(key, entry)
            states = []
        return entry, dynamic, states

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

    def ahead_of_time(self, args: tuple, kwargs: dict) -> AheadOfTime:
        return AheadOfTime(self, args, kwargs)

    def clear(self) -> None:
        observer.forgetting(self, self.records.all(), "cleared")
        self.entries.clear()
        self.fast.clear()
        self.records.clear()


def _is_plain(args: tuple, kwargs: dict) -> bool:
    return not kwargs and all(isinstance(a, jax.Array) for a in args)


class Fast:
    """A callable whose calls with nothing but arrays are cheap.

    Everything that can go wrong is looked at, and if anything is unusual (a transform
    under way, another thread that writes, a State of another structure, a function that
    was not called in this way before) the call is left to `Caller.run`. It is written
    out here because at 5 µs for a whole `jax.jit` call each further Python frame, lock
    or look at a thread-local shows: see the benchmark.
    """

    _caller: Caller

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        caller = self._caller
        compiled = caller.fast.get(len(args))
        if (
            compiled is None
            or kwargs
            or shared.busy
            or current_trace() is not TOP_LEVEL
        ):
            return caller.run(args, kwargs)
        if args:
            concrete = array_class()
            for arg in args:
                if type(arg) is not concrete:
                    return caller.run(args, kwargs)
        version = shared.version
        flats = [cell.flat for cell in compiled.own]
        if (
            version & 1
            or shared.version != version
            or compiled.epoch != shared.structures
        ):
            return caller.run(args, kwargs)
        try:
            out = compiled.jit(args, flats)
        except (Restart, Eager):
            return caller.run(args, kwargs)
        token, arrays = out.popitem()
        record = token.record()
        cells = record.cells
        if cells:
            again = False
            lock.acquire()
            try:
                if shared.taken:  # a donating call has the States: after it
                    _frame.wait_for(cells)
                if (
                    shared.version == version
                    and record.steady
                    and compiled.epoch == shared.structures
                ):
                    shared.version = version + 1
                    n = record.n_out
                    for cell, flat in zip(cells, arrays[n:] if n else arrays):  # noqa: B905
                        cell.flat = flat
                    shared.version = version + 2
                elif _conflict(record, compiled.own, flats, cells):
                    again = True
                else:
                    _frame.assign(cells, arrays[record.n_out :], record.structures)
            finally:
                lock.release()
            if again:
                return caller.run(args, kwargs)
        records = caller.records
        records.lookups = record.tick = records.lookups + 1
        if not record.filed:
            caller.refile(record)
        if record.single:
            return arrays[0]
        return None if record.nothing else record.out.build(arrays[: record.n_out])


class AheadOfTime:
    """A call that was traced ahead of time, to be lowered, compiled and then run."""

    def __init__(self, caller: Caller, args: tuple, kwargs: dict):
        self._caller = caller
        self._key = caller.key(args, kwargs)
        self._entry, dynamic, states = caller.entry(args, kwargs)
        while True:
            with self._entry.about(states):
                compiled = self._entry.current or self._entry.prepare(dynamic, states)
                cells = _cells(compiled.targets, states)
                values = [_frame.read(cell) for cell in cells]
                if tuple(s for _, s in values) != compiled.structures:
                    self._entry.variant(states)
                    continue
                flats = [flat for flat, _ in values]
                try:
                    self.traced = compiled.jit.trace(
                        *compiled.arguments(dynamic, flats)
                    )
                except Restart:
                    self._entry.prepare(dynamic, states)
                    continue
            self._compiled = compiled
            return

    def run(self, executable: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        if local.frame is not None or not at_top_level():
            raise StateTraceError(
                lesson(
                    f"{self._caller.options.name}, compiled ahead of time, was called "
                    "inside a transform.",
                    "an executable can't be traced.",
                    "call the function that it was made of.",
                )
            )
        if self._caller.key(args, kwargs) != self._key:
            raise TypeError(
                f"{self._caller.options.name} was compiled ahead of time for arguments "
                "of another structure, or with other static values: lower and compile "
                "it for these."
            )
        _, dynamic, states = self._caller.entry(args, kwargs)
        return self._entry.run_at_top(
            dynamic, states, self._compiled.run_by(executable)
        )


class Entry:
    """All calls whose arguments have the same static part."""

    def __init__(
        self,
        caller: Caller,
        leaves: Sequence[Any],
        treedef: Any,
        keys: tuple,
        states: Sequence[State],
        stand_in: bool,
    ):
        self.caller = caller
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
        self._temporary: Record | None = None
        self._present = threading.local()
        self._dropped = 0
        options = caller.options
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

    def record(self, dynamic: Sequence[Any], known: dict[Cell, _frame.Value]) -> Record:
        """The program for these arguments and States: a cached one, or traced now."""
        with self.caller.tracing():
            record = self._find(dynamic, known)
            return record or self._trace(dynamic, known)

    def look_up(
        self, dynamic: Sequence[Any], states: Sequence[State], trace: bool
    ) -> Record | None:
        """As `record`, for States with their present values."""
        if self.dead:
            raise _Elsewhere
        # NumPy arrays as JAX takes them: 64 bits are 32 where x64 is off.
        dynamic = tuple(
            x
            if isinstance(x, jax.Array)
            else np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype))
            for x in dynamic
        )
        known = {c: _frame.current(states[i]._cell) for c, i in self.arg_cells.items()}
        with self.caller.tracing(), self.about(states):
            record = self._find(dynamic, known)
            if record is not None:
                record.tick = self.caller.records.lookups
            elif trace:
                record = self._trace(dynamic, known)
                self.learn(record)
            return record

    def _find(
        self, dynamic: Sequence[Any], known: dict[Cell, _frame.Value]
    ) -> Record | None:
        avals = tuple(jax.typeof(x) for x in dynamic)
        context = trace_context()
        temporary = [self._temporary] if self._temporary is not None else []
        for record in [*temporary, *reversed(self.records)]:
            program = record.program
            if (
                program.in_avals == avals
                and record.context is context
                and all(
                    _fits(known.get(cell) or _frame.current(cell), structure, avals)
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

    def _trace(self, dynamic: Sequence[Any], known: dict[Cell, _frame.Value]) -> Record:
        caller, options = self.caller, self.caller.options
        observer.tracing(self, dynamic, known)
        caller.records.misses += 1

        def run(*leaves: Any) -> Any:
            args, kwargs = self.signature.build(leaves)
            return caller.fun(*args, **kwargs)

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
        if program.closed_over_tracers:
            # Kept for the call at hand only: tracers must not outlive their trace.
            self._temporary = record
        else:
            self.file(record)
        observer.traced(self, record)
        return record

    def owns(self, record: Record) -> bool:
        return record.key == self.cache_key(record.program.in_avals)

    def file(self, record: Record) -> None:
        """Keeps a record: a new one, or one that was dropped but is still compiled."""
        if record is self._temporary or record.forgotten:
            return
        if record not in self.records:
            self.records.append(record)
        gone = self.caller.records.add(record)
        if gone:
            observer.forgetting(self.caller, gone, "full")
            self.caller.forget(gone)

    def _actual(self, cells: Sequence[Cell]) -> list[Cell]:
        """The States of the call that is under way, in place of the stand-ins."""
        present, index = self._present.states, self.arg_cells
        return [present[index[c]]._cell if c in index else c for c in cells]

    def done(self, record: Record) -> None:
        """A program that closed over tracers has been used."""
        if record is self._temporary:
            self._temporary = None
            record.forget_jaxpr()

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
        self.caller.fast.clear()
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
            cells = _cells(fixed.targets, states)
            present = [_frame.current(cell)[1] for cell in cells]
            misfits = zip(cells, present, fixed.structures, strict=True)
            raise StateValueError(
                lesson(
                    "a function compiled ahead of time was called with a State of "
                    "another structure: "
                    + ", ".join(c.describe() for c, s, t in misfits if s is not t),
                    "it was compiled for values of one structure.",
                    "lower and compile it again, or call the function itself.",
                )
            )
        if self.dead:
            raise _Elsewhere
        with self.caller.tracing():
            targets = self._targets(self.inputs)
            # Without waiting for a donating call to give a State back: that call may be
            # waiting to trace, and a State that is lent keeps its structure.
            structures = tuple(_frame.current(c)[1] for c in _cells(targets, states))
            compiled = self._variants.get(structures)
            if compiled is None:
                compiled = self._compile(targets, structures)
                self._variants[structures] = compiled
            self.current = compiled
            self.caller.fast.clear()
            return compiled

    def _targets(self, cells: Iterable[Cell]) -> tuple[Cell | int, ...]:
        """Positions among the arguments' States in place of the stand-ins."""
        return tuple(self.arg_cells.get(cell, cell) for cell in cells)

    def _compile(self, targets: tuple, structures: tuple) -> Compiled:
        options = self.caller.options
        # Where a run may fail the old values are needed afterwards, and a callback may
        # read them meanwhile: nothing is donated.
        donate_states = options.donate_states and not (
            self.may_fail or self.effects or options.checked
        )
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

    def _compile_in_trace(self, record: Record) -> Compiled:
        """For one program alone: the trace around it sees no other State read."""
        if record.compiled is not None:
            return record.compiled
        program = record.program
        consts = [c for c in program.consts if not isinstance(c, Tracer)]
        inputs = Inputs(
            cells=tuple(program.reads),
            targets=self._targets(program.reads),
            structures=tuple(program.reads.values()),
            consts=tuple({id(c): c for c in consts}.values()),
            shardings=None if self.in_shardings is None else tuple(self.in_shardings),
            # The outermost call looks after checks: here it is told of them.
            may_fail=record.may_fail,
        )
        compiled = Compiled(self, inputs, self.caller.options)
        if record is not self._temporary:
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
            raise _Elsewhere
        return self.variant(states)

    def aliases(self, states: Sequence[State]) -> bool:
        return any(state._cell in self._closure for state in states)

    def drop(self, records: Sequence[Record]) -> bool:
        """Forgets records; True if none is left."""
        kept = [r for r in self.records if r not in records]
        self._dropped += len(self.records) - len(kept)
        self.records = kept
        if self._dropped >= self.caller.records.maxsize:
            # JAX can only forget all versions of a function. The programs at hand are
            # kept, so those still in use are compiled again, but not traced.
            for compiled in self._variants.values():
                compiled.jit.clear_cache()  # type: ignore[attr-defined]
            self._dropped = 0
        return not kept

    # -- running --

    def run_at_top(
        self,
        dynamic: Sequence[Any],
        states: Sequence[State],
        fixed: Compiled | None = None,
    ) -> Any:
        """A call outside of any transform.

        With `fixed` it runs just that, and nothing is traced or compiled.
        """
        checked = self.caller.options.checked
        while True:
            compiled = fixed or self.current or self.prepare(dynamic, states)
            if compiled.donated:
                return self._run_donating(dynamic, states, fixed)
            cells = compiled.cells or _cells(compiled.targets, states)
            with lock:
                if shared.taken:
                    _frame.wait_for(cells)
                version = shared.version
                flats = [cell.flat for cell in cells]
                fits = compiled.epoch == shared.structures or (
                    not self.dead and compiled.accepts(cells)
                )
            if not fits:
                self.variant(states, fixed)
                continue
            try:
                out = compiled.call(dynamic, flats)
            except Restart:
                self.prepare(dynamic, states)
                continue
            token, arrays = out.popitem()
            record = token.record()
            self._used(record)
            leaves = arrays[: record.n_out]
            if checked:
                record.out.build(leaves, states)[0].throw()
            targets = record.cells or _cells(record.targets, states)
            with lock:
                if shared.taken:
                    _frame.wait_for(targets)
                if shared.version != version and _conflict(
                    record, cells, flats, targets
                ):
                    continue
                if targets:
                    _frame.assign(targets, arrays[record.n_out :], record.structures)
            if (
                compiled.simple
                and compiled.cells is not None
                and self.plain
                and fixed is None
            ):
                self.caller.fast[len(dynamic)] = compiled
            result = record.out.build(leaves, states)
            return result[1] if checked else result

    def _used(self, record: Record) -> None:
        record.tick = self.caller.records.lookups
        if not record.filed:
            self.file(record)

    def _run_donating(
        self, dynamic: Sequence[Any], states: Sequence[State], fixed: Compiled | None
    ) -> Any:
        """As `run_at_top`, but the buffers of updated States are given to XLA.

        While that goes on nobody may see these States: calls take turns.
        """
        while True:
            compiled = fixed or self.current or self.prepare(dynamic, states)
            if not compiled.donated:
                return self.run_at_top(dynamic, states, fixed)
            cells = _cells(compiled.targets, states)
            with _frame.turn([cells[i] for i in compiled.donated]):
                with lock:
                    _frame.wait_for(cells)
                    flats = [cell.flat for cell in cells]
                    fits = not self.dead and compiled.accepts(cells)
                if not fits:
                    self.variant(states, fixed)
                    continue
                try:
                    out = compiled.call(dynamic, flats)
                except Restart:
                    self.prepare(dynamic, states)
                    continue
                token, arrays = out.popitem()
                record = token.record()
                leaves, new = arrays[: record.n_out], arrays[record.n_out :]
                untouched = compiled.untouched(record)
                with lock:
                    _frame.assign(
                        _cells(record.targets, states) + [cells[i] for i in untouched],
                        new,
                        [
                            *record.structures,
                            *(compiled.structures[i] for i in untouched),
                        ],
                    )
            self._used(record)
            return record.out.build(leaves, states)

    def run_in_trace(self, dynamic: Sequence[Any], states: Sequence[State]) -> Any:
        """A call inside another transform, statefun's or not."""
        record = self.look_up(dynamic, states, trace=True)
        assert record is not None
        if states and self.aliases(states):
            raise _Elsewhere
        compiled = self._compile_in_trace(record)
        _frame.touch(_cells(self._targets(record.program.order), states))
        flats = [_frame.read(cell)[0] for cell in _cells(compiled.targets, states)]
        # Plain `jax.jit`: the outermost call looks after runtime checks.
        out = compiled.jit(*compiled.arguments(dynamic, flats))
        token, arrays = out.popitem()
        record = token.record()
        leaves, written = arrays[: record.n_out], arrays[record.n_out :]
        self._used(record)
        targets = _cells(record.targets, states)
        frame = local.frame
        if frame is not None:
            frame.checks |= record.may_fail
        elif targets:
            raise _frame.foreign_write(targets[0])
        values = zip(written, record.structures, strict=True)
        _frame.write(dict(zip(targets, values, strict=True)))
        out = record.out.build(leaves, states)
        if not self.caller.options.checked:
            return out
        error, out = out
        check_error(error)  # the transform around has to be checkified, too
        return out


def _gone() -> None:
    """Stands for a weak reference whose State is gone."""


def _cells(targets: Any, states: Sequence[State]) -> list[Cell]:
    return [t if type(t) is Cell else states[t]._cell for t in targets]


def _fits(value: _frame.Value, structure: Any, avals: tuple) -> bool:
    flat, present = value
    if present is not structure:
        return False
    return tuple(jax.typeof(x) for x in leaves_of(flat, structure)) == avals


def _conflict(record: Record, cells: Any, flats: Any, targets: Any) -> bool:
    """Whether somebody has written a State meanwhile that this call read and writes.

    A program with effects must not run twice: for it, the last writer wins.
    """
    if record.effects:
        return False
    seen = dict(zip(cells, flats, strict=True))
    return any(c.flat is not seen[c] for c in targets if c in seen)
