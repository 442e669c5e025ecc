"""Train a residual network with batch normalisation.

The running statistics of `sf.nn.BatchNorm` and the random key of `sf.nn.Dropout` are
States inside the network. It is called like a function, in training as in evaluation:
nothing is passed in beside the images, and nothing comes back beside the logits.
`sf.nn.inference_mode` gives a view of the same network that uses the running statistics
and drops nothing.

    python examples/resnet.py
    python examples/resnet.py --epochs 2
    python examples/resnet.py --data fashion-mnist

Of the digits it was not trained on it tells more than 0.9 after two epochs (the second
line), and more than 0.97 after the 25 of the first line. The learning curve is written to
`--out`, with test images that were taken for others.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import optax
from images import DATA, batches
from tqdm import tqdm

import statefun as sf

# -- model --------------------------------------------------------------------------


def convolution(channels_in, channels_out, size, stride, key):
    return eqx.nn.Conv2d(
        *(channels_in, channels_out, size, stride),
        padding=size // 2,
        use_bias=False,  # the normalisation behind it has one
        key=key,
    )


class Block(eqx.Module):
    """Two convolutions, and a way round them."""

    convolutions: list[eqx.nn.Conv2d]
    norms: list[sf.nn.BatchNorm]
    shortcut: eqx.nn.Conv2d

    def __init__(self, channels_in, channels_out, stride, key):
        keys = jax.random.split(key, 3)
        self.convolutions = [
            convolution(channels_in, channels_out, 3, stride, keys[0]),
            convolution(channels_out, channels_out, 3, 1, keys[1]),
        ]
        self.norms = [sf.nn.BatchNorm(channels_out, momentum=0.9) for _ in range(2)]
        self.shortcut = convolution(channels_in, channels_out, 1, stride, keys[2])

    def __call__(self, x):
        y = x
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            y = jax.nn.relu(norm(jax.vmap(convolution)(y)))
        return y + jax.vmap(self.shortcut)(x)


class ResNet(eqx.Module):
    """From images, of shape `(batch, 1, height, width)`, to logits."""

    pixels: sf.nn.BatchNorm  # brings them to mean zero and variance one
    blocks: list[Block]
    dropout: sf.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, classes, channels=(16, 32, 64), *, rng):
        self.pixels = sf.nn.BatchNorm(1, channelwise_affine=False)
        self.blocks = [
            Block(before, after, stride=1 if before == 1 else 2, key=rng())
            for before, after in zip((1, *channels), channels, strict=False)
        ]
        self.dropout = sf.nn.Dropout(0.2, rng=rng)
        self.head = eqx.nn.Linear(channels[-1], classes, key=rng())

    def __call__(self, images):
        x = self.pixels(images)
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(self.dropout(x.mean(axis=(2, 3))))


def loss_fn(net, images, labels):
    logits = net(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# -- training -----------------------------------------------------------------------


def make_trainer(model, optimizer):
    """The step of training, and what tells classes; they share their States."""
    evaluated = sf.nn.inference_mode(model)

    @sf.filter_jit
    def train_step(images, labels):
        loss, grads = sf.filter_value_and_grad(
            lambda: loss_fn(model.value, images, labels), wrt=model
        )()
        optimizer.update(grads)
        return loss

    @sf.filter_jit
    def classify(images):
        return evaluated.value(images).argmax(axis=-1)

    return train_step, classify


def test(classify, images, labels, size=500):
    """What the images are taken for, and how often that is right."""
    accuracy = sf.metrics.Accuracy()
    found = []
    for start in range(0, len(images), size):
        found.append(classify(images[start : start + size]))
        accuracy.update(found[-1], labels[start : start + size])
    return np.concatenate(found), float(accuracy.compute())


def train(data, epochs, batch_size, seed):
    """Trains a network.

    **Returns:** the mean loss and the accuracy on the test images of every epoch, and what
    the test images are taken for in the end.
    """
    steps = epochs * (len(data.train_images) // batch_size)
    classes = int(data.train_labels.max()) + 1
    model = sf.Param(ResNet(classes, rng=sf.Rng(seed)), name="resnet")
    schedule = optax.cosine_decay_schedule(3e-3, steps)
    optimizer = sf.Optimizer(optax.adamw(schedule, weight_decay=1e-2), model)
    train_step, classify = make_trainer(model, optimizer)

    order = np.random.default_rng(seed)
    loss = sf.metrics.Mean()
    losses, accuracies = [], []
    with tqdm(total=steps, unit="step") as progress:
        for _ in range(epochs):
            for batch in batches(*data[:2], batch_size, order):
                loss.update(train_step(*batch))
                progress.update()
            losses.append(float(loss.compute()))
            loss.reset()
            found, accuracy = test(classify, *data[2:])
            accuracies.append(accuracy)
            progress.set_postfix(loss=f"{losses[-1]:.3f}", accuracy=f"{accuracy:.3f}")
    return losses, accuracies, found


def plot(losses, accuracies, images, labels, found, out):
    import matplotlib

    matplotlib.use("Agg")  # draws to a file; needs no screen
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(10, 3.5), layout="constrained")
    left, middle, right = figure.subfigures(1, 3)
    epochs = 1 + np.arange(len(losses))
    curves = (
        (left, losses, "tab:blue", "mean training loss", "log"),
        (middle, accuracies, "tab:orange", "accuracy on the test set", "linear"),
    )
    for part, values, colour, label, scale in curves:
        axes = part.subplots()
        axes.plot(epochs, values, color=colour, marker=".")
        axes.set(xlabel="epoch", ylabel=label, yscale=scale)
        axes.set_title(f"in the end {values[-1]:.4f}", fontsize="medium")
        axes.grid(alpha=0.3)

    wrong = np.flatnonzero(found != labels)
    right.suptitle(f"{len(wrong)} of {len(labels)} taken for others", fontsize="medium")
    for axes in right.subplots(3, 4).flat:
        axes.set_axis_off()
    for axes, i in zip(right.axes, wrong, strict=False):
        axes.imshow(images[i, 0], cmap="gray_r")
        axes.set_title(f"{labels[i]} as {found[i]}", fontsize="small")
    figure.savefig(out, dpi=120)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", choices=sorted(DATA), default="digits")
    parser.add_argument("--epochs", type=int, help="times to go through the images")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("resnet.png"))
    options = parser.parse_args(argv)

    load, epochs = DATA[options.data]
    data = load()
    losses, accuracies, found = train(
        data, options.epochs or epochs, options.batch_size, options.seed
    )
    plot(losses, accuracies, *data[2:], found, options.out)
    print(f"learning curve: {options.out}")
    print(f"test accuracy: {accuracies[-1]:.4f}")


if __name__ == "__main__":
    main()
