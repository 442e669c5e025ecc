"""Running what was compiled, and committing what it wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._errors import foreign_write
from .._state import access
from .._state.access import local
from .._state.cell import Cell, commit, lock, shared, turn, wait_for
from .._state.state import State
from .cache import Record
from .compiled import Compiled, Restart
from .entry import Elsewhere, Entry, cells_of


def run_at_top(
    entry: Entry,
    dynamic: Sequence[Any],
    states: Sequence[State],
    fixed: Compiled | None = None,
) -> Any:
    """A call outside of any transform.

    With `fixed` it runs just that, and nothing is traced or compiled. States whose
    buffers are given to XLA are taken meanwhile: nobody else may see them.
    """
    while True:
        compiled = fixed or entry.current or entry.prepare(dynamic, states)
        cells = compiled.cells or cells_of(compiled.targets, states)
        with turn([cells[i] for i in compiled.donated]):
            with lock:
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
            untouched = compiled.untouched(record)
            targets = record.cells or cells_of(record.targets, states)
            targets = [*targets, *(cells[i] for i in untouched)]
            structures = [
                *record.structures,
                *(compiled.structures[i] for i in untouched),
            ]
            with lock:
                # If nobody has written or taken anything since, there is nothing to see to.
                seen = (
                    {}
                    if shared.version == version
                    else dict(zip(cells, flats, strict=True))
                )
                if targets and not commit(
                    dict(
                        zip(
                            targets, zip(written, structures, strict=True), strict=False
                        )
                    ),
                    {} if record.effects or compiled.donated else seen,
                ):
                    continue
        if (
            compiled.simple
            and compiled.cells is not None
            and entry.plain
            and fixed is None
        ):
            entry.traces.fast[len(dynamic)] = compiled
        return record.out.build(leaves, states)


def run_in_trace(entry: Entry, dynamic: Sequence[Any], states: Sequence[State]) -> Any:
    """A call inside another transform, statefun's or not."""
    record = entry.look_up(dynamic, states, trace=True)
    assert record is not None
    if states and entry.aliases(states):
        raise Elsewhere
    program = record.program
    access.touch(cells_of(entry.targets(program.order), states))
    if program.closed_over_tracers:  # it belongs to the trace around, and goes with it
        cells = cells_of(entry.targets(program.reads), states)
        values = dict(zip(program.reads, map(access.read, cells), strict=True))
        leaves, new = program(dynamic, values)
        _write(record, cells_of(record.targets, states), [v for v, _ in new.values()])
        return record.out.build(leaves, states)
    compiled = entry.compile_in_trace(record)
    flats = [access.read(cell)[0] for cell in cells_of(compiled.targets, states)]
    # Plain `jax.jit`: the outermost call looks after runtime checks.
    out = compiled.jit(*compiled.arguments(dynamic, flats))
    record, leaves, written = compiled.taken_apart(out)
    entry.used(record)
    _write(record, cells_of(record.targets, states), written)
    return record.out.build(leaves, states)


def _write(record: Record, targets: Sequence[Cell], written: Sequence[Any]) -> None:
    frame = local.frame
    if frame is not None:
        frame.checks |= record.may_fail
    elif targets:
        raise foreign_write(targets[0])
    values = zip(written, record.structures, strict=True)
    access.write(dict(zip(targets, values, strict=True)))
