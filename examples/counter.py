"""Count the calls of a module, without touching the module.

`Counted` wraps any module that can be called. Its counter is a `State`, a leaf of the
wrapper like any other, so the wrapper may stand wherever the module did: inside a larger
network, under `sf.filter_jit`, in two places at once.

    python examples/counter.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp

import statefun as sf


class Counted(eqx.Module):
    """A module, and how often it was called."""

    module: eqx.Module
    calls: sf.State

    def __init__(self, module, name=None):
        self.module = module
        self.calls = sf.State(jnp.array(0), name=name)

    def __call__(self, *args, **kwargs):
        self.calls.value += 1
        return self.module(*args, **kwargs)


class Network(eqx.Module):
    """Uses its hidden layer as often as it is told."""

    hidden: Counted
    head: Counted

    def __init__(self, key):
        key_hidden, key_head = jax.random.split(key)
        self.hidden = Counted(eqx.nn.Linear(4, 4, key=key_hidden), name="hidden")
        self.head = Counted(eqx.nn.Linear(4, 2, key=key_head), name="head")

    @sf.filter_jit
    def __call__(self, x, depth):
        for _ in range(depth):
            x = jnp.tanh(self.hidden(x))
        return self.head(x)


def report(network):
    counts = {s.name: int(s.value) for s in sf.states(network).values()}
    print(", ".join(f"{name} {count}" for name, count in counts.items()))


def main():
    network = Network(jax.random.key(0))
    x = jnp.arange(4.0)

    for _ in range(3):
        network(x, depth=5)
    report(network)  # hidden 15, head 3

    # A call that fails counts nothing, also not what it did before it failed.
    try:
        network(jnp.arange(5.0), depth=5)
    except TypeError:
        report(network)  # hidden 15, head 3

    # A copy has counters of its own, and runs the program that was compiled already.
    other = sf.clone(network)
    other(x, depth=5)
    report(other)  # hidden 20, head 4
    report(network)  # hidden 15, head 3


if __name__ == "__main__":
    main()
