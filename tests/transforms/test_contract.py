"""What holds of every twin, whatever it does: the rule of the README, as tests.

A twin is entered in `TWINS` once, and every test runs on it. What is particular to one
twin is tested in the file of its own.
"""

import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify
from jax.sharding import AxisType, PartitionSpec as P

import statefun as sf

S, THREE = jnp.asarray(2.0), jnp.arange(1.0, 4.0)
MESH = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))
ONE_EACH = {"mesh": MESH, "in_specs": P(), "out_specs": P()}

UPSTREAM: Any = types.SimpleNamespace(
    **{name: f for name, f in vars(eqx).items() if name.startswith("filter_")},
    **{name: f for name, f in vars(lax).items() if not name.startswith("_")},
    checkify=checkify.checkify,
    shard_map=jax.shard_map,
)


def with_custom_vjp(t, f):
    fun = t.filter_custom_vjp(f)
    fun.def_fwd(lambda perturbed, x: (f(x), x))
    fun.def_bwd(lambda x, grad, perturbed, _: 2 * grad)
    return fun


def with_custom_jvp(t, f):
    fun = t.filter_custom_jvp(f)
    fun.def_jvp(lambda primals, tangents: (f(*primals), 2 * tangents[0]))
    return fun


def vjp(t, f):
    out, pull = t.filter_vjp(f, S)
    return out, pull(jnp.ones_like(out))


class Twin(NamedTuple):
    call: Callable[[Any, Callable], Any]
    """Of a library (statefun, or what its twins stand for) and a function of a number."""
    runs: int = 1
    """How often what the function writes is written."""


TWINS = {
    "filter_jit": Twin(lambda t, f: t.filter_jit(f)(S)),
    "filter_grad": Twin(lambda t, f: t.filter_grad(f)(S)),
    "filter_value_and_grad": Twin(lambda t, f: t.filter_value_and_grad(f)(S)),
    "filter_jvp": Twin(lambda t, f: t.filter_jvp(f, (S,), (S,))),
    "filter_vjp": Twin(vjp),
    "filter_jacfwd": Twin(lambda t, f: t.filter_jacfwd(f)(S)),
    "filter_jacrev": Twin(lambda t, f: t.filter_jacrev(f)(S)),
    "filter_hessian": Twin(lambda t, f: t.filter_hessian(f)(S)),
    "filter_vmap": Twin(lambda t, f: t.filter_vmap(f)(THREE)),
    "filter_checkpoint": Twin(lambda t, f: t.filter_checkpoint(f)(S)),
    "filter_closure_convert": Twin(lambda t, f: t.filter_closure_convert(f, S)(S)),
    "filter_custom_jvp": Twin(lambda t, f: with_custom_jvp(t, f)(S)),
    "filter_custom_vjp": Twin(lambda t, f: with_custom_vjp(t, f)(S)),
    "filter_eval_shape": Twin(lambda t, f: t.filter_eval_shape(f, S), 0),
    "filter_make_jaxpr": Twin(lambda t, f: t.filter_make_jaxpr(f)(S)[1:], 0),
    "scan": Twin(lambda t, f: t.scan(lambda c, x: (f(c), f(x)), S, THREE), 6),
    "map": Twin(lambda t, f: t.map(f, THREE), 3),
    "fori_loop": Twin(lambda t, f: t.fori_loop(0, 3, lambda i, x: f(x), S), 3),
    "while_loop": Twin(lambda t, f: t.while_loop(lambda x: x < 30, f, S), 3),
    "cond": Twin(lambda t, f: t.cond(True, f, lambda x: x, S)),
    "switch": Twin(lambda t, f: t.switch(1, [lambda x: x, f], S)),
    "shard_map": Twin(lambda t, f: t.shard_map(f, **ONE_EACH)(S)),
    "checkify": Twin(lambda t, f: t.checkify(f)(S)[1]),
    # Of two twins, each has the other inside.
    "grad of scan": Twin(
        lambda t, f: t.filter_grad(
            lambda x: t.scan(lambda c, _: (f(c), c), x, THREE)[0]
        )(S),
        3,
    ),
    "scan of grad": Twin(
        lambda t, f: t.scan(lambda c, x: (c, t.filter_grad(f)(x)), S, THREE), 3
    ),
    "grad of custom_vjp": Twin(lambda t, f: t.filter_grad(with_custom_vjp(t, f))(S)),
    "grad of custom_jvp": Twin(lambda t, f: t.filter_grad(with_custom_jvp(t, f))(S)),
    "vmap of cond": Twin(
        lambda t, f: t.filter_vmap(lambda x: t.cond(True, f, lambda x: x, x))(THREE)
    ),
}
EVERY = pytest.mark.parametrize("name", TWINS)

