"""Frames: what one trace has read and written so far.

While JAX traces a function nothing is written to a State's cell. Each trace has a
*frame*, an overlay that remembers what the function has read and written; reads look in
the frame first, then in its parents, then at the committed value. When a transform ends
well it hands the writes of its frame on, to the parent frame or, at the top, to the
cells; when the function raises, the frame is dropped, and since nothing was changed
nothing has to be restored.

There are two kinds. An `Overlay` belongs to a trace that runs the function on values
(grad, vmap, jvp): a read takes the parent's value. A `TracedFrame` belongs to a trace
that makes a jaxpr (jit, scan, cond): the first read of a State becomes an equation,

    a:f32[3] b:f32[] = state_read[index=0 avals=(f32[3], f32[])]

which `program.lift` takes out again, making `a` and `b` inputs of the jaxpr. This is
how one trace finds out which States there are.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from .. import _compat
from .._compat import Tracer
from .._errors import (
    StateTraceError,
    foreign_creation,
    foreign_read,
    foreign_write,
    message,
    mutated,
)
from .._state.access import StandIns, current, local, read_inside_raw_transform
from .._state.cell import UNSET, Cell, Value, committed
from .._state.handed import Handed
from .._state.structure import Structure, flat_of, leaves_of
from . import stale
from .nondiff import as_read_by_solver

# -- primitives ---------------------------------------------------------------------


def _escaped(*_args: Any, **_params: Any) -> Any:
    raise StateTraceError(
        message(
            "A State was read inside a JAX transformation that statefun does not see.",
            "the read was recorded in a jaxpr that outlived the trace it belongs to.",
            "use the transform of the same name from statefun.",
        )
    )


state_read_p = _compat.define_primitive(
    "state_read", lambda *, index, avals: list(avals), _escaped, _escaped
)
# The avals are parameters because JAX caches abstract evaluation by the parameters.


# -- frames -------------------------------------------------------------------------


class Frame:
    """What one trace has read and written so far.

    Entering pushes the frame on this thread's stack, and must happen inside the trace
    that the frame belongs to. After leaving, a frame holds no tracer: one that outlived
    its trace (in a cached program) would keep the whole trace alive, and
    `jax.checking_leaks()` would say so.
    """

    _keeps = False
    is_top = False  # whether no trace is under way, JAX's or one of ours
    known: Mapping[Cell, Value] = types.MappingProxyType({})
    stand_ins: StandIns | None = None

    def __init__(self) -> None:
        self.parent: Frame | None = None
        self.order: dict[Cell, None] = {}
        self.reads: dict[Cell, Value] = {}
        self.writes: dict[Cell, Value] = {}
        self.created: dict[Cell, None] = {}
        # See `stale`, which sets these: States that a raw transform has kept the value
        # of, the generation that began with this frame or in it, and whether a value was
        # kept that this frame shows, and those around don't.
        self.kept: set[Cell] = set()
        self.generation = 0
        self.misled = False
        self.contexts = contextlib.ExitStack()
        self.checks = False  # a runtime check is in flight, see `_run`
        # States that a transform inside has written, and not handed on yet.
        self.pending: frozenset[Cell] = frozenset()
        self.handed: dict[Cell, Handed] = {}

    def __enter__(self) -> Frame:
        self.parent = local.frame
        if self.stand_ins is None and self.parent is not None:
            self.stand_ins = self.parent.stand_ins
        self._trace = _compat.current_trace()
        local.frame = self
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        local.frame = self.parent
        self.contexts.close()
        try:
            if kind is None:
                self._check_mutation()
        finally:
            self.reads, self.writes = {}, {}
            self.handed.clear()
            self._trace = self.parent = self.stand_ins = None

    def read(self, cell: Cell) -> Value:
        if self.is_current():
            value = self.peek(cell)
        else:
            self._check_foreign_read(cell)
            value = self.peek(cell)
            self._note_kept(cell, value)
        return as_read_by_solver(cell, value)

    def peek(self, cell: Cell) -> Value:
        """`read` by a frame further up, whose trace is not the current one."""
        self._check_pending(cell)
        found = self.writes.get(cell) or self.reads.get(cell)
        if found is None:
            self.order.setdefault(cell)
            found = self.reads[cell] = self._first_read(cell)
        return found

    def present(self, cell: Cell) -> Value | None:
        """What a State is known to hold here; None if it is as in the frame around."""
        return self.writes.get(cell) or self.reads.get(cell) or self.known.get(cell)

    def value(self, cell: Cell) -> Any:
        flat, structure = self.read(cell)
        handed = self.handed.get(cell)
        if handed is None or handed.flat is not flat:
            value = structure.unflatten(flat)
            handed = self.handed[cell] = Handed(flat, structure, value)
        return handed.value

    def is_current(self) -> bool:
        """Whether JAX is in the frame's own trace, not in a raw transform inside."""
        return _compat.current_trace() is self._trace

    def write(self, cell: Cell, flat: Any, structure: Structure) -> None:
        if not self.is_current():
            raise foreign_write(cell)
        self._check_pending(cell)
        self.order.setdefault(cell)
        # `d = s.value; d["n"] = 1; s.value = d` is fine: the write says what was meant.
        self.handed.pop(cell, None)
        self.writes[cell] = flat, structure
        keeper = self._keeper()
        if keeper is not None and cell in keeper.kept:
            stale.forget_inner_traces()

    def create(self, cell: Cell, flat: Any, structure: Structure) -> None:
        if not self.is_current() and any(
            isinstance(x, Tracer) for x in leaves_of(flat, structure)
        ):
            raise foreign_creation(cell)
        self.created[cell] = None
        self.writes[cell] = flat, structure

    def hold(self, cells: Iterable[Cell]) -> None:
        """Refuses reads and writes of States until `release`.

        The function of a reverse-mode derivative has written them, and its backward pass
        is about to run in this frame, which doesn't have the new values yet.
        """
        for cell in cells:
            self._check_pending(cell)
        self.pending |= frozenset(cells)

    def release(self, cells: Iterable[Cell]) -> None:
        self.pending -= frozenset(cells)

    def _check_pending(self, cell: Cell) -> None:
        if cell in self.pending:
            raise StateTraceError(
                message(
                    "the backward rule of a raw `jax.custom_vjp` reads or writes "
                    f"{cell.describe()}, which the differentiated function has written.",
                    "the rule runs when the function is over, so that it wouldn't see "
                    "the value that the State had when the function was called.",
                    "use `sf.filter_custom_vjp`, or pass the value as an argument.",
                )
            )

    def _first_read(self, cell: Cell) -> Value:
        raise NotImplementedError

    def _keeper(self) -> Frame | None:
        """The nearest frame that deals with what raw transforms keep."""
        frame: Frame | None = self
        while frame is not None and not frame._keeps:
            frame = frame.parent
        return frame

    def _check_foreign_read(self, cell: Cell) -> None:
        """Of a read inside a raw JAX transform, which the frame does not belong to.

        The value belongs to the frame's own trace, so it may be used in there. Raw
        transforms that make a jaxpr keep it, though, and JAX may use that jaxpr again
        in another trace: `stale` deals with it where a frame keeps, and there is no
        remedy where none does.
        """
        if self._keeper() is None and _compat.makes_jaxpr():
            raise foreign_read(cell)

    def _note_kept(self, cell: Cell, value: Value) -> None:
        """Such a read has given a value."""
        keeper = self._keeper()
        if keeper is None:
            return
        keeper.kept.add(cell)
        if isinstance(keeper, TracedFrame):
            keeper.probes += 1
            stale.state_probe_p.bind(token=keeper.probes)
        owner: Frame = self
        while not owner.generation and owner is not keeper:
            assert owner.parent is not None, "the keeper is further up"
            owner = owner.parent
        stale.note_kept(owner, cell, value)

    def _check_mutation(self) -> None:
        for cell, handed in self.handed.items():
            if handed.changed():
                raise mutated(cell)


