"""Images to train on, for the examples that tell them apart.

scikit-learn's digits (1797 images of 8 by 8 pixels, which come with it), or Fashion-MNIST
where Debian's package `dataset-fashion-mnist` is installed.
"""

import gzip
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


class Data(NamedTuple):
    """Images are (number, 1, height, width), in the units they were recorded in."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def digits():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8).astype(np.float32)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels.astype(np.int32), test_size=0.2, random_state=0, stratify=labels
    )
    return Data(train_images, train_labels, test_images, test_labels)


def fashion_mnist(folder=Path("/usr/share/datasets/fashion-mnist")):
    if not folder.is_dir():
        raise SystemExit(
            f"There is no folder {folder}. On Debian and Ubuntu it comes with "
            "`apt install dataset-fashion-mnist`."
        )

    def read(name):
        # The format is called IDX: two bytes of zero, one for the type, one for the
        # number of axes, then the size of each axis, and the values.
        with gzip.open(folder / f"{name}-ubyte.gz") as file:
            axes = file.read(4)[3]
            shape = np.frombuffer(file.read(4 * axes), ">i4")
            return np.frombuffer(file.read(), np.uint8).reshape(shape)

    def images(name):
        return read(f"{name}-images-idx3")[:, None].astype(np.float32)

    def labels(name):
        return read(f"{name}-labels-idx1").astype(np.int32)

    return Data(images("train"), labels("train"), images("t10k"), labels("t10k"))


# Which images, and how often to go through them unless told.
DATA = {"digits": (digits, 25), "fashion-mnist": (fashion_mnist, 3)}


def batches(images, labels, size, rng):
    """All images once, in random order; those that don't fill a batch are left out."""
    order = rng.permutation(len(images))
    for start in range(0, len(order) - size + 1, size):
        chosen = order[start : start + size]
        yield jnp.asarray(images[chosen]), jnp.asarray(labels[chosen])
