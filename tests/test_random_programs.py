"""Random nests of twins around States, compared with States that are plain boxes.

A program is Python source, drawn from a seed. It runs twice on the same values: with
statefun, and with `Boxes`, where a State is an attribute and every transform is a Python
loop or plain JAX that gets all values in and gives them back by hand. Results and final
States have to agree after each of several calls, eager and jitted in either order. A
program may be refused with a `StateError`; then nothing may have changed.

`python -m tests.test_random_programs --count 1000 --seed 0` looks for more, and prints
the source of those that go wrong.
"""

import argparse
import random
import traceback

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefun as sf

PRELUDE = """
class Module(eqx.Module):
    a: object
    p: object
    n: object
    def method(self, x):
        self.a.value = self.a.value + x
        return x - self.p.value

g = State(jnp.array([1.0, 2.0]))
h = Kind(jnp.array([0.5, -1.0]))
inner = State(jnp.array([2.0, 0.0]))
net = Param({"w": jnp.array([1.0, -0.5]), "s": inner})
M = Module(State(jnp.array([3.0, 1.0])), Param(jnp.array([-1.0, 0.5])), net)
ALL = [g, h, inner, M.a, M.p]
"""

# -- drawing ------------------------------------------------------------------------

READS = [
    "g.value",
    "h.value * h.factor",
    "M.a.value",
    "M.p.value",
    "m.a.value",
    "m.p.value",
    "net.value['w']",
    "net.value['s'].value",
    "m.n.value['s'].value",
    "inner.value",
]
WRITES = ["g", "h", "M.a", "m.a", "m.p", "inner", "net.value['s']", "m.n.value['s']"]
TWINS = (
    "jit jit_module grad grad_module grad_param vmap vmap_states scan map fori_loop "
    "fori_none while_loop cond switch checkpoint custom_vjp custom_jvp closure_convert "
    "raw_jit raw_grad raw_scan raw_checkpoint"
).split()


def source(seed):
    """The program of a seed, as text."""
    draw = random.Random(seed)
    lines = []

    def expression():
        left = draw.choice(["x", "x", draw.choice(READS)])
        right = draw.choice([draw.choice(READS), "x", "1.0", "0.5"])
        return f"{left} {draw.choice('+-+-*')} {right}"

    def function(depth):
        body = []
        for _ in range(draw.randint(0, 2)):
            body.append(f"{draw.choice(WRITES)}.value = {expression()} + jnp.zeros(2)")
        if draw.random() < 0.2:
            body.append("x = m.method(x)")
        if depth:
            for _ in range(1 if draw.random() < 0.8 else 2):
                twin = draw.choice(TWINS)
                children = [
                    function(depth - 1)
                    for _ in range(2 if twin in ("cond", "switch") else 1)
                ]
                on = f", {draw.choice(READS)}" if len(children) == 2 else ""
                body.append(f"x = x + T.{twin}({', '.join(children)}{on}, m, x)")
        if draw.random() < 0.5:
            body.append(f"{draw.choice(WRITES)}.value = {expression()} + jnp.zeros(2)")
        name = f"f{len(lines)}"
        text = [f"def {name}(m, x):", *body, f"return jnp.tanh({expression()})"]
        lines.append("\n    ".join(text))
        return name

    name = function(draw.randint(1, 4))
    return "\n\n".join(lines) + f"\n\nmain = {name}\n"


# -- the transforms, twice ----------------------------------------------------------


class Kind(sf.State):
    __slots__ = ("factor",)

    def __init__(self, value):
        super().__init__(value)
        self.factor = 2.0


