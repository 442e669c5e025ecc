"""Teach a controller to swing a pendulum up and to keep it there.

The motor is too weak to lift the pendulum in one go: it has to swing. The world is a
module that is acted on, `pendulum.push(torque)`, and keeps its state to itself, in States:
the angle and its velocity, the time, and what diffrax's solver keeps from step to step.
`sf.scan` runs an episode, `sf.filter_vmap` a batch of them, and the controller is improved
by the gradient through all of it, of the time that is spent away from the top.

    python examples/pendulum.py
    python examples/pendulum.py --updates 60

A second at the top costs 0, one at the bottom costs 4, and a controller that knows
nothing pays 3. After 60 updates (the second line) it pays less than 2.4, and after the
600 of the first line less than 1, for the way up. The picture in `--out` shows episodes
before and after, and the costs.
"""

import argparse
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import statefun as sf

STEP, STEPS = 0.1, 100  # seconds a step, and steps an episode
TORQUE = 0.6  # at most; gravity pulls with up to 1


class World(sf.State):
    """The kind of State that an episode has of its own."""


def acceleration(time, motion, torque):
    """The pendulum hangs at angle 0 and stands at angle pi."""
    angle, velocity = motion
    return velocity, torque - jnp.sin(angle) - 0.05 * velocity


class Pendulum(eqx.Module):
    """A pendulum with a motor, simulated by diffrax, one step at a time."""

    time: World
    motion: World  # angle and velocity
    solver_state: World
    term: diffrax.ODETerm
    solver: diffrax.Tsit5

    def __init__(self, angle, velocity):
        self.term, self.solver = diffrax.ODETerm(acceleration), diffrax.Tsit5()
        self.time, self.motion = World(jnp.zeros(())), World((angle, velocity))
        self.solver_state = World(
            self.solver.init(self.term, 0.0, STEP, self.motion.value, jnp.zeros(()))
        )

    def seen(self):
        """What a controller is shown, of shape `(3,)`."""
        angle, velocity = self.motion.value
        return jnp.stack([jnp.cos(angle), jnp.sin(angle), velocity])

    def push(self, torque):
        """Lets `STEP` seconds pass."""
        start, end = self.time.value, self.time.value + STEP
        self.motion.value, _, _, self.solver_state.value, _ = self.solver.step(
            *(self.term, start, end, self.motion.value, torque),
            solver_state=self.solver_state.value,
            made_jump=True,  # the torque is another one than in the step before
        )
        self.time.value = end


class Controller(eqx.Module):
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.mlp = eqx.nn.MLP(3, "scalar", 32, 2, jnp.tanh, key=key)

    def __call__(self, seen):
        return TORQUE * jnp.tanh(self.mlp(seen))


def episode(controller, key):
    """The angles of an episode that starts in some motion, and what a second cost."""
    pendulum = Pendulum(*jax.random.normal(key, (2,)))

    def step(_, __):
        seen = pendulum.seen()
        torque = controller(seen)
        pendulum.push(torque)
        angle, velocity = pendulum.motion.value
        cost = (1 + jnp.cos(angle)) ** 2 + 0.05 * velocity**2 + 0.1 * torque**2
        return None, (angle, cost)

    _, (angles, costs) = sf.scan(step, None, length=STEPS)
    return angles, costs.mean()


# -- training -----------------------------------------------------------------------


def make_trainer(controller, optimizer, rng):
    def episodes():
        """A batch of them: in each lane `rng` gives another key."""
        return sf.filter_vmap(lambda: episode(controller.value, rng()), axis_size=32)()

    @sf.filter_jit
    def improve():
        cost, grads = sf.filter_value_and_grad(
            lambda: episodes()[1].mean(), wrt=controller
        )()
        optimizer.update(grads)
        return cost

    @sf.filter_jit
    def watch():
        return episodes()[0]

    return improve, watch


def plot(before, after, costs, out):
    import matplotlib

    matplotlib.use("Agg")  # draws to a file; needs no screen
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(11, 3.5), layout="constrained"
    )
    seconds = STEP * (1 + np.arange(STEPS))
    for axes, angles, name in ((left, before, "before"), (middle, after, "after")):
        axes.plot(seconds, np.transpose(angles) / np.pi, color="tab:blue", alpha=0.3)
        for top in (-3, -1, 1, 3):
            axes.axhline(top, color="black", linestyle=":")
        axes.set(xlabel="seconds", ylabel="angle / pi", title=name, ylim=(-3.2, 3.2))
    right.plot(1 + np.arange(len(costs)), costs, color="tab:orange")
    right.set(xlabel="update", ylabel="cost a second")
    right.set_title(f"in the end {costs[-1]:.2f}")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("pendulum.png"))
    options = parser.parse_args(argv)

    rng = sf.Rng(options.seed)
    controller = sf.Param(Controller(rng()), name="controller")
    schedule = optax.cosine_decay_schedule(1e-2, options.updates)
    optimizer = sf.Optimizer(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)), controller
    )
    improve, watch = make_trainer(controller, optimizer, rng)

    before, costs = watch(), []
    with tqdm(total=options.updates, unit="update") as progress:
        for _ in range(options.updates):
            costs.append(float(improve()))
            progress.update()
            progress.set_postfix(cost=f"{costs[-1]:.3f}")
    plot(before, watch(), costs, options.out)
    print(f"episodes before and after: {options.out}")
    print(f"cost: {np.mean(costs[-10:]):.4f}")


if __name__ == "__main__":
    main()
