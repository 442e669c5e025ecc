"""Steps of training of the examples' networks, beside the same networks elsewhere.

    python -m tests.benchmarks --only "step of the"

Ours are the examples' own networks and training steps. In plain Equinox it is the same
network (`equinox.nn.BatchNorm` in place of ours), with everything passed in and out of
`eqx.filter_jit`. Flax NNX and brainstate have the network in their own layers, with as
many weights. Everybody has the same optax transformation, batch and precision.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import statefun as sf

from ._harness import OURS, Contender, Row, calls
from .bench_core import EQUINOX, _has

CLASSES, HEIGHT, WIDTH = 10, 8, 8  # scikit-learn's digits
CHARACTERS, SIZES = 104, {"width": 64, "heads": 4, "depth": 2}


def _example(name: str) -> ModuleType:
    folder = str(Path(__file__).parents[2] / "examples")
    if folder not in sys.path:  # as Python does for a script there
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def _ours(step: Callable[..., Any], *batch: Any) -> Contender:
    last: list[Any] = []

    def once() -> None:
        last[:] = [step(*batch)]

    once()
    return Contender(once, lambda: last[0])


def _threaded(step: Callable[..., tuple], state: tuple, *batch: Any) -> Contender:
    """A step that takes and returns what changes, its loss at the end."""

    def once() -> None:
        nonlocal state, loss
        *state, loss = step(*state, *batch)

    loss = None
    once()
    return Contender(once, lambda: loss)


def _peers(
    found: dict[str, Contender],
    size: int,
    model: Callable[[ModuleType], Any],
    tx: optax.GradientTransformation,
    loss: Callable,
    *batch: Any,
) -> dict[str, Contender]:
    for library, module in (("flax", "nnx"), ("brainstate", "brainstate")):
        if not _has(library):
            continue
        peer = importlib.import_module(f"._training_{module}", __package__)
        net = model(peer)
        if peer.size(net) != size:
            raise ValueError(f"{peer.size(net)} weights in {library}, and {size} here")
        found |= peer.contenders(net, tx, loss, *batch)
    return found


def _weights(net: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(eqx.filter(net, eqx.is_inexact_array)))


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _images() -> tuple[jax.Array, jax.Array]:
    """A batch, with the channels last."""
    key = jax.random.key(2)
    images = jax.random.uniform(key, (64, HEIGHT, WIDTH, 1), maxval=16.0)
    return images, jax.random.randint(key, (64,), 0, CLASSES)


def _channels_first(images: jax.Array) -> jax.Array:
    return jnp.moveaxis(images, -1, 1)


# -- transformer --------------------------------------------------------------------


def _transformer(peers: bool) -> Mapping[str, Contender]:
    example = _example("character_transformer")
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))
    text = jax.random.randint(jax.random.key(1), (16, 129), 0, CHARACTERS)

    net = example.Transformer(CHARACTERS, **SIZES, key=jax.random.key(0))
    model = sf.Param(net)
    optimizer = sf.Optimizer(tx, model)

    @sf.filter_jit
    def step(text: jax.Array) -> jax.Array:
        loss, grads = sf.filter_value_and_grad(
            lambda: example.loss_fn(model.value, text), wrt=model
        )()
        optimizer.update(grads)
        return loss

    @eqx.filter_jit
    def plain(net: Any, opt_state: Any, text: jax.Array) -> tuple:
        loss, grads = eqx.filter_value_and_grad(example.loss_fn)(net, text)
        weights = eqx.filter(net, eqx.is_inexact_array)
        updates, opt_state = tx.update(grads, opt_state, weights)
        return eqx.apply_updates(net, updates), opt_state, loss

    opt_state = tx.init(eqx.filter(net, eqx.is_inexact_array))
    found = {
        OURS: _ours(step, text),
        EQUINOX: _threaded(plain, (net, opt_state), text),
    }
    if not peers:
        return found

    def peer(library: ModuleType) -> Any:
        return library.Transformer(CHARACTERS, example.with_places, **SIZES)

    def loss(model: Any, text: jax.Array) -> jax.Array:
        return _cross_entropy(model(text[:, :-1]), text[:, 1:])

    return _peers(found, _weights(net), peer, tx, loss, text)


# -- residual network ---------------------------------------------------------------


class _Threaded(eqx.Module):
    """The example's network with Equinox's layers, which take and return their state."""

    net: Any

    def __init__(self, net: Any):
        def equinox(layer: Any) -> Any:
            if isinstance(layer, sf.nn.BatchNorm):
                return eqx.nn.BatchNorm(
                    *(layer.input_size, "batch"),
                    channelwise_affine=layer.channelwise_affine,
                    momentum=layer.momentum,
                    mode="batch",
                )
            return eqx.nn.Dropout(layer.p)

        self.net = jax.tree.map(
            lambda x: equinox(x) if _is_ours(x) else x, net, is_leaf=_is_ours
        )

    def __call__(self, image: jax.Array, state: Any, key: jax.Array) -> tuple:
        x, state = self.net.pixels(image, state)
        for block in self.net.blocks:
            y = x
            for convolution, norm in zip(block.convolutions, block.norms, strict=True):
                y, state = norm(convolution(y), state)
                y = jax.nn.relu(y)
            x = y + block.shortcut(x)
        return self.net.head(self.net.dropout(x.mean((1, 2)), key=key)), state


def _is_ours(x: Any) -> bool:
    return isinstance(x, sf.nn.BatchNorm | sf.nn.Dropout)


def _resnet(peers: bool) -> Mapping[str, Contender]:
    example = _example("resnet")
    tx = optax.adamw(3e-3, weight_decay=1e-2)
    channels = (16, 32, 64)
    images, labels = _images()

    net = example.ResNet(CLASSES, channels, rng=sf.Rng(0))
    size = _weights(net)
    model = sf.Param(net)
    optimizer = sf.Optimizer(tx, model)
    step, _ = example.make_trainer(model, optimizer)

    threaded, state = eqx.nn.make_with_state(_Threaded)(net)
    opt_state = tx.init(eqx.filter(threaded, eqx.is_inexact_array))

    def plain_loss(net: Any, state: Any, images: Any, labels: Any, key: Any) -> tuple:
        logits, state = jax.vmap(
            net, in_axes=(0, None, 0), out_axes=(0, None), axis_name="batch"
        )(images, state, jax.random.split(key, len(images)))
        return _cross_entropy(logits, labels), state

    @eqx.filter_jit
    def plain(
        net: Any, state: Any, opt_state: Any, key: Any, images: Any, labels: Any
    ) -> tuple:
        key, step_key = jax.random.split(key)
        (loss, state), grads = eqx.filter_value_and_grad(plain_loss, has_aux=True)(
            net, state, images, labels, step_key
        )
        weights = eqx.filter(net, eqx.is_inexact_array)
        updates, opt_state = tx.update(grads, opt_state, weights)
        return eqx.apply_updates(net, updates), state, opt_state, key, loss

    first = _channels_first(images)
    start = threaded, state, opt_state, jax.random.key(0)
    found = {
        OURS: _ours(step, first, labels),
        EQUINOX: _threaded(plain, start, first, labels),
    }
    if not peers:
        return found

    def peer(library: ModuleType) -> Any:
        if library.__name__.endswith("nnx"):
            return library.ResNet(CLASSES, channels)
        return library.ResNet(images.shape[1:], CLASSES, channels)

    def loss(model: Any, images: Any, labels: Any) -> jax.Array:
        return _cross_entropy(model(images), labels)

    return _peers(found, size, peer, tx, loss, images, labels)


# -- classifier ---------------------------------------------------------------------


def _classifier(peers: bool) -> Mapping[str, Contender]:
    example = _example("train_classifier")
    tx = example.make_optimizer(10_000)
    images, labels = _images()

    net = example.Net(HEIGHT, WIDTH, CLASSES, jax.random.key(0))
    step, _ = example.make_trainer(net, tx, jax.random.key(1))

    @eqx.filter_jit
    def plain(
        net: Any, opt_state: Any, stats: Any, key: Any, images: Any, labels: Any
    ) -> tuple:
        key, step_key = jax.random.split(key)
        stats = stats.seen(images)
        batch = stats.normalise(images), labels, step_key
        loss, grads = eqx.filter_value_and_grad(example.loss_fn)(net, *batch)
        weights = eqx.filter(net, eqx.is_array)
        updates, opt_state = tx.update(grads, opt_state, weights)
        return eqx.apply_updates(net, updates), opt_state, stats, key, loss

    first = _channels_first(images)
    opt_state = tx.init(eqx.filter(net, eqx.is_array))
    start = net, opt_state, example.Statistics(), jax.random.key(1)
    found = {
        OURS: _ours(step, first, labels),
        EQUINOX: _threaded(plain, start, first, labels),
    }
    if not peers:
        return found

    def peer(library: ModuleType) -> Any:
        return library.Classifier(HEIGHT, WIDTH, CLASSES, example.Statistics())

    def loss(model: Any, images: Any, labels: Any) -> jax.Array:
        return _cross_entropy(model(images), labels)

    return _peers(found, _weights(net), peer, tx, loss, images, labels)


ROWS = [
    Row("step of the transformer", calls(_transformer), {}),
    Row("step of the residual network", calls(_resnet), {}),
    Row("step of the classifier", calls(_classifier), {}),
]
