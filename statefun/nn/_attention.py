"""`KVCache`: attention with a cache of the keys and values seen so far."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .._errors import message
from .._state.state import State


def _attend(query: Array, keys: Array, values: Array, seen: Array) -> Array:
    """Attention of `(tokens, heads, size)` to `(length, heads, size)`.

    As `equinox.nn.MultiheadAttention` does it. (`jax.nn.dot_product_attention` requires
    keys and values of one size.)
    """
    query = query / math.sqrt(query.shape[-1])
    logits = jnp.einsum("thd,lhd->htl", query, keys)
    least = jnp.full_like(logits, jnp.finfo(logits.dtype).min)
    logits = jnp.where(seen[None], logits, least)
    weights = jax.nn.softmax(
        logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    )
    return jnp.einsum("htl,lhd->thd", weights.astype(logits.dtype), values)


class Cache(State):
    """The kind of State that a [`statefun.nn.KVCache`][] keeps.

    A kind of its own, so that all caches of a network can be mapped at once:
    `sf.filter_vmap(step, state_axes=[(sf.nn.Cache, 0)])`.
    """

    __slots__ = ()


class KVCache(eqx.Module):
    """Causal self-attention for decoding, with the keys and values seen so far.

    Each call appends tokens and attends from them to all tokens up to their own, so that
    a token costs one row of attention, not a square. Examples of a batch may be at
    different positions.

    **Arguments:**

    - `attention`: an `equinox.nn.MultiheadAttention` with one size for query, key and
        value inputs. Train with it directly, on whole sequences and with a causal mask.
    - `max_length`: how many tokens there is room for.
    - `batch_shape`: the axes of a batch, in front of those of the input. (Under
        `filter_vmap`, leave it out and map the States:
        `state_axes=[(sf.nn.Cache, 0)]`.)
    - `process_heads`: called with queries, keys, values (each of shape
        `(tokens, heads, size)`) and the positions of the tokens, and returns the three;
        for rotary embeddings. The keys that it returns are cached.
    - `checked`: whether a call that doesn't fit raises. The check needs the position,
        so every call blocks; without it surplus tokens are dropped, and the output for
        them is meaningless.

    **Attributes:**

    - `keys`, `values`: of shape `(*batch_shape, max_length, heads, size)`.
    - `position`: how many tokens each example has, `int32` of shape `batch_shape`.

    !!! example

        ```python
        import equinox as eqx, jax, jax.numpy as jnp, statefun as sf

        attention = eqx.nn.MultiheadAttention(2, 8, key=jax.random.key(0))
        cached = sf.nn.KVCache(attention, max_length=16)
        cached(jnp.ones((5, 8)))  # a prompt
        cached(jnp.ones((1, 8)))  # one more token
        ```
    """

    attention: eqx.nn.MultiheadAttention
    keys: Cache
    values: Cache
    position: Cache
    process_heads: Callable | None
    max_length: int = eqx.field(static=True)
    batch_shape: tuple[int, ...] = eqx.field(static=True)
    checked: bool = eqx.field(static=True)

    def __init__(
        self,
        attention: eqx.nn.MultiheadAttention,
        max_length: int,
        batch_shape: int | tuple[int, ...] = (),
        *,
        process_heads: Callable | None = None,
        checked: bool = True,
    ):
        self.attention = attention
        self.max_length = max_length
        self.batch_shape = (
            (batch_shape,) if isinstance(batch_shape, int) else tuple(batch_shape)
        )
        self.process_heads = process_heads
        self.checked = checked
        room = (*self.batch_shape, max_length, attention.num_heads)
        dtype = attention.key_proj.weight.dtype
        self.keys = Cache(jnp.zeros((*room, attention.qk_size), dtype), name="keys")
        self.values = Cache(jnp.zeros((*room, attention.vo_size), dtype), name="values")
        self.position = Cache(jnp.zeros(self.batch_shape, jnp.int32), name="position")

    def __call__(self, x: Array, lengths: Int[Array, ...] | None = None) -> Array:
        """Appends tokens and attends from them.

        **Arguments:**

        - `x`: of shape `(*batch_shape, tokens, size)`.
        - `lengths`: how many of the tokens count, for each example, of shape
            `batch_shape`; the rest is padding: it is not cached, and its outputs are
            meaningless.

        **Returns:** an array of shape `(*batch_shape, tokens, output_size)`.

        **Raises:** `ValueError` if `x` has another batch shape, or more tokens than
        `max_length`. If `checked`, `equinox.EquinoxRuntimeError` if there is not enough
        room left; the cache is unchanged then.
        """
        tokens = self._check(x)
        position = self.position.value
        if lengths is None:
            lengths = jnp.full(self.batch_shape, tokens, jnp.int32)
        lengths = lengths.astype(jnp.int32)
        end = position + lengths
        if self.checked:
            end = eqx.error_if(
                end,
                end > self.max_length,
                f"a KVCache with room for {self.max_length} tokens is full. "
                "`cache.reset()`, or a larger `max_length`.",
            )
        step = self._one
        for _ in self.batch_shape:
            step = jax.vmap(step)
        out, self.keys.value, self.values.value = step(
            x, self.keys.value, self.values.value, position, lengths
        )
        self.position.value = jnp.minimum(end, jnp.full_like(end, self.max_length))
        return out

    def reset(self, where: Any = None) -> None:
        """Empties the cache.

        **Arguments:**

        - `where`: booleans of shape `batch_shape`: resets only these examples.
        """
        # What is beyond the position is never read.
        old = self.position.value
        new = jnp.zeros_like(old)
        self.position.value = new if where is None else jnp.where(where, new, old)

    def _one(
        self, x: Array, keys: Array, values: Array, position: Array, length: Array
    ) -> tuple[Array, Array, Array]:
        a = self.attention
        tokens = x.shape[0]
        count = jnp.arange(tokens, dtype=jnp.int32)
        places = position + count

        def heads(proj: Any) -> Array:
            return jax.vmap(proj)(x).reshape(tokens, a.num_heads, -1)

        q, k, v = heads(a.query_proj), heads(a.key_proj), heads(a.value_proj)
        if self.process_heads is not None:
            q, k, v = self.process_heads(q, k, v, places)
        # Out of bounds, where `drop` ignores them.
        at = jnp.where(count < length, places, jnp.full_like(places, self.max_length))
        keys = keys.at[at].set(k.astype(keys.dtype), mode="drop")
        values = values.at[at].set(v.astype(values.dtype), mode="drop")
        seen = jnp.arange(self.max_length, dtype=jnp.int32)[None] <= places[:, None]
        out = _attend(q, keys, values, seen)
        return jax.vmap(a.output_proj)(out.reshape(tokens, -1)), keys, values

    def _check(self, x: Array) -> int:
        n = len(self.batch_shape)
        if x.ndim != n + 2 or x.shape[:n] != self.batch_shape:
            shape = ", ".join(map(str, (*self.batch_shape, "tokens", "size")))
            raise ValueError(
                message(
                    f"KVCache was given an array of shape {x.shape}, but takes ({shape}).",
                    "every example of the batch has a place in the cache.",
                    "`KVCache(attention, max_length, batch_shape=…)`; a single token has "
                    "a token axis of size one.",
                )
            )
        tokens = x.shape[n]
        if tokens > self.max_length:
            raise ValueError(
                f"KVCache was given {tokens} tokens, and has room for {self.max_length}."
            )
        return tokens
