"""Gradients of a large batch, by small parts of it one after the other.

The parts go through a scan, with the sum of their gradients as its carry: one buffer, that
XLA adds to in place. What the function writes to States joins the carry as in any scan, so
that every part sees what the one before has left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._errors import StateTypeError, message
from .._state import access
from .._state.state import State
from .._trace.names import Named, Parameters
from ._loops import scan


def as_microbatch(twin: str, count: Any, collect: bool) -> int | None:
    """A `microbatch=`, or an error if it isn't one."""
    if count is None:
        if not collect:
            return None
        raise ValueError(
            f"`collect=True` of `{twin}` is about microbatches: give `microbatch`."
        )
    is_number = isinstance(count, int | np.integer) and not isinstance(count, bool)
    if is_number and count > 0:
        return int(count)
    raise ValueError(
        message(
            f"`microbatch` of `{twin}` is {count!r}.",
            "it says in how many parts the batch is cut.",
            "a positive integer, or None for the whole batch at once.",
        )
    )


def accumulate(
    gradient: Callable[[tuple], tuple[Any, Any, Any]],
    fun: Callable,
    diff: Any,
    args: tuple,
    first: int,
    count: int,
    collect: bool,
) -> tuple[Any, Any, Any]:
    """The mean of the gradients of all parts.

    **Arguments:**

    - `gradient`: of arguments: the loss, aux, and the gradient.
    - `fun`: the user's function.
    - `diff`: what is differentiated; the gradient is like it.
    - `args`: of which those from number `first` on are cut.

    **Returns:** as `gradient`.
    """
    parts = _cut(fun, args, first, count)
    arrays = [x for x in jtu.tree_leaves(diff) if eqx.is_inexact_array(x)]
    zeros = [jnp.zeros_like(x, dtype=_wide(x.dtype)) for x in arrays]
    layouts: list[Any] = []

    def body(sums: list, part: tuple) -> tuple[list, tuple]:
        loss, aux, grad = gradient((*args[:first], *part))
        leaves, layout = jtu.tree_flatten(grad)
        layouts[:] = [layout]
        sums = [a + g.astype(a.dtype) for a, g in zip(sums, leaves, strict=True)]
        return sums, (loss, aux)

    Named(fun, ["sums", "args"]).lend_to(body)
    sums, (losses, aux) = scan(body, zeros, parts)
    means = [(a / count).astype(x.dtype) for a, x in zip(sums, arrays, strict=True)]
    if not collect:
        losses, aux = losses.mean(), _means(aux)
    return losses, aux, layouts[0].unflatten(means)


def _wide(dtype: Any) -> Any:
    """The dtype to add in: in eight bits of mantissa small gradients would be lost."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def _cut(fun: Callable, args: tuple, first: int, count: int) -> tuple:
    """The arguments from number `first` on, their arrays as `count` parts."""
    path_of = Parameters(fun).path
    sizes: dict[str, int] = {}
    for keys, x in jtu.tree_leaves_with_path((args, {})):
        if keys[1].idx < first:
            continue
        path = path_of(keys)
        if isinstance(x, State):
            raise _state_in_part(x, path)
        if eqx.is_array(x):
            if x.ndim == 0:
                raise ValueError(
                    message(
                        f"`{path}` is an array without axes, and the batch is to be cut "
                        f"in `microbatch={count}` parts.",
                        "the arrays of all positional arguments are cut along their "
                        "leading axis.",
                        "pass what all parts share by a keyword, or by the closure.",
                    )
                )
            sizes[path] = x.shape[0]
    found = ", ".join(f"{size} (`{path}`)" for path, size in sizes.items())
    if not sizes or len(set(sizes.values())) > 1:
        raise ValueError(
            message(
                f"the batch is to be cut in `microbatch={count}` parts, and "
                + (f"its sizes differ: {found}." if sizes else "there is none."),
                "the arrays of all positional arguments"
                + (" but the one that is differentiated" if first else "")
                + " are cut along their leading axis.",
                "pass what all parts share by a keyword, or by the closure.",
            )
        )
    if next(iter(sizes.values())) % count:
        raise ValueError(
            message(
                f"a batch can't be cut in `microbatch={count}` equal parts along its "
                f"leading axis: the sizes are {found}.",
                "the mean of the parts would not be the mean of the batch.",
                "a number of parts that divides the size, or a batch with less or more "
                "in it.",
            )
        )

    def parts(x: Any) -> Any:
        if not eqx.is_array(x):
            return x
        return x.reshape(count, x.shape[0] // count, *x.shape[1:])

    return jtu.tree_map(parts, args[first:])


def _state_in_part(state: State, path: str) -> StateTypeError:
    return StateTypeError(
        message(
            f"{state._cell.describe()} is in an argument that is cut in microbatches, at "
            f"`{path}`.",
            "the arrays beside it are cut along their leading axis, and the State would "
            "be left whole.",
            "pass what all parts share by a keyword, or by the closure; give `wrt=` the "
            "States to differentiate.",
        )
    )


def _means(aux: Any) -> Any:
    frame = access.local.frame
    assert frame is not None, "a twin runs in a transaction"

    def mean(keys: Any, x: Any) -> Any:
        if eqx.is_inexact_array(x) and x.ndim == 1:
            return x.mean()
        if eqx.is_array(x):
            what = f"{x.dtype}{list(x.shape[1:])}"
        elif isinstance(x, State) and x._cell in frame.created:
            what = "a new State"
        else:
            return x
        raise TypeError(
            message(
                f"aux{jtu.keystr(keys)} is {what}, which has no mean over microbatches.",
                "by default the loss and all of aux are averaged, and that makes sense "
                "for floating-point scalars.",
                "`collect=True`: loss and aux come with a leading axis, an entry for "
                "each microbatch.",
            )
        )

    return jtu.tree_map_with_path(mean, aux)
