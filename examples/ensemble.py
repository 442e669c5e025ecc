"""Ask an ensemble of networks, and see where it doesn't know.

A member is a module with all that it takes to train one network: the Params, the
optimizer and the stream of random numbers. `sf.filter_vmap(Member)(keys)` makes as many
members as there are keys, and `sf.filter_vmap(..., state_axes=0)` trains them all at
once; neither the member nor its step knows about it. Every member draws its own batches,
so they agree where there are data, and differ where there are none.

    python examples/ensemble.py
    python examples/ensemble.py --steps 600

The data are a noisy wave with a gap. In the short form (the second line) as in the long
one, the mean of the members is off the wave by less than the noise, 0.1, where there are
data, and their disagreement is at least four times as large in the gap. The picture in
`--out` shows both.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import statefun as sf

NOISE = 0.1


def wave(x):
    return jnp.sin(3 * x) + 0.3 * x


def data(key, number=100):
    """Points on both sides of the gap from -0.75 to 0.75, of shape `(number, 1)`."""
    x_key, side_key, y_key = jax.random.split(key, 3)
    x = jax.random.uniform(x_key, (number, 1), minval=0.75, maxval=2.0)
    x *= jax.random.rademacher(side_key, x.shape, x.dtype)
    return x, wave(x) + NOISE * jax.random.normal(y_key, x.shape)


def loss_fn(net, x, y):
    return jnp.mean((jax.vmap(net)(x) - y) ** 2)


class Member(eqx.Module):
    """One network, and what trains it."""

    net: sf.Param
    optimizer: sf.Optimizer
    rng: sf.Rng

    def __init__(self, key):
        self.rng = sf.Rng(key)
        self.net = sf.Param(eqx.nn.MLP(1, 1, 64, 2, jax.nn.gelu, key=self.rng()))
        self.optimizer = sf.Optimizer(optax.adam(3e-3), self.net)

    def train_step(self, x, y):
        """Trains on points drawn with replacement, and returns the loss."""
        chosen = jax.random.choice(self.rng(), len(x), (len(x),))
        loss, grads = sf.filter_value_and_grad(
            lambda: loss_fn(self.net.value, x[chosen], y[chosen]), wrt=self.net
        )()
        self.optimizer.update(grads)
        return loss

    def __call__(self, x):
        return jax.vmap(self.net.value)(x)


@sf.filter_jit
def train_step(members, x, y):
    each = sf.filter_vmap(lambda member: member.train_step(x, y), state_axes=0)
    return each(members).mean()


@sf.filter_jit
def predict(members, x):
    """The outputs of every member, of shape `(members, number, 1)`."""
    return sf.filter_vmap(lambda member: member(x), state_axes=0)(members)


def plot(x, y, grid, every, out):
    import matplotlib

    matplotlib.use("Agg")  # draws to a file; needs no screen
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for axes in (left, right):
        axes.plot(grid, wave(grid), color="black", linestyle=":", label="the wave")
        axes.scatter(x, y, s=6, color="tab:gray", label="data")
        axes.set(xlabel="x", ylabel="y", ylim=(-3, 3))
        axes.grid(alpha=0.3)
    left.plot(grid[:, 0], every[..., 0].T, color="tab:blue", alpha=0.5, linewidth=0.8)
    left.set_title("each member", fontsize="medium")
    mean, spread = every.mean(axis=0)[:, 0], 2 * every.std(axis=0)[:, 0]
    right.plot(grid, mean, color="tab:orange", label="mean of the members")
    right.fill_between(
        *(grid[:, 0], mean - spread, mean + spread),
        color="tab:orange",
        alpha=0.3,
        label="two standard deviations",
    )
    right.set_title("the ensemble", fontsize="medium")
    right.legend(fontsize="small")
    figure.savefig(out, dpi=120)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("ensemble.png"))
    options = parser.parse_args(argv)

    rng = sf.Rng(options.seed)
    x, y = data(rng())
    members = sf.filter_vmap(Member)(rng.split(options.members))

    with tqdm(total=options.steps, unit="step") as progress:
        for step in range(options.steps):
            loss = train_step(members, x, y)
            progress.update()
            if step % 100 == 0:
                progress.set_postfix(loss=f"{loss:.4f}")

    grid = jnp.linspace(-2.5, 2.5, 200)[:, None]
    plot(x, y, grid, predict(members, grid), options.out)
    print(f"the ensemble: {options.out}")
    at_data, in_gap = (
        predict(members, x),
        predict(members, jnp.linspace(-0.5, 0.5)[:, None]),
    )
    print(f"off the wave: {jnp.abs(at_data.mean(axis=0) - wave(x)).mean():.4f}")
    print(f"disagreement at the data: {at_data.std(axis=0).mean():.4f}")
    print(f"disagreement in the gap: {in_gap.std(axis=0).mean():.4f}")


if __name__ == "__main__":
    main()