# `associative_scan` combines elements in an order of its own: its function may read only.
READING = TWINS | {
    "associative_scan": Twin(
        lambda t, f: t.associative_scan(lambda a, b: f(a) + b, THREE), 0
    )
}

IN_JIT = {
    "bare": lambda run, m: run(m),
    "jitted": lambda run, m: sf.filter_jit(lambda: run(m))(),
    "argument": lambda run, m: sf.filter_jit(run)(m),
    "argument and closure": lambda run, m: sf.filter_jit(
        lambda n: (n.weight.value, run(m))[1]
    )(m),
    "disabled": lambda run, m: _disabled(run, m),
}
"""How a twin is called, and how its function reaches the States of a model."""
EVERYWHERE = pytest.mark.parametrize("how", IN_JIT)


def _disabled(run, m):
    with jax.disable_jit():
        return run(m)


class Model(eqx.Module):
    weight: sf.State
    count: sf.State
    again: sf.State  # `weight`, by another path

    def __init__(self):
        self.weight = self.again = sf.State(jnp.asarray(3.0), name="weight")
        self.count = sf.State(jnp.asarray(0), name="count")

    def read(self, x):
        return self.weight.value * x

    def __call__(self, x):
        self.count.value += 1
        return (self.weight.value + self.again.value) / 2 * x


@pytest.fixture
def model():
    return Model()


def pure(x):
    return 3 * x


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        if isinstance(a, jax.ShapeDtypeStruct):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        elif eqx.is_array(a):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert np.allclose(a, b)
        else:
            assert a == b


# -- results and writes -------------------------------------------------------------


@pytest.mark.parametrize("name", READING)
def test_without_states_a_twin_is_what_it_stands_for(name):
    assert_equal(READING[name].call(sf, pure), READING[name].call(UPSTREAM, pure))


@EVERYWHERE
@pytest.mark.parametrize("name", READING)
def test_a_state_that_is_read_is_like_the_number_it_holds(name, how, model):
    twin = READING[name]
    for weight in (3.0, 5.0):  # of the second call what was compiled for the first
        model.weight.value = weight
        ours = IN_JIT[how](lambda m: twin.call(sf, m.read), model)
        assert_equal(ours, twin.call(UPSTREAM, lambda x, w=weight: w * x))
    assert model.count.value == 0


@EVERYWHERE
@EVERY
def test_what_is_written_is_there_once_when_the_call_is_over(name, how, model):
    twin = TWINS[name]
    for call in (1, 2):
        ours = IN_JIT[how](lambda m: twin.call(sf, m), model)
        assert_equal(ours, twin.call(UPSTREAM, pure))
        count = model.count.value
        assert count == call * twin.runs
        assert isinstance(count, jax.Array)
        assert (count.dtype, count.weak_type) == (jnp.int32, False)
    assert model.weight is model.again
    assert model.weight.value == 3.0


@EVERY
def test_a_state_that_is_reached_in_two_ways_is_one(name, model):
    fun = sf.StatefulFunction(lambda m: (TWINS[name].call(sf, m), model.weight.value))
    found = fun.get_states(model)
    assert {id(s) for s in found} == {id(model.weight), id(model.count)}
    assert len(found) == 2


