"""Loops that keep little for the backward pass: scans over checkpointed segments.

The gradient of a scan needs the intermediate values of all its `n` steps. Cut into
segments, with `jax.checkpoint` on each, only the carry at the start of every segment is
kept, and the backward pass computes one segment after the other a second time (Chen et
al. 2016, "Training deep nets with sublinear memory cost"; Griewank 1992 for segments
within segments).

What is scanned is the loop's traced program, so that the user's body isn't run again for
any of this, and the States that it writes are part of the carry: a second computation
gives the values that the first one gave, and nobody writes them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax

from .._errors import message
from ._progress import with_progress

Checkpoint = int | str | None

BRANCHES = 16
"""Segments in a segment, at most, of a recursive checkpoint: more of them keep more, and
fewer compute the steps more often, since every level does so once."""


def as_checkpoint(name: str, checkpoint: Any) -> Checkpoint:
    """A `checkpoint=` of a loop, or an error if it isn't one."""
    if checkpoint is None or checkpoint in ("sqrt", "recursive"):
        return checkpoint
    is_number = isinstance(checkpoint, int | np.integer)
    if is_number and not isinstance(checkpoint, bool) and checkpoint > 0:
        return int(checkpoint)
    raise ValueError(
        message(
            f"`checkpoint` of `{name}` is {checkpoint!r}.",
            "it says what is kept of the loop for a backward pass.",
            'None for all, the length of a segment, "sqrt" or "recursive".',
        )
    )


def scan_segments(
    body: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any,
    length: int | None,
    reverse: bool,
    unroll: int | bool,
    checkpoint: Checkpoint,
    progress: bool | str = False,
    **options: Any,
) -> tuple[Any, Any]:
    """`jax.lax.scan`, with little kept for the backward pass if `checkpoint` says so.

    **Arguments:**

    - `body`: pure. It is traced by JAX more than once.
    - `checkpoint`: None; the length of a segment; or `"sqrt"` or `"recursive"`.
    - `progress`: see `with_progress`. With checkpoints it counts the outer segments:
        what happens inside of one happens again in the backward pass.
    """
    arrays = jtu.tree_leaves(xs)
    n = arrays[0].shape[0] if arrays else (length or 0)
    if checkpoint is None or n == 0:
        body, xs = with_progress(progress, n, body, xs, reverse)
        return lax.scan(body, init, xs, length, reverse, unroll, **options)

    step = functools.partial(lax.scan, body, unroll=unroll, **options)
    carry, done, parts = init, 0, []
    for factors in segments(n, checkpoint):
        size = math.prod(factors)
        start = n - done - size if reverse else done
        part = _reshape(_slice(xs, start, size, n), 1, factors)
        outer = _nest(step, factors, reverse)
        outer, part = with_progress(
            progress if done == 0 else False, factors[0], outer, part, reverse
        )
        carry, ys = lax.scan(outer, carry, part, factors[0], reverse)
        parts.append(_reshape(ys, len(factors), (size,)))
        done += size
    if reverse:
        parts.reverse()
    if len(parts) == 1:
        return carry, parts[0]
    return carry, jtu.tree_map(lambda *ys: jnp.concatenate(ys), *parts)


def _nest(
    step: Callable[..., Any], factors: Sequence[int], reverse: bool
) -> Callable[[Any, Any], Any]:
    """The body of the scan over a nest's outer segments."""
    outer, inner, *rest = factors
    if rest:
        step = functools.partial(lax.scan, _nest(step, factors[1:], reverse))

    def segment(carry: Any, xs: Any) -> Any:
        return step(carry, xs, length=inner, reverse=reverse)

    # The forward and the backward pass are loops of their own, and XLA shares nothing
    # between these; but it unrolls a loop of a single iteration.
    return jax.checkpoint(segment, prevent_cse=outer == 1)


def _slice(xs: Any, start: int, size: int, n: int) -> Any:
    if size == n:
        return xs
    return jtu.tree_map(lambda x: x[start : start + size], xs)


def _reshape(tree: Any, dims: int, into: Sequence[int]) -> Any:
    """Replaces the leading `dims` dimensions of all arrays by those of `into`."""
    return jtu.tree_map(lambda x: x.reshape(*into, *x.shape[dims:]), tree)


# -- lengths ------------------------------------------------------------------------


def segments(n: int, checkpoint: int | str) -> Iterator[tuple[int, ...]]:
    """Cuts `n` steps into nests of segments, one after the other.

    A nest `(a, b, c)` is `a` segments of `b` segments of `c` steps. Every nest is code to
    be compiled, so there are as few as possible: one if that comes out even, and one or
    two more for the rest.
    """
    while n:
        if isinstance(checkpoint, int):
            factors = (n // checkpoint, checkpoint)
        elif checkpoint == "sqrt":
            # Its rest is shorter than a segment.
            factors, checkpoint = _factors(n, 2), n
        else:
            factors = _factors(n, levels(n))
        if factors[0] == 0 or len(factors) == 1:
            factors = (1, n)
        yield factors
        n -= math.prod(factors)


def levels(n: int) -> int:
    """Of a recursive checkpoint."""
    depth = 1
    while BRANCHES**depth < n:
        depth += 1
    return depth


def _factors(n: int, count: int) -> tuple[int, ...]:
    """Numbers of about the same size, with a product just below `n`, or `n` itself."""
    root = n ** (1 / count)
    near = range(max(1, int(root / 1.5)), int(root * 1.5) + 2)
    heads = itertools.combinations_with_replacement(near, count - 1)
    found = ((*head, n // math.prod(head)) for head in heads)
    return max(found, key=lambda factors: (math.prod(factors), -max(factors)))
