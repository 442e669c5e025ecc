"""Running what was compiled, and committing what it wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.experimental.checkify import check_error

from . import _frame
from ._cache import Record
from ._cell import Cell, assign, lock, shared, turn, wait_for
from ._compiled import Compiled, Restart
from ._entry import Elsewhere, Entry, cells_of
from ._frame import local
from ._lessons import foreign_write
from ._state import State


def run_at_top(
    entry: Entry,
    dynamic: Sequence[Any],
    states: Sequence[State],
    fixed: Compiled | None = None,
) -> Any:
    """A call outside of any transform.

    With `fixed` it runs just that, and nothing is traced or compiled.
    """
    checked = entry.traces.options.checked
    while True:
        compiled = fixed or entry.current or entry.prepare(dynamic, states)
        if compiled.donated:
            return _run_donating(entry, dynamic, states, fixed)
        cells = compiled.cells or cells_of(compiled.targets, states)
        with lock:
            if shared.taken:
                wait_for(cells)
            version = shared.version
            flats = [cell.flat for cell in cells]
            fits = compiled.epoch == shared.structures or (
                not entry.dead and compiled.accepts(cells)
            )
        if not fits:
            entry.variant(states, fixed)
            continue
        try:
            out = compiled.call(dynamic, flats)
        except Restart:
            entry.prepare(dynamic, states)
            continue
        record, leaves, written = compiled.taken_apart(out)
        entry.used(record)
        if checked:
            record.out.build(leaves, states)[0].throw()
        targets = record.cells or cells_of(record.targets, states)
        with lock:
            alone = shared.version == version  # nobody has written or taken anything
            if alone and targets:
                assign(targets, written, record.structures)
            elif not alone and not commit(record, cells, flats, targets, written):
                continue
        if (
            compiled.simple
            and compiled.cells is not None
            and entry.plain
            and fixed is None
        ):
            entry.traces.fast[len(dynamic)] = compiled
        result = record.out.build(leaves, states)
        return result[1] if checked else result


def _run_donating(
    entry: Entry,
    dynamic: Sequence[Any],
    states: Sequence[State],
    fixed: Compiled | None,
) -> Any:
    """As `run_at_top`, but the buffers of updated States are given to XLA.

    While that goes on nobody may see these States: calls take turns.
    """
    while True:
        compiled = fixed or entry.current or entry.prepare(dynamic, states)
        if not compiled.donated:
            return run_at_top(entry, dynamic, states, fixed)
        cells = cells_of(compiled.targets, states)
        with turn([cells[i] for i in compiled.donated]):
            with lock:
                wait_for(cells)
                flats = [cell.flat for cell in cells]
                fits = not entry.dead and compiled.accepts(cells)
            if not fits:
                entry.variant(states, fixed)
                continue
            try:
                out = compiled.call(dynamic, flats)
            except Restart:
                entry.prepare(dynamic, states)
                continue
            record, leaves, new = compiled.taken_apart(out)
            untouched = compiled.untouched(record)
            with lock:
                assign(
                    cells_of(record.targets, states) + [cells[i] for i in untouched],
                    new,
                    [
                        *record.structures,
                        *(compiled.structures[i] for i in untouched),
                    ],
                )
        entry.used(record)
        return record.out.build(leaves, states)


def run_in_trace(entry: Entry, dynamic: Sequence[Any], states: Sequence[State]) -> Any:
    """A call inside another transform, statefun's or not."""
    record = entry.look_up(dynamic, states, trace=True)
    assert record is not None
    if states and entry.aliases(states):
        raise Elsewhere
    compiled = entry.compile_in_trace(record)
    _frame.touch(cells_of(entry.targets(record.program.order), states))
    flats = [_frame.read(cell)[0] for cell in cells_of(compiled.targets, states)]
    # Plain `jax.jit`: the outermost call looks after runtime checks.
    out = compiled.jit(*compiled.arguments(dynamic, flats))
    record, leaves, written = compiled.taken_apart(out)
    entry.used(record)
    targets = cells_of(record.targets, states)
    frame = local.frame
    if frame is not None:
        frame.checks |= record.may_fail
    elif targets:
        raise foreign_write(targets[0])
    values = zip(written, record.structures, strict=True)
    _frame.write(dict(zip(targets, values, strict=True)))
    out = record.out.build(leaves, states)
    if not entry.traces.options.checked:
        return out
    error, out = out
    check_error(error)  # the transform around has to be checkified, too
    return out


def commit(
    record: Record,
    cells: Sequence[Cell],
    flats: Sequence[Any],
    targets: Sequence[Cell],
    written: Sequence[Any],
) -> bool:
    """Writes what a call has written; to be called with the lock held.

    Does nothing and says False if somebody has meanwhile written a State that the call
    both reads and writes. A program with effects must not run twice: for it, the last
    writer wins.

    **Arguments:**

    - `cells`, `flats`: what the call has read.
    - `targets`, `written`: what it has written.
    """
    if shared.taken:  # a donating call has the States: after it
        wait_for(targets)
    if not record.effects:
        seen = dict(zip(cells, flats, strict=True))
        if any(c.flat is not seen[c] for c in targets if c in seen):
            return False
    assign(targets, written, record.structures)
    return True
