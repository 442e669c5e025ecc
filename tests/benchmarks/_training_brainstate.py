"""The networks of the examples in brainstate, as its users write them.

Its layers and its random keys; optax by hand, because its optimizers moved to another
package. Images have their channels last, as is its default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import optax
from brainstate import nn

from ._harness import Contender


def contenders(
    model: nn.Module, tx: optax.GradientTransformation, loss: Callable, *batch: Any
) -> Mapping[str, Contender]:
    params = model.states(brainstate.ParamState)

    def weights() -> dict:
        return {path: state.value for path, state in params.items()}

    opt_state = brainstate.ShortTermState(tx.init(weights()))

    @brainstate.transform.jit
    def step(*batch: Any) -> Any:
        with brainstate.environ.context(fit=True):
            grads, value = brainstate.transform.grad(
                lambda: loss(model, *batch), params, return_value=True
            )()
        updates, opt_state.value = tx.update(grads, opt_state.value, weights())
        for path, new in optax.apply_updates(weights(), updates).items():
            params[path].value = new
        return value

    last: list[Any] = []

    def once() -> None:
        last[:] = [step(*batch)]

    once()
    return {"brainstate": Contender(once, lambda: last[0])}


def size(model: nn.Module) -> int:
    params = model.states(brainstate.ParamState)
    return sum(x.size for x in jax.tree.leaves([s.value for s in params.values()]))


# -- transformer --------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, process: Callable):
        super().__init__()
        self.heads, self.process = heads, process
        self.projections = [nn.Linear(width, width, b_init=None) for _ in range(4)]

    def __call__(self, x: jax.Array) -> jax.Array:
        *projections, out = self.projections
        places = jnp.arange(x.shape[1])
        q, k, v = (f(x).reshape(*x.shape[:2], self.heads, -1) for f in projections)
        q, k, v = self.process(q, k, v, places)
        logits = jnp.einsum("bthd,blhd->bhtl", q / q.shape[-1] ** 0.5, k)
        seen = places[:, None] >= places
        logits = jnp.where(seen, logits, jnp.finfo(logits.dtype).min)
        y = jnp.einsum("bhtl,blhd->bthd", jax.nn.softmax(logits), v)
        return out(y.reshape(x.shape))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, process: Callable):
        super().__init__()
        self.norms = [nn.LayerNorm(width, epsilon=1e-5) for _ in range(2)]
        self.attention = Attention(width, heads, process)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norms[0](x))
        return x + self.down(jax.nn.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    def __init__(
        self, characters: int, process: Callable, width: int, heads: int, depth: int
    ):
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.blocks = [Block(width, heads, process) for _ in range(depth)]
        self.norm = nn.LayerNorm(width, epsilon=1e-5)
        self.head = nn.Linear(width, characters)

    def __call__(self, text: jax.Array) -> jax.Array:
        x = self.embedding(text)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# -- residual network ---------------------------------------------------------------


def _convolution(shape: tuple[int, ...], after: int, size: int, stride: int):
    pad = (size // 2, size // 2)
    return nn.Conv2d(shape, after, size, stride, padding=(pad, pad))


class ResBlock(nn.Module):
    def __init__(self, shape: tuple[int, ...], after: int, stride: int):
        super().__init__()
        first = _convolution(shape, after, 3, stride)
        self.out_size = first.out_size
        self.convolutions = [first, _convolution(self.out_size, after, 3, 1)]
        self.norms = [nn.BatchNorm2d(self.out_size, momentum=0.9) for _ in range(2)]
        self.shortcut = _convolution(shape, after, 1, stride)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            y = jax.nn.relu(norm(convolution(y)))
        return y + self.shortcut(x)


class ResNet(nn.Module):
    def __init__(self, shape: tuple[int, ...], classes: int, channels: tuple[int, ...]):
        super().__init__()
        self.pixels = nn.BatchNorm2d(shape, affine=False)
        self.blocks = []
        for i, after in enumerate(channels):
            self.blocks.append(ResBlock(shape, after, 1 if i == 0 else 2))
            shape = self.blocks[-1].out_size
        self.dropout = nn.Dropout(0.8)  # what is kept
        self.head = nn.Linear(channels[-1], classes)

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


class Classifier(nn.Module):
    """The network and the running statistics of the pixels."""

    def __init__(self, height: int, width: int, classes: int, statistics: Any):
        super().__init__()
        self.convolutions = [
            nn.Conv2d((height, width, 1), 32, 3, b_init=jnp.zeros(32)),
            nn.Conv2d((height // 2, width // 2, 32), 64, 3, b_init=jnp.zeros(64)),
        ]
        features = 64 * (height // 4) * (width // 4)
        self.pool = nn.MaxPool2d(2, 2, channel_axis=-1)
        self.hidden = nn.Linear(features, 128)
        self.dropout = nn.Dropout(0.8)  # what is kept
        self.head = nn.Linear(128, classes)
        self.pixels = brainstate.ShortTermState(statistics)

    def __call__(self, images: jax.Array) -> jax.Array:
        self.pixels.value = self.pixels.value.seen(images)
        x = self.pixels.value.normalise(images)
        x = jax.vmap(shifted)(x, brainstate.random.split_key(len(x)))
        for convolution in self.convolutions:
            x = self.pool(jax.nn.relu(convolution(x)))
        x = jax.nn.relu(self.hidden(x.reshape(len(x), -1)))
        return self.head(self.dropout(x))
