"""The examples do what they say, run as a user runs them."""

import os
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
COUNTER = EXAMPLES / "counter.py"
CLASSIFIER = EXAMPLES / "train_classifier.py"
EPOCHS, ACCURACY = 6, 0.9


def run_as_a_user(*command: str | Path, cwd: Path = ROOT) -> str:
    # In a process of its own: pytest's has stricter promotion than a user's.
    result = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", *command],
        capture_output=True,
        text=True,
        cwd=cwd,
        # The checkout is found where the tests run without an installation.
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_counters_count_what_the_example_says():
    promised = re.findall(r"report\(\w+\)  # (.*)", COUNTER.read_text())
    assert len(promised) == 4
    assert run_as_a_user(COUNTER).splitlines() == promised


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> tuple[str, Path]:
    """What a short training prints, and its picture."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    out = tmp_path_factory.mktemp("training") / "curve.png"
    options = ("--epochs", str(EPOCHS), "--seed", "3", "--out", str(out))
    return run_as_a_user(CLASSIFIER, *options, cwd=out.parent), out


def test_a_short_training_reaches_its_accuracy(training):
    printed, out = training
    first, last = printed.splitlines()
    assert first == f"learning curve: {out}"
    assert ACCURACY < float(last.removeprefix("test accuracy: ")) <= 1


def test_the_learning_curve_is_a_picture_of_two_curves(training):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    _, out = training
    image = matplotlib_image.imread(out)[..., :3]
    assert image.shape[0] > 200 and image.shape[1] > 400
    left, right = np.split(image, [image.shape[1] // 2], axis=1)
    blue, orange = np.array([31, 119, 180]) / 255, np.array([255, 127, 14]) / 255
    # So many pixels of a line's colour make a line, not a dot.
    assert pixels(left, blue) > 300 and pixels(right, orange) > 300
    assert pixels(left, orange) == pixels(right, blue) == 0


def pixels(image, colour) -> int:
    return int(np.all(np.abs(image - colour) < 0.02, axis=-1).sum())


# -- the short form of each of the others --------------------------------------------


def run_short(name: str, out: Path) -> str:
    """What an example prints, run with the options that its docstring gives."""
    for module in ("diffrax", "matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(module)
    example = EXAMPLES / name
    command = re.search(rf"{name} (--.*)", example.read_text())
    assert command is not None
    options = (*command[1].split(), "--out", str(out))
    return run_as_a_user(example, *options, cwd=out.parent)


def figure(printed: str, what: str) -> float:
    found = re.search(rf"^{what}: (.*)$", printed, re.MULTILINE)
    assert found is not None, printed
    return float(found[1])


def is_drawn_on(out: Path) -> bool:
    """Whether the picture has more to it than a frame: many pixels of many colours."""
    image = pytest.importorskip("matplotlib.image").imread(out)[..., :3]
    colours, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
    return len(colours) > 50 and counts.sum() - counts.max() > 5000


def test_the_transformer_learns_and_writes(tmp_path):
    out = tmp_path / "characters.png"
    printed = run_short("character_transformer.py", out)
    assert figure(printed, "test loss") < 2.6
    _, _, written = printed.split("\n", 2)
    assert len(written.removesuffix("\n")) == len("The ") + 200
    assert is_drawn_on(out)


def test_the_controller_learns_to_swing_the_pendulum_up(tmp_path):
    out = tmp_path / "pendulum.png"
    assert figure(run_short("pendulum.py", out), "cost") < 2.4
    assert is_drawn_on(out)


def test_the_residual_network_learns_the_digits(tmp_path):
    out = tmp_path / "resnet.png"
    assert figure(run_short("resnet.py", out), "test accuracy") > 0.9
    assert is_drawn_on(out)


def test_the_ensemble_knows_where_it_does_not_know(tmp_path):
    out = tmp_path / "ensemble.png"
    printed = run_short("ensemble.py", out)
    assert figure(printed, "off the wave") < 0.1
    at_data = figure(printed, "disagreement at the data")
    assert figure(printed, "disagreement in the gap") > 4 * at_data
    assert is_drawn_on(out)


# -- the comparison with plain Equinox ----------------------------------------------


def comment() -> list[str]:
    """The block of comments that begins with `In plain Equinox`, without the `#`s."""
    lines = CLASSIFIER.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if "# In plain Equinox" in line)
    block = []
    for line in lines[start:]:
        if not line.strip().startswith("#"):
            break
        block.append(line.strip().removeprefix("# ").removeprefix("#"))
    return block


def test_the_step_in_plain_equinox_takes_ten_lines_at_most():
    assert 2 < len(comment()) <= 10


def test_the_step_in_plain_equinox_computes_the_same(monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.syspath_prepend(EXAMPLES)  # as Python does for a script there
    example = runpy.run_path(str(CLASSIFIER))
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(0, 16, (8, 1, 8, 8)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 10, 8), jnp.int32)
    net = example["Net"](8, 8, 10, jax.random.key(0))
    optimizer = example["make_optimizer"](10)

    # optax promotes: `decay**count` in adamw mixes a float with an integer.
    with jax.numpy_dtype_promotion("standard"):
        plain = example | {"optimizer": optimizer}
        exec(textwrap.dedent("\n".join(comment()[1:])), plain)
        threaded = (
            net,
            optimizer.init(eqx.filter(net, eqx.is_array)),
            example["Statistics"](),
            jax.random.key(1),
        )
        theirs = []
        for _ in range(3):
            *threaded, loss = plain["train_step"](*threaded, images, labels)
            theirs.append(float(loss))

        train_step, classify = example["make_trainer"](
            net, optimizer, jax.random.key(1)
        )
        ours = [float(train_step(images, labels)) for _ in range(3)]
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert len(set(ours)) == 3

        model, _, stats, _ = threaded
        expected = jax.vmap(model)(stats.normalise(images)).argmax(axis=-1)
        assert classify(images).tolist() == expected.tolist()


# -- the data -----------------------------------------------------------------------


def test_fashion_mnist_is_read_from_the_files_that_debian_installs(tmp_path):
    import gzip

    rng = np.random.default_rng(0)
    images = {
        name: rng.integers(0, 256, (n, 4, 5)) for name, n in (("train", 7), ("t10k", 3))
    }
    for name, pixels in images.items():
        header = bytes([0, 0, 8, 3]) + np.array(pixels.shape, ">i4").tobytes()
        body = pixels.astype(np.uint8).tobytes()
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(header + body)
        )
        header = bytes([0, 0, 8, 1]) + np.array(len(pixels), ">i4").tobytes()
        body = bytes(range(len(pixels)))
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(header + body)
        )
    data = runpy.run_path(str(EXAMPLES / "images.py"))["fashion_mnist"](tmp_path)
    assert data.train_images.shape == (7, 1, 4, 5)
    assert np.array_equal(data.train_images[:, 0], images["train"])
    assert np.array_equal(data.test_images[:, 0], images["t10k"])
    assert data.train_labels.tolist() == list(range(7))
    assert data.test_labels.tolist() == list(range(3))


def test_without_fashion_mnist_the_example_says_how_to_get_it(tmp_path):
    example = runpy.run_path(str(EXAMPLES / "images.py"))
    with pytest.raises(SystemExit, match="apt install dataset-fashion-mnist"):
        example["fashion_mnist"](tmp_path / "none")
