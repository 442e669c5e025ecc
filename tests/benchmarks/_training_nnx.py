"""The networks of the examples in Flax NNX, as its users write them.

Its layers, its optimizer, its random keys. Images have their channels last, which is how
its convolutions have them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ._harness import Contender


def contenders(
    model: nnx.Module, tx: optax.GradientTransformation, loss: Callable, *batch: Any
) -> Mapping[str, Contender]:
    """`nnx.jit` as it is, and with `cached_partial`, for `loss(model, *batch)`."""

    def step(model: Any, optimizer: Any, *batch: Any) -> Any:
        value, grads = nnx.value_and_grad(loss)(model, *batch)
        optimizer.update(model, grads)
        return value

    def started(partial: bool) -> Contender:
        mine = nnx.clone(model)
        optimizer = nnx.Optimizer(mine, tx, wrt=nnx.Param)
        jitted = nnx.jit(step)
        if partial:
            call = nnx.cached_partial(jitted, mine, optimizer)
        else:

            def call(*batch: Any) -> Any:
                return jitted(mine, optimizer, *batch)

        last: list[Any] = []

        def once() -> None:
            last[:] = [call(*batch)]

        once()
        return Contender(once, lambda: last[0])

    return {"nnx.jit": started(False), "nnx.cached_partial": started(True)}


def stepper(
    model: nnx.Module, tx: optax.GradientTransformation, loss: Callable
) -> Callable[..., Any]:
    """A function of a batch that takes a step of training."""
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, *batch: Any) -> Any:
        value, grads = nnx.value_and_grad(loss)(model, *batch)
        optimizer.update(model, grads)
        return value

    return lambda *batch: step(model, optimizer, *batch)


def size(model: nnx.Module) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


# -- transformer --------------------------------------------------------------------


class Attention(nnx.Module):
    def __init__(self, width: int, heads: int, process: Callable, rngs: nnx.Rngs):
        self.heads, self.process = heads, process
        self.query, self.key, self.value, self.out = nnx.List(
            [nnx.Linear(width, width, use_bias=False, rngs=rngs) for _ in range(4)]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*x.shape[:2], self.heads, -1)
        places = jnp.arange(x.shape[1])
        q, k, v = (f(x).reshape(shape) for f in (self.query, self.key, self.value))
        q, k, v = self.process(q, k, v, places)
        logits = jnp.einsum("bthd,blhd->bhtl", q / q.shape[-1] ** 0.5, k)
        seen = places[:, None] >= places
        logits = jnp.where(seen, logits, jnp.finfo(logits.dtype).min)
        out = jnp.einsum("bhtl,blhd->bthd", jax.nn.softmax(logits), v)
        return self.out(out.reshape(x.shape))


class Block(nnx.Module):
    def __init__(self, width: int, heads: int, process: Callable, rngs: nnx.Rngs):
        self.norms = nnx.List(
            [nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs) for _ in range(2)]
        )
        self.attention = Attention(width, heads, process, rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norms[0](x))
        return x + self.down(jax.nn.gelu(self.up(self.norms[1](x))))


class Transformer(nnx.Module):
    def __init__(
        self, characters: int, process: Callable, width: int, heads: int, depth: int
    ):
        rngs = nnx.Rngs(0)
        self.embedding = nnx.Embed(characters, width, rngs=rngs)
        self.blocks = nnx.List(
            [Block(width, heads, process, rngs) for _ in range(depth)]
        )
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(width, characters, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        x = self.embedding(text)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Stacked(nnx.Module):
    """Blocks as the documentation of NNX stacks them, in a scan."""

    def __init__(self, depth: int, width: int, heads: int):
        def process(q: Any, k: Any, v: Any, places: Any) -> tuple:
            return q, k, v

        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs: nnx.Rngs) -> Block:
            return Block(width, heads, process, rngs)

        self.blocks = create(nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x: jax.Array, block: Block) -> jax.Array:
            return block(x)

        return forward(x, self.blocks)


# -- residual network ---------------------------------------------------------------


def _convolution(before: int, after: int, size: int, stride: int, rngs: nnx.Rngs):
    pad = (size // 2, size // 2)
    return nnx.Conv(
        *(before, after, (size, size), stride),
        padding=(pad, pad),
        use_bias=False,
        rngs=rngs,
    )


class ResBlock(nnx.Module):
    def __init__(self, before: int, after: int, stride: int, rngs: nnx.Rngs):
        self.convolutions = nnx.List(
            [
                _convolution(before, after, 3, stride, rngs),
                _convolution(after, after, 3, 1, rngs),
            ]
        )
        self.norms = nnx.List(
            [nnx.BatchNorm(after, momentum=0.9, rngs=rngs) for _ in range(2)]
        )
        self.shortcut = _convolution(before, after, 1, stride, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            y = jax.nn.relu(norm(convolution(y)))
        return y + self.shortcut(x)


class ResNet(nnx.Module):
    def __init__(self, classes: int, channels: tuple[int, ...]):
        rngs = nnx.Rngs(0)
        self.pixels = nnx.BatchNorm(1, use_bias=False, use_scale=False, rngs=rngs)
        self.blocks = nnx.List(
            [
                ResBlock(before, after, 1 if before == 1 else 2, rngs)
                for before, after in zip((1, *channels), channels, strict=False)
            ]
        )
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(channels[-1], classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.pixels(images)
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x.mean(axis=(1, 2))))


# -- classifier ---------------------------------------------------------------------


def shifted(image: jax.Array, key: jax.Array) -> jax.Array:
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    row, column = jax.random.randint(key, (2,), 0, 3)
    return jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)


class Classifier(nnx.Module):
    """The network and the running statistics of the pixels."""

    def __init__(self, height: int, width: int, classes: int, statistics: Any):
        rngs = nnx.Rngs(0)
        self.convolutions = nnx.List(
            [nnx.Conv(*pair, (3, 3), rngs=rngs) for pair in ((1, 32), (32, 64))]
        )
        features = 64 * (height // 4) * (width // 4)
        self.hidden = nnx.Linear(features, 128, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(128, classes, rngs=rngs)
        self.pixels = nnx.Variable(statistics)
        self.rngs = rngs

    def __call__(self, images: jax.Array) -> jax.Array:
        self.pixels.set_value(self.pixels.get_value().seen(images))
        x = self.pixels.get_value().normalise(images)
        x = jax.vmap(shifted)(x, jax.random.split(self.rngs(), len(x)))
        for convolution in self.convolutions:
            x = nnx.max_pool(jax.nn.relu(convolution(x)), (2, 2), strides=(2, 2))
        x = jax.nn.relu(self.hidden(x.reshape(len(x), -1)))
        return self.head(self.dropout(x))
