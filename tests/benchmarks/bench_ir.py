"""What the optimisations of jaxprs cost and gain on whole training steps.

    python -m tests.benchmarks.bench_ir [--quick] [--only transformer]

For each step: equations before and after each pass, the time of each pass, then
lowering and compiling with and without all five, in turns, so that whatever else the
machine does hits both. `brainstate`'s passes run on the same jaxpr in the same
process if it is installed. Seconds, medians; "cpu" is the time of all threads of the
process, which other programs on the machine disturb less than the clock on the wall.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from statefun import ir


class Step(NamedTuple):
    """A training step and what it is called with."""

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]


def training_step(name: str, model: Any, loss: Callable, *batch: jax.Array) -> Step:
    """One step of adamw on `loss(model, *batch)`, from arrays to arrays."""
    optimizer = optax.adamw(3e-4)
    weights, rest = eqx.partition(model, eqx.is_inexact_array)

    def step(weights: Any, state: Any, *batch: jax.Array) -> Any:
        def of(weights: Any) -> jax.Array:
            return loss(eqx.combine(weights, rest), *batch)

        value, grads = jax.value_and_grad(of)(weights)
        updates, state = optimizer.update(grads, state, weights)
        return eqx.apply_updates(weights, updates), state, value

    return Step(name, step, (weights, optimizer.init(weights), *batch))


# -- the models


class Classifier(eqx.Module):
    convs: list[eqx.nn.Conv2d]
    norms: list[eqx.nn.GroupNorm]
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, 4)
        sizes = [(1, 8), (8, 16), (16, 16)]
        self.convs = [
            eqx.nn.Conv2d(n, m, 3, padding=1, key=k)
            for (n, m), k in zip(sizes, keys, strict=False)
        ]
        self.norms = [eqx.nn.GroupNorm(4, m) for _, m in sizes]
        self.head = eqx.nn.Linear(16, 10, key=keys[3])

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = eqx.nn.MaxPool2d(2, 2)(jax.nn.relu(norm(conv(x))))
        return self.head(x.mean((1, 2)))


class Block(eqx.Module):
    norms: list[eqx.nn.LayerNorm]
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, width: int, heads: int, key: jax.Array) -> None:
        one, two = jax.random.split(key)
        self.norms = [eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)]
        self.attention = eqx.nn.MultiheadAttention(heads, width, key=one)
        self.mlp = eqx.nn.MLP(width, width, 4 * width, 1, jax.nn.gelu, key=two)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.vmap(self.norms[0])(x)
        x = x + self.attention(y, y, y)
        return x + jax.vmap(lambda v: self.mlp(self.norms[1](v)))(x)


class Transformer(eqx.Module):
    embedding: eqx.nn.Embedding
    blocks: list[Block]
    head: eqx.nn.Linear

    def __init__(self, key: jax.Array, depth: int, width: int, words: int) -> None:
        keys = jax.random.split(key, depth + 2)
        self.embedding = eqx.nn.Embedding(words, width, key=keys[0])
        self.blocks = [Block(width, 2, k) for k in keys[2:]]
        self.head = eqx.nn.Linear(width, words, key=keys[1])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = jax.vmap(self.embedding)(tokens)
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(x)


def cross_entropy(model: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    logits = jax.vmap(model)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def classifier() -> Step:
    x, y = jnp.zeros((8, 1, 28, 28)), jnp.zeros(8, int)
    return training_step(
        "conv classifier", Classifier(jax.random.key(0)), cross_entropy, x, y
    )


def transformer() -> Step:
    model = Transformer(jax.random.key(0), depth=12, width=16, words=32)
    x = jnp.zeros((4, 8), int)
    return training_step("transformer, 12 blocks", model, cross_entropy, x, x)


def flow() -> Step | None:
    """A third-party model in Equinox, if `flowjax` is installed."""
    try:
        import paramax
        from flowjax.distributions import Normal
        from flowjax.flows import masked_autoregressive_flow
    except ImportError:
        return None
    model = masked_autoregressive_flow(
        jax.random.key(0), base_dist=Normal(jnp.zeros(4)), flow_layers=4, nn_width=16
    )

    def loss(model: Any, x: jax.Array) -> jax.Array:
        return -paramax.unwrap(model).log_prob(x).mean()

    return training_step("flowjax, masked flow", model, loss, jnp.zeros((32, 4)))


# -- measuring


def equations(jaxpr: Any) -> int:
    """How many, in all depths, those of a jaxpr that is called twice counted twice."""
    return len(jaxpr.eqns) + sum(map(equations, core.subjaxprs(jaxpr)))


def seconds(fn: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        gc.collect()
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def each_pass(jaxpr: Any, rounds: int) -> Iterator[tuple[str, int, float]]:
    """One pass after the other: its name, equations left, time."""
    for name in ir.OPTIMIZATIONS:
        run = getattr(ir, name)
        took = seconds(lambda run=run, jaxpr=jaxpr: run(jaxpr), rounds)
        jaxpr = run(jaxpr)
        yield name, equations(jaxpr), took


class Compiled(NamedTuple):
    """Seconds spent until an executable is there."""

    passes: float
    lower: float
    compile: float
    total: float
    cpu: float


def compiled(jaxpr: Any, optimise: bool) -> Compiled:
    jax.clear_caches()
    gc.collect()
    cpu, start = time.process_time(), time.perf_counter()
    chosen = ir.optimize_jaxpr(jaxpr) if optimise else jaxpr
    passed = time.perf_counter()
    lowered = jax.jit(core.jaxpr_as_fun(chosen)).lower(*chosen.in_avals)
    down = time.perf_counter()
    lowered.compile()
    end = time.perf_counter()
    return Compiled(
        passed - start,
        down - passed,
        end - down,
        end - start,
        time.process_time() - cpu,
    )


def brainstate_passes() -> Callable[[Any], Any] | None:
    try:
        from brainstate.transform import optimize_jaxpr
    except ImportError:
        return None
    return optimize_jaxpr


def verdict(ratio: float, budget: float) -> str:
    return f"{ratio:5.3f}  at most {budget:.2f}  {'ok' if ratio <= budget else 'OVER'}"


def report(step: Step, rounds: int, compiles: int) -> bool:
    """Prints all there is to say about one step; whether it keeps its budgets."""
    jaxpr = jax.make_jaxpr(step.fn)(*step.args)
    before = equations(jaxpr)
    print(f"\n{step.name}: {before} equations, {len(jaxpr.eqns)} of them outermost")
    for name, left, took in each_pass(jaxpr, rounds):
        print(f"  {name:26} {left:6} left {took * 1e3:8.1f} ms")
    took = seconds(lambda: ir.optimize_jaxpr(jaxpr), rounds)
    left = equations(ir.optimize_jaxpr(jaxpr))
    print(f"  {'all, until nothing changes':26} {left:6} left {took * 1e3:8.1f} ms")
    kept = True
    if (theirs := brainstate_passes()) is not None:
        slow = seconds(lambda: theirs(jaxpr), rounds)
        rest = equations(theirs(jaxpr))
        print(f"  {'brainstate':26} {rest:6} left {slow * 1e3:8.1f} ms")
        print(f"  equations, ours / theirs   {verdict(left / rest, 1.0)}")
        print(f"  time of passes             {verdict(took / slow, 1.0)}")
        kept = left <= rest and took <= slow
    if not compiles:
        return kept
    plain, optimised = [], []
    for i in range(compiles):
        for optimise in (False, True) if i % 2 == 0 else (True, False):
            (optimised if optimise else plain).append(compiled(jaxpr, optimise))
    for label, runs in (("as traced", plain), ("optimised", optimised)):
        medians = Compiled(*map(statistics.median, zip(*runs, strict=True)))
        print(
            f"  {label:10} passes {medians.passes:6.3f}  lower {medians.lower:6.3f}"
            f"  compile {medians.compile:7.3f}  total {medians.total:7.3f}"
            f"  cpu {medians.cpu:7.3f}"
        )
    ratios = []
    for what in ("total", "cpu"):
        of = [[getattr(run, what) for run in runs] for runs in (optimised, plain)]
        ratios.append(statistics.median(of[0]) / statistics.median(of[1]))
    print(f"  passes, lowering and compiling, total {verdict(ratios[0], 1.0)}")
    print(f"  the same, cpu                         {verdict(ratios[1], 1.0)}")
    return kept and ratios[0] <= 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="do not compile")
    parser.add_argument("--only", default="", help="steps with this in their name")
    parser.add_argument("--compiles", type=int, default=5, help="of each kind")
    options = parser.parse_args()
    versions = [
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax", "jaxlib", "equinox", "optax", "brainstate", "flowjax")
        if _installed(name)
    ]
    print(f"Python {platform.python_version()}, {', '.join(versions)}")
    print(f"{jax.default_backend()}, {os.cpu_count()} cores")
    kept = True
    for make in (classifier, transformer, flow):
        step = make()
        if step is None:
            print(f"\n{make.__name__}: flowjax is not installed")
        elif options.only in step.name:
            kept &= report(step, 5, 0 if options.quick else options.compiles)
    print("\nAll budgets are kept." if kept else "\nOver a budget.")


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
