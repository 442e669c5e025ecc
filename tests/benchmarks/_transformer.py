"""A training step with many small arrays, where the price of a call shows.

Twelve layers of width 16: 63 arrays of weights, three times as many with the state of
the optimizer, and little to compute.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import optax

LAYERS, WIDTH, HEADS, VOCABULARY, LENGTH = 12, 16, 2, 32, 4

optimizer = optax.adamw(1e-3)


class Layer(eqx.Module):
    norm_attention: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm_mlp: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, key: jax.Array):
        key_attention, key_mlp = jax.random.split(key)
        self.norm_attention = eqx.nn.LayerNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=key_attention)
        self.norm_mlp = eqx.nn.LayerNorm(WIDTH)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 2 * WIDTH, 1, key=key_mlp)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.vmap(self.norm_attention)(x)
        x = x + self.attention(y, y, y)
        return x + jax.vmap(lambda v: self.mlp(self.norm_mlp(v)))(x)


class Transformer(eqx.Module):
    embedding: eqx.nn.Embedding
    layers: list[Layer]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, LAYERS + 2)
        self.embedding = eqx.nn.Embedding(VOCABULARY, WIDTH, key=keys[0])
        self.layers = [Layer(k) for k in keys[2:]]
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, key=keys[1])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = jax.vmap(self.embedding)(tokens)
        for layer in self.layers:
            x = layer(x)
        return jax.vmap(lambda v: self.head(self.norm(v)))(x)


def loss_fn(model: Transformer, tokens: jax.Array) -> jax.Array:
    logits, labels = model(tokens[:-1]), tokens[1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def advance(
    model: Transformer, opt_state: Any, tokens: jax.Array
) -> tuple[Transformer, Any, jax.Array]:
    """One step of training as plain Equinox has it."""
    loss, grads = eqx.filter_value_and_grad(loss_fn)(model, tokens)
    weights = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = optimizer.update(grads, opt_state, weights)
    return eqx.apply_updates(model, updates), opt_state, loss


def start() -> tuple[Transformer, Any, jax.Array]:
    """A model, the state of its optimizer, and a batch."""
    model = Transformer(jax.random.key(0))
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    tokens = jax.random.randint(jax.random.key(1), (LENGTH,), 0, VOCABULARY)
    return model, opt_state, tokens
