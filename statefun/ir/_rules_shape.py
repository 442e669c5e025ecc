"""Identities of shape: what only moves elements, and moves them nowhere."""

from __future__ import annotations

from jax.extend.core import primitives

from ._jaxpr import Eqn
from ._rules import Answer, Defs, Rule, producer
from ._values import plain

_RESHAPES = (primitives.reshape_p, primitives.squeeze_p, primitives.broadcast_in_dim_p)


def _same_shape(eqn: Eqn) -> bool:
    return eqn.invars[0].aval.shape == eqn.outvars[0].aval.shape


def _plain(eqn: Eqn, inner: Eqn) -> bool:
    """Whether two equations may become one: on a mesh each may have its sharding."""
    out, source = eqn.outvars[0].aval, inner.invars[0].aval
    return plain(out) and plain(source) and out.weak_type == source.weak_type


def _transpose(eqn: Eqn, defs: Defs) -> Answer:
    order = eqn.params["permutation"]
    if tuple(order) == tuple(range(len(order))):
        return eqn.invars[0]
    inner = producer(eqn, defs, eqn.primitive)
    if inner is None or not _plain(eqn, inner):
        return None
    first = inner.params["permutation"]
    return eqn.replace(
        invars=inner.invars, params={"permutation": tuple(first[i] for i in order)}
    )


def _only_reshapes(eqn: Eqn) -> bool:
    """Whether `eqn` keeps every element, once and in order."""
    params = eqn.params
    if params.get("sharding") is not None or len(eqn.invars) != 1:
        return False
    if eqn.primitive is primitives.reshape_p:
        return params.get("dimensions") is None
    return eqn.invars[0].aval.size == eqn.outvars[0].aval.size


def _reshape(eqn: Eqn, defs: Defs) -> Answer:
    """A chain of reshapes, squeezes and added axes is one reshape, or nothing."""
    if not _only_reshapes(eqn):
        return None
    if _same_shape(eqn):
        return eqn.invars[0]
    for primitive in _RESHAPES:
        inner = producer(eqn, defs, primitive)
        if inner is not None:
            break
    else:
        return None
    if not _only_reshapes(inner) or not _plain(eqn, inner):
        return None
    (source,), out = inner.invars, eqn.outvars[0].aval
    if source.aval.shape == out.shape:
        return source
    params = {"new_sizes": out.shape, "dimensions": None, "sharding": None}
    return eqn.replace(primitive=primitives.reshape_p, invars=[source], params=params)


def _broadcast(eqn: Eqn, defs: Defs) -> Answer:
    inner = producer(eqn, defs, eqn.primitive)
    if inner is None or len(inner.invars) != 1 or not _plain(eqn, inner):
        return _reshape(eqn, defs)
    if eqn.params["sharding"] is not None or inner.params["sharding"] is not None:
        return None
    outer = eqn.params["broadcast_dimensions"]
    dims = tuple(outer[i] for i in inner.params["broadcast_dimensions"])
    return eqn.replace(
        invars=inner.invars, params={**eqn.params, "broadcast_dimensions": dims}
    )


def noop_reshape(eqn: Eqn, defs: Defs) -> Answer:
    return eqn.invars[0] if _only_reshapes(eqn) and _same_shape(eqn) else None


def _reduce_sum(eqn: Eqn, defs: Defs) -> Answer:
    """The sum over axes of size one: no addition happens, -0.0 stays -0.0."""
    (x,), params = eqn.invars, eqn.params
    if any(x.aval.shape[axis] != 1 for axis in params["axes"]):
        return None
    if params.get("out_sharding") is not None or not _plain(eqn, eqn):
        return None
    if not params["axes"]:
        return x
    axes = tuple(int(axis) for axis in params["axes"])
    return eqn.replace(primitive=primitives.squeeze_p, params={"dimensions": axes})


def _slice(eqn: Eqn, defs: Defs) -> Answer:
    strides = eqn.params["strides"]
    if strides is not None and any(s != 1 for s in strides):
        return None
    return eqn.invars[0] if _same_shape(eqn) else None


def _pad(eqn: Eqn, defs: Defs) -> Answer:
    # A negative and a positive edge may cancel in the shape, never in the values.
    nothing = all(tuple(p) == (0, 0, 0) for p in eqn.params["padding_config"])
    return eqn.invars[0] if nothing else None


def _dynamic_slice(eqn: Eqn, defs: Defs) -> Answer:
    # XLA clamps the start so that the slice fits: a whole slice starts at zero.
    return eqn.invars[0] if _same_shape(eqn) else None


def _dynamic_update_slice(eqn: Eqn, defs: Defs) -> Answer:
    operand, update = eqn.invars[:2]
    return update if operand.aval.shape == update.aval.shape else None


def _rev(eqn: Eqn, defs: Defs) -> Answer:
    shape = eqn.invars[0].aval.shape
    turned = any(shape[d] != 1 for d in eqn.params["dimensions"])
    return None if turned else eqn.invars[0]


def _concatenate(eqn: Eqn, defs: Defs) -> Answer:
    return eqn.invars[0] if len(eqn.invars) == 1 else None


SHAPE_RULES: dict[object, Rule] = {
    primitives.transpose_p: _transpose,
    primitives.reshape_p: _reshape,
    primitives.squeeze_p: _reshape,
    primitives.broadcast_in_dim_p: _broadcast,
    primitives.reduce_sum_p: _reduce_sum,
    primitives.slice_p: _slice,
    primitives.pad_p: _pad,
    primitives.dynamic_slice_p: _dynamic_slice,
    primitives.dynamic_update_slice_p: _dynamic_update_slice,
    primitives.rev_p: _rev,
    primitives.concatenate_p: _concatenate,
}