class Twins:
    """By statefun."""

    State, Param, Kind = sf.State, sf.Param, Kind

    def __init__(self, namespace):
        self.namespace = namespace

    def jit(self, f, m, x):
        return sf.filter_jit(lambda x: f(m, x))(x)

    def jit_module(self, f, m, x):
        return sf.filter_jit(f)(m, x)

    def grad(self, f, m, x):
        return sf.filter_grad(lambda x: jnp.sum(f(m, x)))(x)

    def grad_module(self, f, m, x):
        return sf.filter_grad(lambda x, m: jnp.sum(f(m, x)))(x, m)

    def grad_param(self, f, m, x):
        return sf.filter_grad(lambda x: jnp.sum(f(m, x)), wrt=m.p)(x)

    def vmap(self, f, m, x):
        xs = jnp.stack([x, x + 1])
        return jnp.sum(sf.filter_vmap(f, in_axes=(None, 0))(m, xs), axis=0)

    def vmap_states(self, f, m, x):
        h = self.namespace["h"]
        h.value = jnp.stack([h.value, h.value + 1])
        xs = jnp.stack([x, x + 1])
        run = sf.filter_vmap(lambda x: f(m, x), state_axes=[(h, 0)])
        out = jnp.sum(run(xs), axis=0)
        h.value = h.value[0] - h.value[1]
        return out

    def scan(self, f, m, x):
        step = lambda c, x: (f(m, c + x), c)  # noqa: E731
        c, ys = sf.scan(step, x, jnp.arange(2.0))
        return c + jnp.sum(ys, axis=0)

    def map(self, f, m, x):
        return jnp.sum(sf.map(lambda x: f(m, x), jnp.stack([x, x + 1])), axis=0)

    def fori_loop(self, f, m, x):
        return sf.fori_loop(0, 2, lambda i, c: f(m, c + i), x)

    def fori_none(self, f, m, x):
        return sf.fori_loop(0, 0, lambda i, c: f(m, c + i), x)

    def while_loop(self, f, m, x):
        step = lambda at: (at[0] + 1, f(m, at[1]))  # noqa: E731
        return sf.while_loop(lambda at: at[0] < 2, step, (jnp.array(0), x))[1]

    def cond(self, f, g, on, m, x):
        return sf.cond(jnp.sum(on) > 0, lambda x: f(m, x), lambda x: g(m, x), x)

    def switch(self, f, g, on, m, x):
        index = jnp.sum(on > 0)
        fs = [lambda x: f(m, x), lambda x: g(m, x), lambda x: x]
        return sf.switch(index, fs, x)

    def checkpoint(self, f, m, x):
        return sf.filter_checkpoint(f)(m, x)

    def custom_vjp(self, f, m, x):
        @sf.filter_custom_vjp
        def run(x):
            return f(m, x)

        run.def_fwd(lambda perturbed, x: (f(m, x), None))
        run.def_bwd(lambda residuals, g, perturbed, x: 3 * g)
        return run(x)

    def custom_jvp(self, f, m, x):
        @sf.filter_custom_jvp
        def run(x):
            return f(m, x)

        @run.def_jvp
        def rule(primals, tangents):
            (t,) = tangents
            return f(m, *primals), jnp.zeros(2) if t is None else 3 * t

        return run(x)

    def closure_convert(self, f, m, x):
        return sf.filter_closure_convert(lambda x: f(m, x), x)(x)

    def raw_jit(self, f, m, x):
        return jax.jit(lambda x: f(m, x))(x)

    def raw_grad(self, f, m, x):
        return jax.grad(lambda x: jnp.sum(f(m, x)))(x)

    def raw_scan(self, f, m, x):
        step = lambda c, x: (f(m, c + x), None)  # noqa: E731
        return jax.lax.scan(step, x, jnp.arange(2.0))[0]

    def raw_checkpoint(self, f, m, x):
        return jax.checkpoint(lambda x: f(m, x))(x)


class Box:
    factor = 2.0

    def __init__(self, value):
        self.value = value


class Boxes:
    """By hand: loops in Python, all values in and out of what JAX does."""

    State = Param = Kind = Box

    def __init__(self, namespace):
        self.namespace = namespace

    @property
    def boxes(self):
        return self.namespace["ALL"]

    def now(self):
        return [box.value for box in self.boxes]

    def put(self, values):
        for box, value in zip(self.boxes, values, strict=True):
            box.value = value

    def pure(self, f, m):
        def run(x, values):
            self.put(values)
            out = f(m, x)
            return out, self.now()

        return run

    def jit(self, f, m, x):
        return f(m, x)

    jit_module = checkpoint = closure_convert = raw_jit = raw_checkpoint = jit

    def _gradient(self, loss, at):
        before = self.now()

        def run(at):
            self.put(before)
            return jnp.sum(loss(at)), self.now()

        gradient, after = jax.grad(run, has_aux=True)(at)
        self.put(after)
        return gradient

    def grad(self, f, m, x):
        return self._gradient(lambda x: f(m, x), x)

    grad_module = raw_grad = grad

    def grad_param(self, f, m, x):
        def loss(p):
            m.p.value = p
            return f(m, x)

        return self._gradient(loss, m.p.value)

    def vmap(self, f, m, x, states=()):
        before = self.now()
        outs, afters = [], []
        for i in range(2):
            self.put(before)
            for s in states:
                s.value = s.value[i]
            outs.append(f(m, x + i))
            afters.append(self.now())
        self.put(afters[0])
        for s in states:
            at = next(i for i, box in enumerate(self.boxes) if box is s)
            s.value = jnp.stack([after[at] for after in afters])
        return outs[0] + outs[1]

    def vmap_states(self, f, m, x):
        h = self.namespace["h"]
        h.value = jnp.stack([h.value, h.value + 1])
        out = self.vmap(f, m, x, [h])
        h.value = h.value[0] - h.value[1]
        return out

    def scan(self, f, m, x):
        ys = jnp.zeros(2)
        for i in range(2):
            ys = ys + x
            x = f(m, x + i)
        return x + ys

    def map(self, f, m, x):
        return f(m, x) + f(m, x + 1)

    def fori_loop(self, f, m, x):
        for i in range(2):
            x = f(m, x + i)
        return x

    raw_scan = fori_loop

    def fori_none(self, f, m, x):
        return x

    def while_loop(self, f, m, x):
        return f(m, f(m, x))

    def cond(self, f, g, on, m, x):
        return (f if jnp.sum(on) > 0 else g)(m, x)

    def switch(self, f, g, on, m, x):
        index = int(jnp.sum(on > 0))
        return x if index == 2 else (f, g)[index](m, x)

    def custom_vjp(self, f, m, x):
        run = jax.custom_jvp(self.pure(f, m))

        @run.defjvp
        def rule(primals, tangents):
            out, values = run(*primals)
            zeros = jax.tree.map(jnp.zeros_like, values)
            return (out, values), (3 * tangents[0], zeros)

        out, values = run(x, self.now())
        self.put(values)
        return out

    custom_jvp = custom_vjp


