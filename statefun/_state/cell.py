"""Cells: what States hold, and how several of them change in one step.

A `Cell` is the storage of a State: its committed value, flat. Values are read as one
snapshot and committed as one step, under a lock that is never held while JAX runs.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax.tree_util as jtu

from .._compat import Tracer, eval_context
from .._errors import StateTraceError, message, mutated, wrong_type
from .handed import Handed
from .numbers import normalise, normalise_in_place
from .structure import Structure, flatten

UNSET: Any = type("Unset", (), {"__repr__": lambda self: "<no value>"})()
"""The committed value of a State that was created inside a trace, until that ends."""


class Cell:
    """The storage of one State, and what errors say about it."""

    __slots__ = (
        "__weakref__",
        "flat",
        "handed",
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
        # The value that `.value` gave out, while it can be changed in place.
        self.handed: Handed | None = None

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


def _before_fork() -> None:
    lock.acquire()
    wait_for(list(shared.taken))


# In the process that a fork makes there is no other thread: one that had the lock or some
# States would keep them for ever. (Windows has no forks.)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=lock.release, after_in_child=lock.release
    )


def snapshot(cells: Sequence[Cell]) -> tuple[int, list[Value]]:
    """The values of States as they were at one moment, and the version of that moment.

    Waits for a donating call that has one of them.
    """
    if _given_out:
        settle(cells)
    version = shared.version
    values = [(cell.flat, cell.structure) for cell in cells]
    if version == shared.version and not (version & 1 or shared.taken):
        return version, values

    def read() -> tuple[int, list[Value]]:
        wait_for(cells)
        return shared.version, [(cell.flat, cell.structure) for cell in cells]

    return exclusive(read)


# All of `Cell.handed`, so that a call sees at once that there are none.
_given_out: dict[weakref.ref[Handed], None] = {}


def hand_out(cell: Cell, flat: Any, structure: Structure) -> Any:
    """The committed value, as one object until the State is written.

    A change in place of that object is a change of the State: `settle` takes it up.
    """
    new = Handed(flat, structure, structure.unflatten(flat))
    _given_out[weakref.ref(new, _given_out.pop)] = None

    def hold() -> Handed:
        known = cell.handed
        if known is not None and known.is_of(flat):
            return known
        if cell.flat is flat:  # else it has been written meanwhile
            cell.handed = new
            shared.structures += 1  # hot calls look again, and find it
        return new

    known = cell.handed
    return (exclusive(hold) if known is None or not known.is_of(flat) else known).value


def settle(cells: Iterable[Cell]) -> None:
    """Takes up what was changed in place in values that were given out.

    Whoever is about to take what States hold calls this first.

    **Raises:** `StateTraceError` or `StateTypeError` for a State into which something
    was put that it can't hold: it keeps the value that it had.
    """
    for cell in cells:
        handed = cell.handed
        if handed is None:
            continue
        if not handed.is_of(cell.flat):
            forget(cell, handed)
        else:
            _take_up(cell, handed)


def forget(cell: Cell, handed: Handed) -> None:
    """What was given out is from now on an old value."""

    def let_go() -> None:
        if cell.handed is handed:
            cell.handed = None

    exclusive(let_go)


def _take_up(cell: Cell, handed: Handed) -> None:
    flat, structure = cell.flat, handed.structure
    try:
        if not handed.changed():
            return
        if any(isinstance(x, Tracer) for x in jtu.tree_leaves(handed.value)):
            raise mutated(cell)
        with eval_context():
            try:
                present = structure.unflatten(flat)
                normal = normalise(handed.value, lambda: present)
            except TypeError as error:
                raise wrong_type(cell, error) from error
            normalise_in_place(handed.value, normal)
            value = flatten(normal)
    except Exception:
        forget(cell, handed)
        raise
    keep_handing_out(cell, handed, value, lambda: commit({cell: value}, {cell: flat}))


def keep_handing_out(
    cell: Cell, handed: Handed, value: Value, write: Callable[[], Any]
) -> None:
    """Writes what was given out, and is given out again."""
    handed.next = value[0]
    write()

    def hold() -> None:
        if cell.flat is value[0]:
            handed.renew(*value)
            cell.handed = handed
            shared.structures += 1

    exclusive(hold)


def committed(cell: Cell) -> Value:
    """The committed value; raises if there is none, as after a trace that has ended."""
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
    began: list[Any] = []
    try:
        # Nothing but calls: Python takes some jumps for being outside of the `try`.
        lock.acquire()
        done = _write(writes, seen, began)
        lock.release()
    except BaseException:
        recover(writes, began[0] if began else None)
        raise
    return done


def _write(
    writes: Mapping[Cell, Value], seen: Mapping[Cell, Any], began: list[Any]
) -> bool:
    if shared.taken:
        wait_for(writes)
    for cell in writes:
        if cell in seen and cell.flat is not seen[cell]:
            return False
    old = [(cell.flat, cell.structure, cell.handed) for cell in writes]
    # Kept until the lock is given back: no finalizer runs before all is written.
    began += shared.version, old
    _assign(writes, began[0])
    return True


def _assign(writes: Mapping[Cell, Value], before: int) -> None:
    shared.version = before | 1  # as it is where a finalizer commits within a commit
    for cell, (flat, structure) in writes.items():
        cell.flat = flat
        if cell.structure is not structure:
            cell.structure = structure
            shared.structures += 1
        if cell.handed is not None and not cell.handed.is_of(flat):
            cell.handed = None
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


def in_turn(cells: Sequence[Cell], act: Callable[[], T]) -> T:
    """Runs `act` while the States are kept from all other threads, which wait."""
    settle(cells)
    mine: list[Cell] = []

    def take() -> None:
        wait_for(cells)
        mine.extend(cell for cell in cells if cell not in shared.taken)
        for cell in mine:
            cell.handed = None  # it would keep what is donated from being used again
        shared.taken.update(dict.fromkeys(mine, threading.get_ident()))
        shared.version += 2  # a call that has read their values must look again

    def give_back() -> None:
        while mine:  # once: another thread may have taken them since
            shared.taken.pop(mine[-1], None)
            mine.pop()
        _returned.notify_all()

    try:
        exclusive(take)
        result = act()
        exclusive(give_back)
    except BaseException:
        exclusive(give_back)
        raise
    return result