class Overlay(Frame):
    """The frame of a transform that runs the function on values.

    **Arguments:**

    - `values`: what the States hold inside, where that differs from outside: the tracers
        of the transform for the States that it differentiates or maps over.
    - `keeps`: whether a raw transform inside may keep what it sees in a jaxpr, so that
        this frame has to see to it that nobody uses that later.
    - `view`: makes of the value that a State has outside the one that it has inside.
    - `changes`: whether it makes another one of it; by default it may of all.
    - `sealed`: whether the frames around have nothing to do with it, because JAX may run
        the function at any time; States that are not in `values` then go to `view`.
    """

    def __init__(
        self,
        values: Mapping[Cell, Value] | None = None,
        keeps: bool = False,
        view: Callable[[Cell, Value], Value] | None = None,
        sealed: bool = False,
        changes: Callable[[Cell], bool] = lambda _: True,
    ):
        super().__init__()
        self._view = view
        self._changes = changes
        self._sealed = sealed
        self._values = dict(values or {})
        self._keeps = keeps

    def __enter__(self) -> Frame:
        super().__enter__()
        if self.parent is not None and self._shows_otherwise(self.parent._keeper()):
            stale.renew(self)
        self.reads.update(self._values)
        self.order.update(dict.fromkeys(self._values))
        self._values.clear()
        self.is_top = self.parent is None and _compat.at_top_level()
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        super().__exit__(kind, *rest)
        if self._keeps and self.kept and not self.is_top:
            stale.forget_inner_traces()
        elif self.misled and local.frame is not None:
            stale.renew(local.frame)

    def _shows_otherwise(self, keeper: Frame | None) -> bool:
        """Whether a State that was kept may look different in here."""
        if keeper is None or not keeper.kept:
            return False
        if self._keeps:  # what is written in here is not written there
            return True
        viewed = self._view is not None and any(map(self._changes, keeper.kept))
        return viewed or not keeper.kept.isdisjoint(self._values)

    def present(self, cell: Cell) -> Value | None:
        found = super().present(cell)
        if found is None and self._view is not None and not self._sealed:
            return self.peek(cell)
        return found

    def _first_read(self, cell: Cell) -> Value:
        if self._sealed and self._view is not None:
            return self._view(cell, current(cell, self.parent))
        if self.parent is not None:
            value = self.parent.peek(cell)
            if self._view is None:
                return value
            with _compat.in_trace(self._trace):
                return self._view(cell, value)
        if self.is_top:
            return committed(cell)
        with _compat.in_trace(self._trace):
            return read_inside_raw_transform(cell)


