"""The hot path: what a call costs that has been made before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .. import _compat
from .._compat import TOP_LEVEL, array_class, find_top_trace
from .._errors import StateTraceError, StateValueError, message
from .._state.access import local
from .._state.cell import Cell, Value, commit, lock, recover, settle, shared
from .args import recall
from .calls import Calls
from .compiled import Restart, Trace


class Fast:
    """A callable whose calls with arrays and modules that it knows are cheap.

    Everything that can go wrong is looked at, and if anything is unusual (a transform
    under way, another thread that writes, a State of another structure, a function that
    was not called in this way before) the call is left to `Calls.run`. It is written
    out here because at 5 µs for a whole `jax.jit` call each further Python frame, lock
    or look at a thread-local shows: see the benchmark.
    """

    _calls: Calls
    _bound: tuple = ()  # arguments that come first, see `Options`

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        calls = self._calls
        if find_top_trace(()) is not TOP_LEVEL or local.frame is not None:
            return calls.run(args, kwargs)
        version = shared.version
        key: Any = None if kwargs else len(args)
        if args:
            concrete = array_class()
            for arg in args:
                if type(arg) is not concrete:
                    key = None
                    break
        held: Any = None  # the States of the arguments
        dynamic: Any = args
        if key is None:
            known = recall(args, kwargs) if calls.recalls else None
            if known is None:
                return calls.run(args, kwargs)
            key, dynamic, refs = known
            if refs:
                held = [ref() for ref in refs]
        plan = calls.plans.get(key)
        if plan is None:
            return calls.run(args, kwargs)
        cells = plan.cells
        if held:
            # One that the function reaches otherwise, too, makes another program.
            if plan.closure and not plan.closure.keys().isdisjoint(held):
                return calls.run(args, kwargs)
            held += cells
            places = plan.places
            cells = held if places is None else [held[i] for i in places]
        flats = [cell.flat for cell in cells]
        if version & 1 or shared.taken or shared.version != version:
            return calls.run(args, kwargs)
        if plan.epoch != shared.structures and plan.cells:
            epoch = shared.structures
            for cell, structure in zip(plan.cells, plan.structures, strict=True):
                if cell.structure is not structure:
                    return calls.run(args, kwargs)
                if cell.handed is not None:
                    epoch = -1  # somebody may change it in place, at any time
            if epoch < 0:
                settle(plan.cells)
                if shared.version != version:
                    return calls.run(args, kwargs)
            plan.epoch = epoch
        compiled = plan.compiled
        try:
            out = compiled.jit(*dynamic, flats) if dynamic else compiled.jit(flats)
        except Restart:
            return calls.run(args, kwargs)
        trace = compiled.traces[len(out)]
        written = trace.written
        if written:
            if held:
                written = plan.written(trace, held)
            before = None
            try:
                lock.acquire()
                # Nobody has written or taken a State since its value was read.
                if shared.version == version and trace.keeps_structures:
                    before = version
                    n = trace.n_out
                    shared.version = version + 1
                    for cell, flat in zip(written, out[n:] if n else out):  # noqa: B905
                        cell.flat = flat
                    shared.version = version + 2
                lock.release()
            except BaseException:
                recover(_writes(written, trace, out), before)
                raise
            if before is None:
                seen = {} if trace.effects else dict(zip(cells, flats, strict=True))
                if not commit(_writes(written, trace, out), seen):
                    return calls.run(args, kwargs)
        calls.lookups = trace.tick = calls.lookups + 1
        if not trace.filed:
            calls.refile(trace)
        result = trace.result
        if result == 0:
            return None
        if result == 1:
            return out[0]
        states = [cell.handle() for cell in held[: plan.n]] if held else ()
        return trace.build(out[: trace.n_out], states)


class Bound(Fast):
    """A callable some of whose arguments are known: a module that is called."""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*self._bound, *args, **kwargs)


def _writes(
    written: Sequence[Cell], trace: Trace, out: Sequence[Any]
) -> dict[Cell, Value]:
    flats = out[trace.n_out : trace.n_out + len(written)]
    return dict(zip(written, zip(flats, trace.structures, strict=True), strict=True))


class AheadOfTime:
    """A call that was traced ahead of time, to be lowered, compiled and then run."""

    def __init__(self, calls: Calls, args: tuple, kwargs: dict, bound: tuple = ()):
        self._calls, self._bound = calls, bound
        ahead = calls.trace_ahead(bound + args, kwargs)
        self._site, self._compiled, self.traced = ahead
        self._key = self._site.base.key

    def run(self, executable: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        args = self._bound + args
        name = self._calls.options.name
        if local.frame is not None or not _compat.at_top_level():
            raise StateTraceError(
                message(
                    f"{name}, compiled ahead of time, was called inside a transform.",
                    "an executable can't be traced.",
                    "call the function that it was made of.",
                )
            )
        if self._calls.key(args, kwargs) != self._key:
            raise TypeError(
                f"{name} was compiled ahead of time for arguments of another structure, "
                "or with other static values: lower and compile it for these."
            )
        gone = self._site.gone()
        if gone:
            raise StateValueError(
                message(
                    f"{name}, compiled ahead of time, uses {gone[0].describe()}, which is "
                    "gone.",
                    "nothing refers to that State any more: the name by which the "
                    "function reached it may mean another one now.",
                    "lower and compile it again, or keep the State.",
                )
            )
        fixed = self._compiled.run_by(executable)
        return self._calls.run_ahead(self._site, fixed, args, kwargs)
