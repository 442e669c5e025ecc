"""Train a convolutional network to tell images apart.

Everything that changes during training sits in a cell: the network in a `Param`, and
the state of the optimizer, the running statistics of the pixels and the random key each
in a `State`. The step of training reads and writes them; nothing is threaded through it.
The same step in plain Equinox stands below it in a comment.

    python examples/train_classifier.py
    python examples/train_classifier.py --data fashion-mnist --epochs 3

The images are scikit-learn's digits (1797 images of 8 by 8 pixels, which come with it),
or Fashion-MNIST where Debian's package `dataset-fashion-mnist` is installed. The learning
curve is written to `--out`.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from images import DATA, batches
from tqdm import tqdm

import statefun as sf

# -- model --------------------------------------------------------------------------


class Net(eqx.Module):
    """Two convolutions and two linear layers; an ordinary Equinox module."""

    convolutions: list[eqx.nn.Conv2d]
    pool: eqx.nn.MaxPool2d
    hidden: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, height, width, classes, key):
        keys = jax.random.split(key, 4)
        self.convolutions = [
            eqx.nn.Conv2d(1, 32, 3, padding=1, key=keys[0]),
            eqx.nn.Conv2d(32, 64, 3, padding=1, key=keys[1]),
        ]
        self.pool = eqx.nn.MaxPool2d(2, 2)
        features = 64 * (height // 4) * (width // 4)
        self.hidden = eqx.nn.Linear(features, 128, key=keys[2])
        self.dropout = eqx.nn.Dropout(0.2)
        self.head = eqx.nn.Linear(128, classes, key=keys[3])

    def __call__(self, image, key=None):
        """Without a key nothing is dropped."""
        x = image
        for convolution in self.convolutions:
            x = self.pool(jax.nn.relu(convolution(x)))
        x = jax.nn.relu(self.hidden(x.reshape(-1)))
        return self.head(self.dropout(x, key=key, inference=key is None))


class Statistics(eqx.Module):
    """Mean and variance of all pixels that were seen so far."""

    count: jax.Array
    mean: jax.Array
    square: jax.Array  # sum of the squared distances to the mean

    def __init__(self):
        self.count = self.mean = self.square = jnp.zeros(())

    def seen(self, x):
        """With a batch more (Chan, Golub and LeVeque 1979: exact, in one pass)."""
        count, mean = jnp.array(float(x.size)), x.mean()
        total, delta = self.count + count, mean - self.mean
        square = jnp.sum((x - mean) ** 2) + delta**2 * self.count * count / total
        new = total, self.mean + delta * count / total, self.square + square
        return eqx.tree_at(lambda s: (s.count, s.mean, s.square), self, new)

    def normalise(self, x):
        return (x - self.mean) * jax.lax.rsqrt(self.square / self.count + 1e-6)


def shifted(image, key):
    """The image, moved by up to one pixel in each direction."""
    padded = jnp.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
    row, column = jax.random.randint(key, (2,), 0, 3)
    return jax.lax.dynamic_slice(padded, (0, row, column), image.shape)


def loss_fn(net, images, labels, key):
    """Cross entropy, a pure function of the network."""
    shift_key, drop_key = jax.random.split(key)
    images = jax.vmap(shifted)(images, jax.random.split(shift_key, len(images)))
    logits = jax.vmap(net)(images, jax.random.split(drop_key, len(images)))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# -- training -----------------------------------------------------------------------


def make_optimizer(steps):
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps)),
    )


def make_trainer(net, optimizer, random_key):
    """The step of training, and what tells classes; they share their cells."""
    model = sf.Param(net, name="model")
    opt_state = sf.State(optimizer.init(eqx.filter(net, eqx.is_array)), name="adamw")
    stats = sf.State(Statistics(), name="pixels")
    key = sf.State(random_key, name="key")

    @sf.filter_jit
    def train_step(images, labels):
        key.value, step_key = jax.random.split(key.value)
        stats.value = stats.value.seen(images)
        loss, grads = eqx.filter_value_and_grad(loss_fn)(
            model.value, stats.value.normalise(images), labels, step_key
        )
        updates, opt_state.value = optimizer.update(
            grads, opt_state.value, eqx.filter(model.value, eqx.is_array)
        )
        model.value = eqx.apply_updates(model.value, updates)
        return loss

    # In plain Equinox, called as `model, opt_state, stats, key, loss = train_step(...)`:
    # @eqx.filter_jit
    # def train_step(model, opt_state, stats, key, images, labels):
    #     key, step_key = jax.random.split(key)
    #     stats = stats.seen(images)
    #     batch = stats.normalise(images), labels, step_key
    #     loss, grads = eqx.filter_value_and_grad(loss_fn)(model, *batch)
    #     weights = eqx.filter(model, eqx.is_array)
    #     updates, opt_state = optimizer.update(grads, opt_state, weights)
    #     return eqx.apply_updates(model, updates), opt_state, stats, key, loss

    @sf.filter_jit
    def classify(images):
        return jax.vmap(model.value)(stats.value.normalise(images)).argmax(axis=-1)

    return train_step, classify


def accuracy(classify, images, labels, size=500):
    found = [classify(images[i : i + size]) for i in range(0, len(images), size)]
    return float(np.mean(np.concatenate(found) == labels))


def train(data, epochs, batch_size, seed):
    """Trains a network.

    **Returns:** the loss of every step, and the accuracy on the test images after every
    epoch.
    """
    classes = int(data.train_labels.max()) + 1
    steps = epochs * (len(data.train_images) // batch_size)
    net_key, step_key = jax.random.split(jax.random.key(seed))
    net = Net(*data.train_images.shape[2:], classes, net_key)
    train_step, classify = make_trainer(net, make_optimizer(steps), step_key)

    rng = np.random.default_rng(seed)
    losses, accuracies = [], []
    with tqdm(total=steps, unit="step") as progress:
        for _ in range(epochs):
            for batch in batches(*data[:2], batch_size, rng):
                losses.append(train_step(*batch))
                progress.update()
            accuracies.append(accuracy(classify, *data[2:]))
            progress.set_postfix(
                loss=f"{losses[-1]:.3f}", accuracy=f"{accuracies[-1]:.3f}"
            )
    return np.array(losses), accuracies


def plot(losses, accuracies, out):
    import matplotlib

    matplotlib.use("Agg")  # draws to a file; needs no screen
    import matplotlib.pyplot as plt

    per_epoch = len(losses) // len(accuracies)
    epochs = 1 + np.arange(len(accuracies))
    steps = (1 + np.arange(len(losses))) / per_epoch
    means = losses.reshape(len(accuracies), per_epoch).mean(axis=1)

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.semilogy(steps, losses, color="tab:blue", alpha=0.3, label="each step")
    left.semilogy(epochs - 0.5, means, color="tab:blue", marker=".", label="mean")
    left.set(xlabel="epoch", ylabel="training loss")
    left.set_title(f"in the end {means[-1]:.4f}", fontsize="medium")
    left.legend()
    right.plot(epochs, accuracies, color="tab:orange", marker=".")
    right.set(xlabel="epoch", ylabel="accuracy on the test set")
    right.set_title(f"in the end {accuracies[-1]:.4f}", fontsize="medium")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", choices=sorted(DATA), default="digits")
    parser.add_argument("--epochs", type=int, help="times to go through the images")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("learning_curve.png"))
    options = parser.parse_args(argv)

    load, epochs = DATA[options.data]
    losses, accuracies = train(
        load(), options.epochs or epochs, options.batch_size, options.seed
    )
    plot(losses, accuracies, options.out)
    print(f"learning curve: {options.out}")
    print(f"test accuracy: {accuracies[-1]:.4f}")


if __name__ == "__main__":
    main()
