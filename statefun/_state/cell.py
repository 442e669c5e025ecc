"""Cells: what States hold, and how several of them change in one step.

A `Cell` is the storage of a State: its committed value, flat. Values are read as one
snapshot and committed as one step, under a lock that is never held while JAX runs.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.tree_util as jtu

from .._errors import StateTraceError, message
from .structure import Structure

UNSET: Any = type("Unset", (), {"__repr__": lambda self: "<no value>"})()
"""The committed value of a State that was created inside a trace, until that ends."""


class Cell:
    """The storage of one State, and what errors say about it."""

    __slots__ = (
        "__weakref__",
        "flat",
        "handle",
        "kind",
        "name",
        "path",
        "structure",
        "where",
    )

    def __init__(self, kind: type, name: str | None, where: str):
        self.flat: Any = UNSET
        self.structure: Structure = None  # type: ignore[assignment]
        self.kind = kind
        self.name = name
        self.where = where
        self.path: str | None = None
        self.handle: weakref.ref | None = None

    def describe(self) -> str:
        name = f" {self.name!r}" if self.name is not None else ""
        path = f" at `{self.path}`" if self.path else ""
        return f"{self.kind.__name__}{name}{path} (created at {self.where})"

    __repr__ = describe


Value = tuple[Any, Structure]  # flat, and how it is put together


class Values(dict[Cell, Value]):
    """What some States hold: a pytree, whose leaves are the arrays."""


jtu.register_pytree_node(
    Values,
    lambda values: (
        [flat for flat, _ in values.values()],
        (tuple(values), tuple(s for _, s in values.values())),
    ),
    lambda aux, flats: Values(
        zip(aux[0], zip(flats, aux[1], strict=True), strict=False)
    ),
)


class _Shared:
    """Counters that let a call see at a glance that nothing else happened."""

    __slots__ = ("busy", "generation", "structures", "taken", "version")

    def __init__(self) -> None:
        self.taken: dict[Cell, int] = {}  # States lent to a donating call: by thread
        # Frames under way and States taken, in any thread: while there are none, a call
        # needs to look for neither.
        self.busy = 0
        # Grows by two with every commit, and is odd while one is being made: values that
        # were read between two looks at the same even number are of one moment.
        self.version = 0
        self.structures = 0  # grows when a State changes structure
        self.generation = 0  # see `forget_inner_traces`


shared = _Shared()
lock = threading.RLock()
"""Held for the moment of a snapshot or a commit, never while JAX runs. Re-entrant,
because a finalizer that touches a State may run at any moment."""
_given_back = threading.Condition(lock)


def committed(cell: Cell) -> Value:
    with lock:
        if shared.taken:
            wait_for([cell])
        flat, structure = cell.flat, cell.structure
    if flat is UNSET:
        raise StateTraceError(
            message(
                f"{cell.describe()} has no value.",
                "it was created inside a traced function and was not returned by it, so "
                "its value ended with the trace.",
                "return the module that holds the State from the function, or create the "
                "State outside.",
            )
        )
    return flat, structure


def commit(writes: Mapping[Cell, Value], seen: Mapping[Cell, Any]) -> bool:
    """Writes all the values in one step, unless one has changed since it was seen."""
    with lock:
        if shared.taken:
            wait_for(writes)
        if any(c.flat is not seen[c] for c in writes if c in seen):
            return False
        assign(
            writes,
            [flat for flat, _ in writes.values()],
            [structure for _, structure in writes.values()],
        )
    return True


def assign(
    cells: Iterable[Cell], flats: Iterable[Any], structures: Iterable[Structure]
) -> None:
    """Sets values; to be called with the lock held."""
    shared.version += 1
    for cell, flat, structure in zip(cells, flats, structures, strict=True):
        cell.flat = flat
        if cell.structure is not structure:
            cell.structure = structure
            shared.structures += 1
    shared.version += 1


def wait_for(cells: Iterable[Cell]) -> None:
    """To be called with the lock held: waits until no other thread has the States."""
    cells, me = list(cells), threading.get_ident()
    while any(shared.taken.get(cell, me) != me for cell in cells):
        _given_back.wait()


@contextlib.contextmanager
def turn(cells: Sequence[Cell]) -> Iterator[None]:
    """Keeps the States from all other threads, which wait."""
    if not cells:
        yield
        return
    with lock:
        wait_for(cells)
        mine = [cell for cell in cells if cell not in shared.taken]
        shared.taken.update(dict.fromkeys(mine, threading.get_ident()))
        shared.busy += 1
        shared.version += 2  # a call that has read their values must look again
    try:
        yield
    finally:
        with lock:
            shared.busy -= 1
            for cell in mine:
                del shared.taken[cell]
            _given_back.notify_all()
