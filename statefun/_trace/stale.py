"""What raw transforms have kept of a State, and how it is kept from being used.

JAX caches the jaxpr of a raw `lax.scan`, `jit`, `cond` or `checkpoint` by the identity of
its body and by the context that it was traced in. If the body read a State, what the
State held is part of that jaxpr. A user context is therefore set to a number, the
*generation*, in every frame:

- Code outside of frames is at 0, frames start at 1: what a raw transform has kept without
  a twin around it is never used inside of one, nor the other way round.
- When a State that may have been kept is written, and when a frame ends in which one was
  kept, the generation moves on (`forget_inner_traces`).
- Raw transforms that keep nothing (grad, vmap) must not move it, or every trace would
  make JAX trace all inner functions anew. A *probe*, an equation bound at each such read,
  shows in the end whether the read went into a jaxpr (`program.trace`).
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import numpy as np

from .. import _compat
from .._state.access import local
from .._state.cell import shared

_generations = itertools.count(2)  # atomic, unlike `+= 1`

_PROBE_AVAL = jax.typeof(np.zeros((), np.bool_))
state_probe_p = _compat.define_primitive(
    "state_probe",
    lambda *, token: [_PROBE_AVAL],
    lambda *, token: [np.zeros((), np.bool_)],
    lambda ctx, *, token: _compat.mlir.ir_constants(np.zeros((), np.bool_)),
)


def forget_inner_traces() -> None:
    """Makes JAX forget the traces of raw transforms that have kept a State's value.

    JAX caches the jaxpr that a raw `lax.scan` or `jax.jit` made of its body. If the body
    read a State, its value, a tracer, is kept in there: used again after a write it is
    the old value, and in another trace it is another trace's tracer. From now on what is
    traced in this thread is traced under a new value of a user context, which is part of
    the keys of JAX's caches.
    """
    shared.generation = next(_generations)
    frame = local.frame
    keeper = None if frame is None else frame._keeper()
    if keeper is not None:
        keeper._contexts.enter_context(trace_context())


def trace_context() -> Any:
    """Context manager under which a program is traced."""
    frame = local.frame
    while frame is not None:
        if frame.kept:
            shared.generation = next(_generations)
            break
        frame = frame.parent
    return _compat.trace_generation(shared.generation)


def leave_trace_context() -> None:
    """Code outside of frames is at 0, whatever an interrupt has kept from being left."""
    _compat.trace_generation(0).__enter__()
