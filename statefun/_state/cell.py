"""Cells: what States hold, and how several of them change in one step.

A `Cell` is the storage of a State: its committed value, flat. Values are read as one
snapshot and committed as one step, under a lock that is never held while JAX runs.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

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
    """What a call looks at to see that nothing else has happened.

    Only this module and the hot path in `_call.fast` assign these, and only while they
    hold `lock`.
    """

    __slots__ = ("generation", "structures", "taken", "version")

    def __init__(self) -> None:
        self.taken: dict[Cell, int] = {}  # States that a donating call has: by thread
        # Grows by two with every commit, and is odd while one is being made: values that
        # were read between two looks at the same even number are of one moment.
        self.version = 0
        self.structures = 0  # grows when a State changes structure
        self.generation = 1  # see `_trace.stale`; code outside of frames is at 0


shared = _Shared()
lock = threading.RLock()
"""Held for the moment of a commit, never while JAX runs. Re-entrant, because a finalizer
that touches a State may run at any moment."""
_returned = threading.Condition(lock)


def snapshot(cells: Sequence[Cell]) -> tuple[int, list[Value]]:
    """The values of States as they were at one moment, and the version of that moment.

    Waits for a donating call that has one of them.
    """
    version = shared.version
    values = [(cell.flat, cell.structure) for cell in cells]
    if version == shared.version and not (version & 1 or shared.taken):
        return version, values

    def read() -> tuple[int, list[Value]]:
        wait_for(cells)
        return shared.version, [(cell.flat, cell.structure) for cell in cells]

    return exclusive(read)


def committed(cell: Cell) -> Value:
    _, (value,) = snapshot((cell,))
    if value[0] is UNSET:
        raise StateTraceError(
            message(
                f"{cell.describe()} has no value.",
                "it was created inside a traced function and was not returned by it, so "
                "its value ended with the trace.",
                "return the module that holds the State from the function, or create the "
                "State outside.",
            )
        )
    return value


def commit(writes: Mapping[Cell, Value], seen: Mapping[Cell, Any]) -> bool:
    """Writes all the values in one step, unless one has changed since it was seen.

    An exception that arrives in the middle (a `KeyboardInterrupt` may come between any
    two instructions) leaves either none of the values written or all of them.
    """
    before = None
    try:
        lock.acquire()
        if shared.taken:
            wait_for(writes)
        for cell in writes:
            if cell in seen and cell.flat is not seen[cell]:
                lock.release()
                return False
        old = [cell.flat for cell in writes]  # no finalizer runs before all is written
        before = shared.version
        _assign(writes, before)
        lock.release()
        del old
    except BaseException:
        recover(writes, before)
        raise
    return True


def _assign(writes: Mapping[Cell, Value], before: int) -> None:
    shared.version = before | 1  # as it is where a finalizer commits within a commit
    for cell, (flat, structure) in writes.items():
        cell.flat = flat
        if cell.structure is not structure:
            cell.structure = structure
            shared.structures += 1
    if not before & 1:
        shared.version = before + 2


def recover(writes: Mapping[Cell, Value], before: int | None) -> None:
    """After an exception in a commit: completes it, if it had begun, and lets go.

    Whether this thread holds the lock is not known: the exception may have come just
    before or just after it was taken or given back.
    """
    if not lock.acquire(blocking=False):
        return  # another thread has it, so this one does not
    if before is not None and shared.version == before | 1:
        _assign(writes, before)
    lock.release()
    with contextlib.suppress(RuntimeError):  # not held a second time
        lock.release()


T = TypeVar("T")


def exclusive(act: Callable[[], T]) -> T:
    """Runs `act` with the lock held, and gives it back whatever happens.

    A `with` does that for exceptions of its body. One that arrives from outside (a
    `KeyboardInterrupt`) may come between the body and the release.
    """
    try:
        lock.acquire()
        result = act()
        lock.release()
    except BaseException:
        recover({}, None)
        raise
    return result


def wait_for(cells: Iterable[Cell]) -> None:
    """Waits until no other thread has the States; to be called with the lock held."""
    cells, me = list(cells), threading.get_ident()
    while any(shared.taken.get(cell, me) != me for cell in cells):
        _returned.wait()


@contextlib.contextmanager
def turn(cells: Sequence[Cell]) -> Iterator[None]:
    """Keeps the States from all other threads, which wait."""
    if not cells:
        yield
        return
    mine: list[Cell] = []

    def take() -> None:
        wait_for(cells)
        mine.extend(cell for cell in cells if cell not in shared.taken)
        shared.taken.update(dict.fromkeys(mine, threading.get_ident()))
        shared.version += 2  # a call that has read their values must look again

    def give_back() -> None:
        while mine:  # once: another thread may have taken them since
            shared.taken.pop(mine[-1], None)
            mine.pop()
        _returned.notify_all()

    try:
        try:
            exclusive(take)
            yield
        finally:
            exclusive(give_back)
    finally:  # again: an interrupt may have come right before
        exclusive(give_back)
