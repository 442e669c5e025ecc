"""Running a function in a frame: all that it writes stands, or nothing does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from .. import _compat
from .._errors import foreign_write
from .._state.access import local
from .._state.cell import Cell, Value, commit
from . import stale
from .frame import Frame, Overlay

R = TypeVar("R")


def back_outside(frame: Frame | None, trace: Any) -> None:
    """After an exception: frame, JAX's trace and its context are those around again.

    The exception may be an interrupt that arrived where a `with` was about to leave: then
    it did not. Whatever is left on the stack would make later calls believe that they are
    inside of a transform.
    """
    local.frame = frame
    _compat.return_to(trace)
    if frame is None:
        stale.leave_trace_context()


def transaction(run: Callable[[], R]) -> R:
    """Runs a transform inside the frame there is, or in one of its own.

    In the second case the States are written when it has succeeded: all of them, in one
    step. If another thread has meanwhile written a State that the transform both reads
    and writes, it runs again on the new values.
    """
    outer = local.frame
    if outer is not None:
        pending = outer.pending
        try:
            return run() if outer.is_current() else _inside_a_raw_transform(outer, run)
        finally:
            outer.pending = pending
    trace = _compat.current_trace()
    try:
        return _at_top(run)
    except BaseException:
        back_outside(None, trace)
        raise


def _at_top(run: Callable[[], R]) -> R:
    while True:
        with Overlay(keeps=True) as frame:
            stale.begin(frame)
            out = run()
            writes, reads = frame.writes, frame.reads
        # Outside of the frame: a finalizer of what is replaced may write States, too.
        if _settle(frame, writes, reads):
            return out


class _Noting(Overlay):
    """An overlay inside a raw transform, in a frame that belongs to the trace around."""

    def _first_read(self, cell: Cell) -> Value:
        assert self.parent is not None, "see `_inside_a_raw_transform`"
        with _compat.in_trace(self._trace):
            self.parent._check_foreign_read(cell)
        value = super()._first_read(cell)
        with _compat.in_trace(self._trace):
            self.parent._note_kept(cell, value)
        return value


def _inside_a_raw_transform(outer: Frame, run: Callable[[], R]) -> R:
    """The frame around belongs to another trace: its reads have to be noted as foreign,
    lest JAX use them again where they are stale, and its writes are refused."""

    return _run_in(_Noting(), outer, run)


def _settle(
    frame: Frame, writes: Mapping[Cell, Value], reads: Mapping[Cell, Value]
) -> bool:
    if not writes:
        return True
    if not frame.is_top:
        raise foreign_write(next(iter(writes)))
    if frame.checks:
        jax.block_until_ready([flat for flat, _ in writes.values()])
    return commit(writes, {c: flat for c, (flat, _) in reads.items()})


def nested(run: Callable[[], R]) -> R:
    """Runs a function so that what it has written is dropped if it raises."""
    outer = local.frame
    assert outer is not None, "a transform runs in a transaction"
    return _run_in(Overlay(), outer, run)


def _run_in(frame: Frame, outer: Frame, run: Callable[[], R]) -> R:
    """Runs a function in a frame, and hands what it has written to the one around."""
    with frame:
        out = run()
        writes, created, checks = frame.writes, frame.created, frame.checks
    outer.checks |= checks
    for cell, value in writes.items():
        (outer.create if cell in created else outer.write)(cell, *value)
    return out
