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

from collections.abc import Callable
from typing import Any

import jax

from .._compat import TOP_LEVEL, array_class, at_top_level, find_top_trace, jit_disabled
from .._errors import StateTraceError, message
from .._state import access
from .._state.access import local
from .._state.cell import commit, lock, shared
from .._state.state import State
from .._trace import frame as _frame, result
from . import args as _args
from .compiled import Eager, Options, Restart
from .entry import Elsewhere, Entry, Traces, cells_of
from .run import run_at_top, run_in_trace


class Caller(Traces):
    """Calls one function."""

    def __init__(self, fun: Callable, options: Options):
        super().__init__(fun, options)
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
            run = run_in_trace if inside else run_at_top
            try:
                with entry.about(states):
                    return run(entry, dynamic, states)
            except Elsewhere:
                continue
            except Eager:
                return self.eager(args, kwargs)

    def eager(self, args: tuple, kwargs: dict) -> Any:
        """Runs the function without tracing it, with the same effect on States."""

        _args.check_arguments(args, kwargs)

        def run() -> Any:
            out = self.fun(*args, **kwargs)
            result.refuse_bare_state(out, "returned")
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

    def ahead_of_time(self, args: tuple, kwargs: dict) -> AheadOfTime:
        return AheadOfTime(self, args, kwargs)


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
        if compiled is None or kwargs or find_top_trace(()) is not TOP_LEVEL:
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
            or shared.busy
            or compiled.epoch != shared.structures
            or shared.version != version
        ):
            return caller.run(args, kwargs)
        try:
            out = compiled.jit(*args, flats) if args else compiled.jit(flats)
        except (Restart, Eager):
            return caller.run(args, kwargs)
        record = compiled.records[len(out)]
        cells = record.cells
        if cells:
            lock.acquire()
            try:
                # Nobody has written or taken a State since its value was read.
                if shared.version == version and record.steady:
                    shared.version = version + 1
                    n = record.n_out
                    for cell, flat in zip(cells, out[n:] if n else out):  # noqa: B905
                        cell.flat = flat
                    shared.version = version + 2
                else:
                    new = out[record.n_out : record.n_out + len(cells)]
                    seen = (
                        {}
                        if record.effects
                        else dict(zip(compiled.own, flats, strict=True))
                    )
                    writes = dict(
                        zip(
                            cells,
                            zip(new, record.structures, strict=True),
                            strict=False,
                        )
                    )
                    if not commit(writes, seen):
                        record = None
            finally:
                lock.release()
            if record is None:
                return caller.run(args, kwargs)
        records = caller.records
        records.lookups = record.tick = records.lookups + 1
        if not record.filed:
            caller.refile(record)
        finish = record.finish
        if finish == 0:
            return None
        return out[0] if finish == 1 else record.out.build(out[: record.n_out])


class AheadOfTime:
    """A call that was traced ahead of time, to be lowered, compiled and then run."""

    def __init__(self, caller: Caller, args: tuple, kwargs: dict):
        self._caller = caller
        self._key = caller.key(args, kwargs)
        self._entry, dynamic, states = caller.entry(args, kwargs)
        while True:
            with self._entry.about(states):
                compiled = self._entry.current or self._entry.prepare(dynamic, states)
                cells = cells_of(compiled.targets, states)
                values = [access.read(cell) for cell in cells]
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
                message(
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
        return run_at_top(
            self._entry, dynamic, states, self._compiled.run_by(executable)
        )