# -- errors -------------------------------------------------------------------------


class Failed(Exception):
    pass


@EVERYWHERE
@EVERY
def test_a_function_that_raises_has_done_nothing(name, how, model):
    def fails(m):
        def f(x):
            m(x)
            m.weight.value = x
            raise Failed

        return f

    with pytest.raises(Failed):
        IN_JIT[how](lambda m: TWINS[name].call(sf, fails(m)), model)
    assert (model.weight.value, model.count.value) == (3.0, 0)
    # Nothing of it is left: the next call is like the first.
    ours = IN_JIT[how](lambda m: TWINS[name].call(sf, m), model)
    assert_equal(ours, TWINS[name].call(UPSTREAM, pure))
    assert model.count.value == TWINS[name].runs


@EVERY
def test_a_state_by_itself_can_not_be_returned(name, model):
    with pytest.raises(sf.StateTypeError, match=r"State 'weight' .* was returned"):
        TWINS[name].call(sf, lambda x: (model(x), model.weight)[1])
    assert model.count.value == 0


# -- tracers ------------------------------------------------------------------------


@pytest.mark.usefixtures("checking_leaks")
@pytest.mark.parametrize("how", ["bare", "jitted", "argument"])
@EVERY
def test_no_tracer_outlives_its_trace(name, how, model):
    IN_JIT[how](lambda m: TWINS[name].call(sf, m), model)
    assert model.count.value == TWINS[name].runs
    assert isinstance(model.count.value, jax.Array)


# -- signatures ---------------------------------------------------------------------

OURS = {
    "filter_jit": {
        "donate_states",
        "static_argnums",
        "static_argnames",
        "ir_optimizations",
        "name",
        "in_shardings",
        "out_shardings",
        "checkify",
    },
    "filter_grad": {"wrt", "microbatch", "collect"},
    "filter_value_and_grad": {"wrt", "microbatch", "collect"},
    "filter_jacfwd": {"wrt"},
    "filter_jacrev": {"wrt"},
    "filter_hessian": {"wrt"},
    "filter_vmap": {"state_axes"},
    "scan": {"progress", "state_axes", "checkpoint"},
    "map": {"progress", "state_axes", "checkpoint"},
    "fori_loop": {"progress", "checkpoint"},
    "while_loop": {"max_steps", "checkpoint", "throw"},
    "shard_map": {"state_specs"},
}
"""Keywords that a twin has beside those of what it stands for."""


def public_twins():
    return [name for name in sf.__all__ if hasattr(UPSTREAM, name)]


def test_every_twin_that_statefun_has_is_tested_here():
    assert set(public_twins()) == {name for name in READING if " " not in name}


@pytest.mark.parametrize("name", public_twins())
def test_a_twin_takes_every_argument_of_what_it_stands_for(name):
    ours = inspect.signature(getattr(sf, name)).parameters
    theirs = inspect.signature(getattr(UPSTREAM, name)).parameters
    shared = [p for p in ours if p in theirs]
    assert shared == list(theirs)
    assert ours.keys() - theirs.keys() == OURS.get(name, set())
    for p in theirs:
        assert ours[p].kind == theirs[p].kind
        if type(theirs[p].default) is not object:  # a private mark for "not given"
            assert ours[p].default == theirs[p].default or (
                str(ours[p].default) == str(theirs[p].default)
            )
    for p in ours.keys() - theirs.keys():
        assert ours[p].kind == inspect.Parameter.KEYWORD_ONLY
        assert ours[p].default is not inspect.Parameter.empty


@pytest.mark.parametrize(
    "option",
    [
        {"inline": True},
        {"keep_unused": True},
        {"compiler_options": {"xla_embed_ir_in_executable": True}},
    ],
    ids=str,
)
def test_filter_jit_passes_the_other_arguments_of_jax_jit_on(option, model):
    assert sf.filter_jit(model, **option)(S) == 6.0
    assert sf.filter_jit(**option)(lambda x: model(x))(S) == 6.0
    assert model.count.value == 2
