"""`while_loop` with a bound on its steps, which can be differentiated in reverse mode.

A backward pass needs to know how much it has to keep, so that the loop becomes a scan of
so many steps as it may take at most. What makes it stop early is a branch around each
step, and around each segment of steps: where the loop is over, a segment is skipped as a
whole (as in the bounded loops of Equinox, Kidger 2021, "On neural differential
equations", section 5.1.2).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax, random

from .._compat import any_lane
from .._errors import message
from .._trace.names import innermost
from .._trace.program import Program
from ._segments import Checkpoint, levels


def as_max_steps(max_steps: Any, throw: bool) -> int | None:
    """The bound of a `while_loop`, or an error if it isn't one."""
    if max_steps is None:
        if throw:
            return None
        raise ValueError(
            message(
                "`while_loop` was given `throw=False`, and no `max_steps`.",
                "without a bound there is none that could be reached.",
                "give `max_steps` as well, or leave `throw` out.",
            )
        )
    is_number = isinstance(max_steps, int | np.integer)
    if is_number and not isinstance(max_steps, bool) and 0 < max_steps < 2**31:
        return int(max_steps)
    raise ValueError(
        message(
            f"`max_steps` of `while_loop` is {max_steps!r}.",
            "it is how often the body may run at most, and has to be known when tracing.",
            "a positive integer, or None for a loop without a bound.",
        )
    )


def check_condition(condition: Program) -> None:
    """Raises as `jax.lax.while_loop` does."""
    found = condition.out_avals
    if condition.out.is_array and found[0].shape == () and found[0].dtype == bool:
        return
    raise TypeError(
        "cond_fun must return a boolean scalar, but got output type(s) "
        f"{[aval.str_short() for aval in found]}."
    )


def stop_if_unfinished(
    tree: Any, unfinished: Any, body_fun: Callable, max_steps: int
) -> Any:
    """The tree, for a program that fails where the bound was reached."""
    body = innermost(body_fun)
    what = (
        f"`while_loop` has run its body ({getattr(body, '__qualname__', body)}) "
        f"`max_steps={max_steps}` times, and its condition still holds."
    )
    why = "the result would be that of a loop which was cut off. No State was written."
    instead = (
        "a larger `max_steps`, or `throw=False`, which returns `(val, done)` and leaves "
        "it to you."
    )
    # The check goes where the arrays go, and can't go with typed keys.
    leaves, treedef = jtu.tree_flatten(tree)
    keys = [i for i, x in enumerate(leaves) if is_key(x)]
    plain = [random.key_data(x) if is_key(x) else x for x in leaves]
    checked = eqx.error_if(plain, unfinished, message(what, why, instead))
    for i in keys:
        impl = random.key_impl(leaves[i])
        checked[i] = random.wrap_key_data(checked[i], impl=impl)
    return treedef.unflatten(checked)


def is_key(x: Any) -> bool:
    return jnp.issubdtype(jax.typeof(x).dtype, jax.dtypes.prng_key)


def bounded_while(
    cond: Callable[[Any], Any],
    step: Callable[[Any], Any],
    init: Any,
    max_steps: int,
    checkpoint: Checkpoint,
) -> tuple[Any, Any]:
    """`jax.lax.while_loop` of at most `max_steps` steps.

    **Arguments:**

    - `cond`, `step`: pure. They are traced by JAX more than once.
    - `checkpoint`: as of `scan_segments`.

    **Returns:** what is carried in the end, and whether `cond` holds of it.
    """

    def goes_on(carry: Any) -> Any:
        _, wanted, steps = carry
        return wanted & (steps < max_steps)

    def one(carry: Any) -> Any:
        at, _, steps = carry
        at = step(at)
        return at, cond(at), steps + 1

    def run(carry: Any) -> Any:
        return lax.cond(goes_on(carry), one, lambda c: c, carry)

    def unless_over(run: Callable[[Any], Any], carry: Any, _: Any) -> Any:
        # In a vmap a branch on what differs between lanes would be taken by all of them,
        # and nothing be skipped.
        on = any_lane(goes_on(carry))
        return lax.cond(on, run, lambda c: c, carry), None

    def scan(run: Callable[[Any], Any], length: int, carry: Any) -> Any:
        return lax.scan(functools.partial(unless_over, run), carry, length=length)[0]

    outer, *inner = _lengths(max_steps, checkpoint)
    for around, length in zip([outer, *inner][-2::-1], inner[::-1], strict=True):
        run = functools.partial(scan, run, length)
        if checkpoint is not None:
            # See `_segments._nest`.
            run = jax.checkpoint(run, prevent_cse=around == 1)
    carry = init, cond(init), jnp.zeros((), jnp.int32)
    final, wanted, _ = scan(run, outer, carry)
    return final, wanted


def _lengths(max_steps: int, checkpoint: Checkpoint) -> tuple[int, ...]:
    """Of segments within segments, from the outside, for at least `max_steps` steps."""
    if isinstance(checkpoint, int):
        length = min(checkpoint, max_steps)
        return -(-max_steps // length), length
    count = 2 if checkpoint == "sqrt" else levels(max_steps)
    length = 1
    while length**count < max_steps:
        length += 1
    return -(-max_steps // length ** (count - 1)), *(length,) * (count - 1)
