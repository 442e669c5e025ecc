"""The value of one equation on constants, bit for bit as JAX computes it.

Running an equation through XLA compiles it first, which costs tens of milliseconds
for each kind of equation: more than a pass may take for thousands of them. So what
NumPy computes to the same bits is left to NumPy: integers, logic, comparisons,
moves, and the float operations that IEEE 754 defines exactly. `exp` and its like
differ in the last bit and go through XLA.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import primitives

from ._jaxpr import Eqn
from ._values import kind

Values = Sequence[np.ndarray]
Exact = Callable[..., Any]

_COMPARE = {
    primitives.eq_p: np.equal,
    primitives.ne_p: np.not_equal,
    primitives.lt_p: np.less,
    primitives.le_p: np.less_equal,
    primitives.gt_p: np.greater,
    primitives.ge_p: np.greater_equal,
}
_REAL = {
    primitives.add_p: np.add,
    primitives.sub_p: np.subtract,
    primitives.mul_p: np.multiply,
    primitives.neg_p: np.negative,
}
_FLOAT = {
    primitives.div_p: np.divide,
    primitives.sqrt_p: np.sqrt,
    primitives.floor_p: np.floor,
    primitives.ceil_p: np.ceil,
}
_BITS = {
    primitives.and_p: np.bitwise_and,
    primitives.or_p: np.bitwise_or,
    primitives.xor_p: np.bitwise_xor,
    primitives.not_p: np.invert,
}
_EXTREMA = {primitives.max_p: np.maximum, primitives.min_p: np.minimum}


def _ordinary(value: Any) -> bool:
    """No NaN, whose bits differ, and no subnormal, which XLA may flush to zero."""
    value = np.asarray(value)
    if kind(value.dtype) != "float":
        return kind(value.dtype) in ("int", "bool")
    size = np.abs(value)
    return bool(np.all((size == 0) | (size >= _tiny(value.dtype))))


@functools.cache
def _tiny(dtype: Any) -> Any:
    return jax.numpy.finfo(dtype).tiny


def _convert(eqn: Eqn, value: np.ndarray) -> np.ndarray | None:
    old, new = value.dtype, np.dtype(eqn.outvars[0].aval.dtype)
    was, becomes = kind(old), kind(new)
    if becomes == "other" or "complex" in (was, becomes):
        return None
    if was == "float" and becomes == "int":
        info = np.iinfo(new)
        inside = (value >= float(info.min)) & (value < float(info.max))
        return value.astype(new) if inside.all() else None
    if was == "float" and becomes == "float" and old.itemsize == 8:
        # ml_dtypes rounds twice on the way to the small floats.
        return value.astype(new) if new.itemsize >= 4 else None
    if was == "int" and becomes == "float" and new.itemsize < 4:
        return None
    return value.astype(new)


@np.errstate(all="ignore")
def with_numpy(eqn: Eqn, values: Values) -> np.ndarray | None:
    """NumPy's result, where that is certain to equal XLA's."""
    primitive, (out,) = eqn.primitive, eqn.outvars
    of = kind(values[0].dtype)
    if not all(_ordinary(v) for v in values):
        return None
    if primitive in _COMPARE:
        result = _COMPARE[primitive](*values)
    elif primitive in _BITS and of in ("int", "bool"):
        result = _BITS[primitive](*values)
    elif primitive in _EXTREMA and of in ("int", "bool"):
        result = _EXTREMA[primitive](*values)
    elif primitive in _REAL and of in ("int", "float"):
        result = _REAL[primitive](*values)
    elif primitive in _FLOAT and of == "float":
        result = _FLOAT[primitive](*values)
    elif primitive is primitives.convert_element_type_p:
        result = _convert(eqn, values[0])
    elif primitive is primitives.reshape_p and eqn.params["dimensions"] is None:
        result = values[0].reshape(out.aval.shape)
    elif primitive is primitives.squeeze_p:
        result = values[0].reshape(out.aval.shape)
    elif primitive is primitives.select_n_p and not values[0].shape:
        which, *cases = values
        result = cases[int(which)] if 0 <= int(which) < len(cases) else None
    else:
        return None
    return _as(out.aval, result) if result is not None and _ordinary(result) else None


def _as(aval: Any, value: Any) -> np.ndarray | None:
    """`value`, if it has the type of the equation's output."""
    value = np.asarray(value)
    right = value.dtype == aval.dtype and value.shape == aval.shape
    return value if right else None


@contextlib.contextmanager
def _no_checks() -> Iterator[None]:
    """A NaN that shows up here shows up in the program later, and is reported then."""
    with jax.debug_nans(False), jax.debug_infs(False):
        yield


def with_xla(eqn: Eqn, values: Values) -> np.ndarray | None:
    """The result of running the equation by itself."""
    try:
        with jax.ensure_compile_time_eval(), _no_checks(), eqn.ctx.manager:
            answer = eqn.primitive.bind(*values, **eqn.params)
    except Exception:
        # No kernel for it here, perhaps: the program may be meant for another
        # device than the one that optimizes it.
        return None
    if isinstance(answer, (list, tuple, Tracer)):
        return None
    return _as(eqn.outvars[0].aval, answer)


def evaluate(eqn: Eqn, values: Values) -> np.ndarray | None:
    """The single output of `eqn` on `values`; None if it can't be folded."""
    result = with_numpy(eqn, values)
    return with_xla(eqn, values) if result is None else result
