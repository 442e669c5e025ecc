"""Everything that depends on the version of JAX, or on a corner of its public API.

Each entry says what differs and why it matters. No other module asks for a version.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core as jec
import jax.numpy as jnp
import numpy as np
from jax.interpreters import batching, mlir

Tracer = jax.core.Tracer
eval_jaxpr = jax.core.eval_jaxpr
eval_context = jax.core.eval_context

# jax 0.11 merged `ClosedJaxpr` into `Jaxpr`: there `closed.jaxpr is closed`, so code
# that unwraps in a loop never ends, and a jaxpr with consts attached prints oddly when
# it is built by hand. `replace` and `ClosedJaxpr(jaxpr, consts)` work on both sides.


find_top_trace = jec.find_top_trace
"""Called with `()`, gives the trace that is current in this thread, as `current_trace`.

Since jax 0.4.36 it looks at no arguments and returns the current trace.
`get_opaque_trace_state` says the same at three times the price, and a call of a jitted
function asks each time.
"""

current_trace = functools.partial(find_top_trace, ())
"""Gives the trace that is current in this thread, to compare (`is`) or to enter again."""

with eval_context():
    TOP_LEVEL = current_trace()


def at_top_level() -> bool:
    """Whether no JAX transformation is under way in this thread."""
    return current_trace() is TOP_LEVEL


def jit_disabled() -> bool:
    """Whether `jax.disable_jit()` is on."""
    return jax.config.jax_disable_jit  # type: ignore[attr-defined]


def checks_results() -> bool:
    """Whether `jax.debug_nans` or `jax.debug_infs` is on: a run may raise then, when
    what was donated to it is deleted already."""
    return bool(
        jax.config.jax_debug_nans  # type: ignore[attr-defined]
        or jax.config.jax_debug_infs  # type: ignore[attr-defined]
    )


def in_trace(trace: Any) -> Any:
    """Context manager: JAX operations inside are recorded by `trace`."""
    return jec.set_current_trace(trace)


def return_to(trace: Any) -> None:
    """Makes the trace the current one for good, whatever an interrupt has kept from
    leaving another."""
    in_trace(trace).__enter__()


@functools.cache
def array_class() -> type:
    """The class of concrete arrays.

    `isinstance(x, jax.Array)` is true of tracers as well and goes through a metaclass;
    the hot path wants `type(x) is`. JAX exports the class under no public name, so it is
    taken from an array, when there is one: making one at import would start the backend.
    """
    return type(jnp.zeros(()))


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


_PROBE_AVAL = jax.typeof(np.zeros((), np.bool_))
_trace_probe_p = define_primitive(
    "trace_probe",
    lambda: [_PROBE_AVAL],
    lambda: [np.zeros((), np.bool_)],
    lambda ctx: mlir.ir_constants(np.zeros((), np.bool_)),
)


def makes_jaxpr() -> bool:
    """Whether a transform that makes a jaxpr is under way (jit, scan, …)."""
    (probe,) = _trace_probe_p.bind()
    return isinstance(probe, Tracer)


def close(jaxpr: Any, consts: Sequence[Any]) -> jec.ClosedJaxpr:
    """The jaxpr with the values of its constants."""
    return jec.ClosedJaxpr(jaxpr, list(consts))


# Changing a user context makes JAX's trace caches miss: see `_trace.stale`.
# `make_user_context` must not run beside other JAX calls, so it runs at import.
trace_generation = jax.make_user_context(0)


def varying_axes(x: Any) -> frozenset:
    """The axes of a `shard_map` along which an array differs between devices."""
    aval = jax.typeof(x)
    # Named `vma` until 0.9, `manual_axis_type.varying` since.
    kind = getattr(aval, "manual_axis_type", None)
    return frozenset(aval.vma if kind is None else kind.varying)  # type: ignore[attr-defined]


# -- which arrays differ along a vmapped axis? --------------------------------------


class _Probing(threading.local):
    outside: Any = None
    found: set[int] | None = None


_probing = _Probing()


def _on_batched(args: Sequence[Any], dims: Sequence[Any], *, index: int) -> Any:
    # Called in the trace around the vmap that the array is batched in. An array that is
    # batched in an outer vmap only gets here, too, but in that one's outer trace.
    if _probing.found is not None and current_trace() is _probing.outside:
        _probing.found.add(index)
    return args[0], dims[0]


_batch_probe_p = jec.Primitive("batch_probe")
_batch_probe_p.def_abstract_eval(lambda aval, *, index: aval)
_batch_probe_p.def_impl(lambda x, *, index: x)
batching.primitive_batchers[_batch_probe_p] = _on_batched
mlir.register_lowering(_batch_probe_p, lambda ctx, x, *, index: [x])


_lane_p = jec.Primitive("lane")
batching.primitive_batchers[_lane_p] = lambda args, dims, *, axis: (args[1], axis)


def lane_of(marker: Any, array: Any, axis: int) -> Any:
    """Inside a vmap what a lane sees of an array from outside that is mapped, too.

    As if the array had been an argument of the vmap. JAX has no public way to map one
    that turns up when the function is running already; a primitive whose batching rule
    says that the array is the batch does it, without an operation.

    **Arguments:**

    - `marker`: any array that is mapped by the vmap.
    - `array`: has an entry for each lane.
    - `axis`: of the array.
    """
    return _lane_p.bind(marker, array, axis=axis % array.ndim)


def _numbers(args: Sequence[Any], dims: Sequence[int]) -> Any:
    ((marker,), (axis,)) = args, dims
    numbers = np.arange(marker.shape[axis], dtype=np.int32)
    if jax.typeof(marker).sharding.spec[axis] is None:
        return numbers, 0
    # What is mapped has to be sharded alike where the axes of the mesh are explicit.
    marker = jax.lax.stop_gradient(marker)
    row = marker[tuple(slice(None) if i == axis else 0 for i in range(marker.ndim))]
    return jnp.zeros_like(row, dtype=np.int32) + numbers, 0


_lane_number_p = jec.Primitive("lane_number")
batching.primitive_batchers[_lane_number_p] = _numbers


def lane_number(marker: Any) -> Any:
    """Inside a vmap the number of the lane; `marker` as in `lane_of`."""
    return _lane_number_p.bind(marker)


def _any_of(args: Sequence[Any], dims: Sequence[int]) -> Any:
    ((x,), (axis,)) = args, dims
    return _any_lane_p.bind(jnp.any(x, axis=axis)), None  # None: not mapped


_any_lane_p = jec.Primitive("any_lane")
_any_lane_p.def_abstract_eval(lambda aval: aval)
_any_lane_p.def_impl(lambda x: x)
batching.primitive_batchers[_any_lane_p] = _any_of
mlir.register_lowering(_any_lane_p, lambda ctx, x: [x])


def any_lane(x: Any) -> Any:
    """Whether a boolean is true in any lane of the vmaps around.

    The same for all of them, so that a branch on it stays a branch. JAX has no public way
    to ask: `jnp.any` over an axis by its name needs a name.
    """
    return _any_lane_p.bind(x)


def batched(arrays: Sequence[Any], outside: Any) -> set[int]:
    """The positions of the arrays that differ along the axis of the current vmap.

    JAX has no public question for it. A primitive whose batching rule takes a note
    answers it.

    **Arguments:**

    - `arrays`: anything inside of the vmap.
    - `outside`: `current_trace()` in the trace around the vmap.
    """
    before = _probing.outside, _probing.found
    found: set[int] = set()
    _probing.outside, _probing.found = outside, found
    try:
        for i, x in enumerate(arrays):
            if isinstance(x, Tracer):
                _batch_probe_p.bind(jax.lax.stop_gradient(x), index=i)
    finally:
        _probing.outside, _probing.found = before
    return found