class TracedFrame(Frame):
    """The frame of a transform that traces the function to a jaxpr.

    **Arguments:**

    - `known`: values of States that stand in for the parent's. Only what they look like
        matters here.
    - `stand_ins`: see `StandIns`.
    - `view`: the avals of a State's arrays in here, where they are not those outside: an
        iteration of a loop sees one entry. None for a State that is the same.
    """

    _keeps = True

    def __init__(
        self,
        known: Mapping[Cell, Value] | None = None,
        stand_ins: StandIns | None = None,
        view: Callable[[Cell, Value], Sequence[Any] | None] | None = None,
    ):
        super().__init__()
        self._view = view
        self.known = known or {}
        self.stand_ins = stand_ins
        self.avals: dict[Cell, tuple] = {}
        self.probes = 0

    def present(self, cell: Cell) -> Value | None:
        found = super().present(cell)
        if found is None and self._seen_as(cell, current(cell, self.parent)):
            return self.peek(cell)
        return found

    def _seen_as(self, cell: Cell, value: Value) -> Sequence[Any] | None:
        if self._view is None or value[0] is UNSET:
            return None
        return self._view(cell, value)

    def _first_read(self, cell: Cell) -> Value:
        value = self.known.get(cell) or current(cell, self.parent)
        flat, structure = value
        if flat is UNSET:
            committed(cell)  # raises
        avals = self._seen_as(cell, value) or map(jax.typeof, leaves_of(*value))
        self.avals[cell] = avals = tuple(avals)
        with _compat.in_trace(self._trace):
            arrays = state_read_p.bind(index=len(self.avals) - 1, avals=avals)
        return flat_of(arrays, structure), structure

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self.known = {}
        super().__exit__(kind, *rest)
