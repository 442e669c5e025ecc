"""Deep transformers as a stack of layers, beside the same layers elsewhere.

    python -m tests.benchmarks --only layers

Ours is `sf.nn.Stack`. By hand it is `jax.lax.scan` over the stacked arrays in plain JAX;
unrolled, a Python loop over separate layers in plain Equinox; and Flax NNX scans over a
module that it has made with `nnx.vmap`. Everybody has the same layers, as many weights,
and adamw.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import statefun as sf

from ._harness import OURS, Contender, Effort, Row, Samples, calls, first_calls
from .bench_core import _has

WIDTH, HEADS, BATCH, LENGTH = 64, 4, 8, 64
UNROLLED, BY_HAND = "eqx.filter_jit, unrolled", "jax.lax.scan by hand"

tx = optax.adamw(1e-3)


class Block(eqx.Module):
    """A layer of a transformer, for a whole batch: the arithmetic of NNX's layers."""

    scales: list[jax.Array]
    offsets: list[jax.Array]
    attention: list[jax.Array]
    mlp: list[jax.Array]
    biases: list[jax.Array]

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key, 6)
        normal = jax.nn.initializers.lecun_normal()
        self.scales = [jnp.ones(WIDTH) for _ in range(2)]
        self.offsets = [jnp.zeros(WIDTH) for _ in range(2)]
        self.attention = [normal(key, (WIDTH, WIDTH)) for key in keys[:4]]
        sizes = WIDTH, 4 * WIDTH
        self.mlp = [normal(keys[4], sizes), normal(keys[5], sizes[::-1])]
        self.biases = [jnp.zeros(n) for n in sizes[::-1]]

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attend(self.norm(x, 0))
        hidden = jax.nn.gelu(self.norm(x, 1) @ self.mlp[0] + self.biases[0])
        return x + hidden @ self.mlp[1] + self.biases[1]

    def norm(self, x: jax.Array, i: int) -> jax.Array:
        mean = x.mean(-1, keepdims=True)
        variance = jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean)
        scale = jax.lax.rsqrt(jnp.maximum(variance, 0) + 1e-5) * self.scales[i]
        return (x - mean) * scale + self.offsets[i]

    def attend(self, x: jax.Array) -> jax.Array:
        q, k, v = ((x @ w).reshape(*x.shape[:2], HEADS, -1) for w in self.attention[:3])
        logits = jnp.einsum("bthd,blhd->bhtl", q / q.shape[-1] ** 0.5, k)
        places = jnp.arange(x.shape[1])
        seen = places[:, None] >= places
        logits = jnp.where(seen, logits, jnp.finfo(logits.dtype).min)
        out = jnp.einsum("bhtl,blhd->bthd", jax.nn.softmax(logits), v)
        return out.reshape(x.shape) @ self.attention[3]


class Layer(eqx.Module):
    """A layer as statefun has it: its weights are a Param."""

    block: sf.Param

    def __init__(self, key: jax.Array):
        self.block = sf.Param(Block(key))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.block.value(x)


def batch() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (BATCH, LENGTH, WIDTH))


def keys(depth: int) -> jax.Array:
    return jax.random.split(jax.random.key(0), depth)


def ours(depth: int, remat: Any = None) -> Callable[[jax.Array], jax.Array]:
    stack = sf.nn.Stack(Layer, depth, key=jax.random.key(0))
    optimizer = sf.Optimizer(tx, stack)

    @sf.filter_jit
    def step(x: jax.Array) -> jax.Array:
        loss, grads = sf.filter_value_and_grad(
            lambda x: jnp.square(stack(x, remat=remat)).mean(), wrt=stack
        )(x)
        optimizer.update(grads)
        return loss

    return step


