"""Everything that depends on the version of JAX, or leans on a corner of its public API.

Each entry says what differs and why it matters. No other module asks for a version.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jec
import jax.numpy as jnp
from jax.interpreters import batching, mlir

# jax 0.11 merged `ClosedJaxpr` into `Jaxpr`: there `closed.jaxpr is closed`, so code
# that unwraps in a loop never ends, and a jaxpr with consts attached prints oddly when
# it is built by hand. `replace` and `ClosedJaxpr(jaxpr, consts)` work on both sides.


trace_state = functools.partial(jec.get_opaque_trace_state, convention=None)
"""Gives an opaque, comparable mark of the JAX trace that is current in this thread."""


with jax.core.eval_context():
    TOP_LEVEL = trace_state()


def at_top_level() -> bool:
    """Whether no JAX transformation is under way in this thread."""
    return trace_state() == TOP_LEVEL


@functools.cache
def array_class() -> type:
    """The class of concrete arrays.

    `isinstance(x, jax.Array)` is true of tracers as well and goes through a metaclass;
    the hot path wants `type(x) is`. JAX exports the class under no public name, so it is
    taken from an array, when there is one: making one at import would start the backend.
    """
    return type(jnp.zeros(()))


def current_trace() -> Any:
    """The current trace itself, to be entered again with `in_trace`."""
    with jec.take_current_trace() as trace:
        return trace


def in_trace(trace: Any) -> Any:
    """Context manager: JAX operations inside are recorded by `trace`."""
    return jec.set_current_trace(trace)


def define_primitive(
    name: str, abstract_eval: Callable, impl: Callable, lowering: Callable
) -> jec.Primitive:
    """A primitive with several results and the three rules that every one needs."""
    primitive = jec.Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract_eval)
    primitive.def_impl(impl)
    mlir.register_lowering(primitive, lowering)
    return primitive


def close(jaxpr: Any, consts: Sequence[Any]) -> jec.ClosedJaxpr:
    return jec.ClosedJaxpr(jaxpr, list(consts))


# Changing a user context makes JAX's trace caches miss: see `_frame.stale_traces`.
# `make_user_context` must not run beside other JAX calls, so it runs at import.
trace_generation = jax.make_user_context(0)


# -- which arrays differ along a vmapped axis? --------------------------------------


class _Probing(threading.local):
    outside: Any = None
    found: set[int] | None = None


_probing = _Probing()


def _on_batched(args: Sequence[Any], dims: Sequence[Any], *, index: int) -> Any:
    # Called in the trace around the vmap that the array is batched in. An array that is
    # batched in an outer vmap only gets here, too, but in that one's outer trace.
    if _probing.found is not None and trace_state() == _probing.outside:
        _probing.found.add(index)
    return args[0], dims[0]


_batch_probe_p = jec.Primitive("batch_probe")
_batch_probe_p.def_abstract_eval(lambda aval, *, index: aval)
_batch_probe_p.def_impl(lambda x, *, index: x)
batching.primitive_batchers[_batch_probe_p] = _on_batched
mlir.register_lowering(_batch_probe_p, lambda ctx, x, *, index: [x])


def batched(arrays: Sequence[Any], outside: Any) -> set[int]:
    """The positions of the arrays that differ along the axis of the current vmap.

    JAX has no public question for it. A primitive whose batching rule takes a note
    answers it.

    **Arguments:**

    - `arrays`: anything inside of the vmap.
    - `outside`: `trace_state()` in the trace around the vmap.
    """
    before = _probing.outside, _probing.found
    found: set[int] = set()
    _probing.outside, _probing.found = outside, found
    try:
        for i, x in enumerate(arrays):
            if isinstance(x, jax.core.Tracer):
                _batch_probe_p.bind(jax.lax.stop_gradient(x), index=i)
    finally:
        _probing.outside, _probing.found = before
    return found
