"""What a State does with its cell: in the frame of the trace under way, if there is one.

`local.frame` is the innermost frame of this thread (see `_trace.frame`). With no frame a
State reads and writes its committed value.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .. import _compat
from .._compat import Tracer
from .._errors import foreign_creation, foreign_read, foreign_write
from .cell import (
    UNSET,
    Cell,
    Value,
    commit,
    committed,
    exclusive,
    hand_out,
    keep_handing_out,
    settle,
    shared,
)
from .handed import Handed
from .numbers import normalise_in_place
from .structure import LEAF, Structure, leaves_of

if TYPE_CHECKING:
    from .._trace.frame import Frame


class _Local(threading.local):
    frame: Frame | None = None


local = _Local()


def value_of(cell: Cell) -> Any:
    """A value that nobody else has, outside of frames."""
    if local.frame is not None:
        return local.frame.value(cell)
    flat, structure = read(cell)
    return structure.unflatten(flat)


def given_out(cell: Cell) -> Any:
    """The value for a user, who may change it in place."""
    if local.frame is not None:
        return local.frame.value(cell)
    version, flat = shared.version, cell.flat
    if (  # an array that is there for the taking, as `committed` would find
        cell.structure is LEAF
        and _compat.at_top_level()
        and version == shared.version
        and not (version & 1 or shared.taken)
    ):
        return flat
    flat, structure = read(cell)
    if structure.mutable_nodes is not None:
        return hand_out(cell, flat, structure)
    return structure.unflatten(flat)


class StandIns:
    """States that a traced function sees others in the place of.

    The States of a call's arguments are stand-ins inside: a program speaks of the first,
    second, … State of the arguments. A function that reaches one of them in another way
    as well (by a global, its closure, another State's value) still means that State;
    `reached` says which, for the program is about these very States then.
    """

    __slots__ = ("_cells", "_outer", "reached")

    def __init__(self, cells: Mapping[Cell, Cell]):
        self._cells = cells
        self._outer = None if local.frame is None else local.frame.stand_ins
        self.reached: dict[Cell, None] = {}

    def __call__(self, cell: Cell) -> Cell:
        if self._outer is not None:
            cell = self._outer(cell)
        stand_in = self._cells.get(cell)
        if stand_in is None:
            return cell
        self.reached[cell] = None
        return stand_in


def resolve(cell: Cell) -> Cell:
    """The cell, or the stand-in that the frame there is has for it."""
    frame = local.frame
    if frame is None or frame.stand_ins is None:
        return cell
    return frame.stand_ins(cell)


_INNERMOST: Any = object()


def current(cell: Cell, frame: Frame | None = _INNERMOST) -> Value:
    """The value as it stands in a frame.

    It doesn't count as a read, except in a frame that shows its States in another form
    than they have outside: there the form is found out by reading.
    """
    if frame is _INNERMOST:
        frame = local.frame
    while frame is not None:
        found = frame.present(cell)
        if found is not None:
            return found
        frame = frame.parent
    if cell.handed is not None:
        settle((cell,))
    # Without waiting for a donating call: a State that it has keeps its structure.
    version, flat, structure = shared.version, cell.flat, cell.structure
    if version == shared.version and not version & 1:
        return flat, structure
    return exclusive(lambda: (cell.flat, cell.structure))  # of one commit


def structure_of(cell: Cell) -> Structure | None:
    """How its value is put together there; None as long as it has none."""
    return cell.structure if local.frame is None else current(cell)[1]


def has_value(cell: Cell) -> bool:
    """False for a State that was created inside a trace and has outlived it."""
    return current(cell)[0] is not UNSET


def touch(cells: Iterable[Cell]) -> None:
    """Notes the order in which a call is going to access States."""
    if local.frame is not None:
        for cell in cells:
            local.frame.order.setdefault(cell)


def check_write(cell: Cell) -> None:
    """Raises if a write would have to."""
    frame = local.frame
    if not (_compat.at_top_level() if frame is None else frame.is_current()):
        raise foreign_write(cell)


def read(cell: Cell) -> Value:
    """The value as the current frame sees it; counts as a read."""
    if local.frame is not None:
        return local.frame.read(cell)
    return (
        committed(cell) if _compat.at_top_level() else read_inside_raw_transform(cell)
    )


def read_inside_raw_transform(cell: Cell) -> Value:
    """The value inside raw transforms, with no frame around them."""
    if _compat.makes_jaxpr():
        raise foreign_read(cell)
    return committed(cell)


def write(writes: Mapping[Cell, Value]) -> None:
    """Writes to the current frame, or commits where there is none."""
    frame = local.frame
    if frame is not None:
        for cell, (flat, structure) in writes.items():
            frame.write(cell, flat, structure)
        return
    if writes and not _compat.at_top_level():
        raise foreign_write(next(iter(writes)))
    commit(writes, {})


def handed(cell: Cell) -> Handed | None:
    """What was given out here as the State's value."""
    return cell.handed if local.frame is None else local.frame.handed.get(cell)


def write_back(cell: Cell, given: Handed, normal: Any, new: Value) -> None:
    """Writes what was given out, which goes on being the State's value."""
    normalise_in_place(given.value, normal)
    if local.frame is None:
        keep_handing_out(cell, given, new, lambda: write({cell: new}))
        return
    write({cell: new})
    given.renew(*new)
    local.frame.handed[cell] = given


def create(cell: Cell, flat: Any, structure: Structure) -> None:
    """Gives a new State its first value: in the current frame, or for good."""
    if local.frame is not None:
        local.frame.create(cell, flat, structure)
        return
    if any(isinstance(x, Tracer) for x in leaves_of(flat, structure)):
        raise foreign_creation(cell)
    cell.flat, cell.structure = flat, structure