# -- comparing ----------------------------------------------------------------------


def made(cls, text):
    namespace = {"jnp": jnp, "eqx": eqx}
    t = cls(namespace)
    namespace |= {"State": t.State, "Param": t.Param, "Kind": t.Kind, "T": t}
    exec(PRELUDE + text, namespace)
    return namespace


REFUSED = (sf.StateError,)


def difference(seed):
    """What is wrong with the program of a seed: "" if nothing, "refused" if it was."""
    text = source(seed)
    ours, theirs = made(Twins, text), made(Boxes, text)
    draw = random.Random(seed)
    eager = lambda x: ours["main"](ours["M"], x)  # noqa: E731
    closed = sf.filter_jit(eager)
    passed = sf.filter_jit(ours["main"])
    ways = [
        ("eager", eager),
        ("jit", closed),
        ("module", lambda x: passed(ours["M"], x)),
    ]
    draw.shuffle(ways)
    done = []
    for i, (way, run) in enumerate([*ways, ways[0], ways[1]]):
        x = jnp.array([0.5, -0.25]) * (i + 1)
        done.append(way)
        # Changed values in between.
        for s, b in zip(ours["ALL"], theirs["ALL"], strict=True):
            b.value = jnp.tanh(b.value) + 0.25 * i
            s.value = b.value
        try:
            out = run(x)
        except REFUSED:
            return "refused"
        except Exception as error:
            if "Reverse-mode differentiation does not work" in str(error):
                return "refused"  # a `while_loop` in a gradient, as by JAX
            return f"{done}: {traceback.format_exc(limit=-6)}"
        expected = theirs["main"](theirs["M"], x)
        results = [out, *(s.value for s in ours["ALL"])]
        wanted = [expected, *(b.value for b in theirs["ALL"])]
        for what, a, b in zip(
            ["result", *"g h inner M.a M.p".split()], results, wanted, strict=True
        ):
            if not isinstance(a, jax.Array) or isinstance(a, jax.core.Tracer):
                return f"{done}: {what} is a {type(a)}"
            if not np.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True):
                return f"{done}: {what} is {a}, by hand {b}"
    return ""


COUNT = 200
CHUNK = 20


@pytest.mark.parametrize("start", range(0, COUNT, CHUNK))
def test_random_programs_are_the_same_with_states_as_by_hand(start):
    wrong = []
    for seed in range(start, start + CHUNK):
        found = difference(seed)
        if found not in ("", "refused"):
            wrong.append(f"seed {seed}: {found}\n{source(seed)}")
    assert not wrong, "\n\n".join(wrong)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    refused = wrong = 0
    for seed in range(options.seed, options.seed + options.count):
        found = difference(seed)
        refused += found == "refused"
        if found not in ("", "refused"):
            wrong += 1
            print(f"--- seed {seed}: {found}\n{source(seed)}", flush=True)
        if seed % 50 == 49:
            jax.clear_caches()
    print(f"{options.count} programs: {wrong} wrong, {refused} refused")


if __name__ == "__main__":
    main()
