"""What raw transforms have kept of a State, and how it is kept from being used.

JAX caches the jaxpr of a raw `lax.scan`, `jit`, `cond` or `checkpoint` by the identity of
its body and by the context that it was traced in. If the body read a State, what the
State held is part of that jaxpr. A user context is therefore set to a number, the
*generation*. What is kept under a generation may be used as long as every State shows the
same value:

- Code outside of frames is at 0, where raw transforms may not read States.
- A program is traced under `shared.generation`. It moves on when a program has had tracers
  of its States kept. (Raw transforms that keep nothing, grad and vmap, must not move it,
  or every trace would make JAX trace all inner functions anew. A *probe*, an equation
  bound at each such read, shows in the end whether the read went into a jaxpr.)
- A twin outside of any trace runs under a generation of the thread's own, again and again
  (`begin`), until a State that was kept has got another value, or is gone.
- Where what is shown of a State changes within a frame, its generation is replaced
  (`renew`): a State that was kept is written; a transform inside that shows it otherwise
  (differentiated, mapped) begins, or ends and has had its view kept.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from .. import _compat
from .._compat import Tracer
from .._state.access import local
from .._state.cell import Cell, Value, shared, snapshot
from .._state.structure import leaves_of

if TYPE_CHECKING:
    from .frame import Frame

_generations = itertools.count(2)  # atomic, unlike `+= 1`

_PROBE_AVAL = jax.typeof(np.zeros((), np.bool_))
state_probe_p = _compat.define_primitive(
    "state_probe",
    lambda *, token: [_PROBE_AVAL],
    lambda *, token: [np.zeros((), np.bool_)],
    lambda ctx, *, token: _compat.mlir.ir_constants(np.zeros((), np.bool_)),
)


def forget_inner_traces() -> None:
    """Keeps everything that was kept from being used: by later programs and twins, and
    from now on in the frame there is."""
    shared.generation = next(_generations)
    _drop()
    if local.frame is not None:
        renew(local.frame)


def renew(frame: Frame) -> None:
    """Runs the rest of a frame under a generation of its own.

    The frame has to be the innermost: contexts end in the reverse order.
    """
    _enter(frame, next(_generations))


def _enter(frame: Frame, generation: int) -> None:
    frame.generation = generation
    frame.contexts.enter_context(_compat.trace_generation(generation))


def trace_context() -> Any:
    """Context manager under which a program is traced."""
    frame = local.frame
    while frame is not None:
        if frame.kept and not frame.is_top:  # whose generations nobody shares
            shared.generation = next(_generations)
            break
        frame = frame.parent
    return _compat.trace_generation(shared.generation)


def leave_trace_context() -> None:
    """Code outside of frames is at 0, whatever an interrupt has kept from being left."""
    _compat.trace_generation(0).__enter__()


# -- outside of any trace -----------------------------------------------------------


class _Thread(threading.local):
    """Of this thread: the generation of twins outside of any trace, and the arrays that
    may have been kept under it, by State."""

    def __init__(self) -> None:
        self.generation = next(_generations)
        self.kept: dict[weakref.ref[Cell], list[weakref.ref]] = {}


_thread = _Thread()


def begin(frame: Frame) -> None:
    """Sets the generation of a twin that no other encloses."""
    if not frame.is_top:
        _enter(frame, shared.generation)
        frame.generation = 0
        return
    cells = [ref() for ref in _thread.kept]
    alive = [c for c in cells if c and (c.handle is None or c.handle() is not None)]
    _, values = snapshot(alive)
    if len(alive) != len(cells) or not all(
        _same(arrays, value)
        for arrays, value in zip(_thread.kept.values(), values, strict=True)
    ):
        _drop()
        alive = []
    # What was kept is used without being read: it is what the frame has read, now.
    frame.reads.update(zip(alive, values, strict=False))
    frame.kept.update(alive)
    _enter(frame, _thread.generation)


def note_kept(frame: Frame, cell: Cell, value: Value) -> None:
    """A raw transform inside of `frame` has read a State.

    `frame` is the innermost that has a generation: what it shows of the State is what is
    read as long as it lasts.
    """
    mine = frame.generation == _thread.generation
    shown = frame.present(cell)
    arrays = leaves_of(*value)
    if shown is None or shown[0] is not value[0]:
        inner = local.frame
        while inner is not frame and inner is not None:
            inner.misled = True
            inner = inner.parent
        if mine:
            _drop()
    elif mine:
        if any(isinstance(x, Tracer) for x in arrays):
            _drop()
        else:
            _thread.kept[weakref.ref(cell)] = [weakref.ref(x) for x in arrays]


def _drop() -> None:
    _thread.generation, _thread.kept = next(_generations), {}


def _same(arrays: list[weakref.ref], value: Value) -> bool:
    flat, structure = value
    leaves = leaves_of(flat, structure)
    return len(leaves) == len(arrays) and all(
        ref() is x for ref, x in zip(arrays, leaves, strict=True)
    )