def threaded(model: Any, run: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """A step of plain Equinox or JAX, from where the last one has left off."""
    state = model, tx.init(model)

    @jax.jit
    def advance(model: Any, opt_state: Any, x: jax.Array) -> tuple:
        loss, grads = jax.value_and_grad(lambda m: jnp.square(run(m, x)).mean())(model)
        updates, opt_state = tx.update(grads, opt_state, model)
        return optax.apply_updates(model, updates), opt_state, loss

    def step(x: jax.Array) -> jax.Array:
        nonlocal state
        *state, loss = advance(*state, x)
        return loss

    return step


def unrolled(depth: int) -> Callable[[jax.Array], jax.Array]:
    def run(blocks: Any, x: jax.Array) -> jax.Array:
        for block in blocks:
            x = block(x)
        return x

    return threaded([Block(key) for key in keys(depth)], run)


def by_hand(depth: int) -> Callable[[jax.Array], jax.Array]:
    def run(blocks: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, block: (block(x), None), x, blocks)[0]

    return threaded(jax.vmap(Block)(keys(depth)), run)


def nnx_model(depth: int) -> Any:
    peer = importlib.import_module("._training_nnx", __package__)
    return peer.Stacked(depth, WIDTH, HEADS)


def _contender(step: Callable[[jax.Array], Any]) -> Contender:
    x, last = batch(), []

    def once() -> None:
        last[:] = [step(x)]

    once()
    return Contender(once, lambda: last[0])


def _loss(model: Any, x: jax.Array) -> jax.Array:
    return jnp.square(model(x)).mean()


def _steps(depth: int, peers: bool) -> Mapping[str, Contender]:
    found = {OURS: _contender(ours(depth)), BY_HAND: _contender(by_hand(depth))}
    if peers:
        found[UNROLLED] = _contender(unrolled(depth))
    if peers and _has("flax"):
        peer = importlib.import_module("._training_nnx", __package__)
        scans = peer.contenders(nnx_model(depth), tx, _loss, batch())
        found |= {f"{name}, nnx.scan": call for name, call in scans.items()}
    return found


class _Made(dict[str, Callable[[], Callable[[], Any]]]):
    """First calls by name, each made with its model when it is asked for: making them is
    no part of the call, and nobody's model is there while another one's is measured."""

    def __getitem__(self, name: str) -> Callable[[], Any]:  # type: ignore[override]
        return super().__getitem__(name)()


def _first(depth: int) -> Mapping[str, Callable[[], Any]]:
    x = batch()
    makers: dict[str, Any] = {OURS: ours, BY_HAND: by_hand, UNROLLED: unrolled}
    if _has("flax"):
        peer = importlib.import_module("._training_nnx", __package__)
        makers["nnx.jit, nnx.scan"] = lambda n: peer.stepper(nnx_model(n), tx, _loss)

    def made(make: Any) -> Callable[[], Any]:
        step = make(depth)
        return lambda: step(x)

    return _Made({name: functools.partial(made, m) for name, m in makers.items()})


def _temporaries(remat: Any, layers: float, effort: Effort) -> Samples:
    """Megabytes of temporaries, beside those that so many more layers would take."""
    depth = 36
    whole, less = (_temp(ours(n)) for n in (depth, depth // 2))
    layer = (whole - less) / (depth - depth // 2)
    mine = _temp(ours(depth, remat))
    return {
        OURS: [mine],
        f"{layers:g} layers' worth": [layers * layer],
        "remat=None": [whole],
    }


def _temp(step: Any) -> float:
    compiled = step.lower(batch()).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def _memory(remat: Any, layers: float, budgets: Mapping[str, float]) -> Row:
    return Row(
        f"temporaries of 36 layers, remat={remat!r}",
        functools.partial(_temporaries, remat, layers),
        budgets,
        unit="MB",
    )


ROWS = [
    Row(
        "first call, 12 layers",
        first_calls(functools.partial(_first, 12)),
        {UNROLLED: 0.40},
    ),
    Row("first call, 48 layers", first_calls(functools.partial(_first, 48)), {}),
    Row(
        "step, 12 layers",
        calls(functools.partial(_steps, 12)),
        {BY_HAND: 1.05},
    ),
    Row(
        "step, 48 layers",
        calls(functools.partial(_steps, 48)),
        {BY_HAND: 1.05},
    ),
    _memory("sqrt", 15, {"15 layers' worth": 1.0}),  # 2.5 * sqrt(36)
    _memory("each", 15, {}),
    _memory(4, 15, {}),
]
