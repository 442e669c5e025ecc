"""Numbers and NumPy arrays that are written to a State become jax arrays."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def normalise(value: Any, old: Callable[[], Any] = lambda: None) -> Any:
    """Numbers and NumPy arrays of a value become jax arrays.

    This holds for the value itself and inside its plain tuples, lists and dicts. Inside
    an `eqx.Module` Equinox's rule stands: a Python float is static.

    **Arguments:**

    - `value`: what is written.
    - `old`: gives the value that is replaced. A Python number takes the dtype of the
        array at its place; `old` is called only if there is a number.

    **Raises:** `TypeError` if a Python number doesn't fit the dtype it has to take.
    """
    kind = type(value)
    if kind is dict:
        return {
            k: normalise(v, lambda k=k: _item(old(), dict, k)) for k, v in value.items()
        }
    if kind is tuple or kind is list:
        return kind(
            normalise(v, lambda i=i: _item(old(), kind, i)) for i, v in enumerate(value)
        )
    if kind in _PYTHON_NUMBERS:
        present = old()
        if isinstance(present, jax.Array):
            return _number_like(value, present.dtype)
        return jnp.asarray(value)
    if isinstance(value, _NUMPY):
        return jnp.asarray(value)
    return value


def normalise_in_place(value: Any, normal: Any) -> Any:
    """Puts what `normalise` has made of a value into the value's own lists and dicts."""
    kind = type(value)
    if kind is dict or kind is list:
        for key in list(value) if kind is dict else range(len(value)):
            new = normalise_in_place(value[key], normal[key])
            if new is not value[key]:
                value[key] = new
        return value
    if kind is tuple:
        items = tuple(map(normalise_in_place, value, normal))
        return value if all(map(is_, value, items)) else items
    return normal


_PYTHON_NUMBERS = (bool, int, float, complex)
_NUMPY = (np.ndarray, np.number, np.bool_)


def _item(container: Any, kind: type, key: Any) -> Any:
    if type(container) is not kind:
        return None
    if kind is dict:
        return container.get(key)
    return container[key] if key < len(container) else None


def _number_like(value: Any, dtype: Any) -> jax.Array:
    """The number as an array of this dtype, if it stays the same number."""
    refusal = TypeError(f"the number {value!r} does not fit the dtype {dtype}")
    if jnp.issubdtype(dtype, jnp.inexact):
        if isinstance(value, complex) and not jnp.issubdtype(
            dtype, jnp.complexfloating
        ):
            raise refusal
        try:
            overflows = np.isfinite(value) and abs(value) > float(jnp.finfo(dtype).max)
        except OverflowError:
            raise refusal from None
        except TypeError:  # an integer that is too large for NumPy
            overflows = abs(value) > float(jnp.finfo(dtype).max)
        if overflows:
            raise refusal
    elif dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.integer):
        low, high = (0, 1) if dtype == jnp.bool_ else _range(dtype)
        if isinstance(value, complex) or value != value // 1:
            raise refusal
        if not low <= value <= high:
            raise refusal
    else:  # a random key
        raise refusal
    return jnp.asarray(value, dtype)


def _range(dtype: Any) -> tuple[int, int]:
    info = jnp.iinfo(dtype)
    return int(info.min), int(info.max)
