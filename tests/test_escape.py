"""States that a traced function makes and leaves somewhere else than in its result."""

import gc
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import statefun as sf

ONE, THREE = jnp.ones(()), jnp.ones(3)
KEPT = []


class Box(eqx.Module):
    state: sf.State


class Object:
    pass


class Registry:
    found: sf.State | None = None


def in_a_dict():
    kept = {}
    return lambda s: kept.setdefault("s", s)


def in_an_attribute():
    kept = Object()
    return lambda s: setattr(kept, "s", s)


def in_a_global_list():
    return lambda s: KEPT.append(s)


def in_a_class():
    return lambda s: setattr(Registry, "found", s)


def in_a_closure():
    kept = []
    return lambda s: kept.append(lambda: s.value)


def in_a_variable_of_the_function_around():
    kept = None

    def keep(s):
        nonlocal kept
        kept = s

    return keep


def in_a_module():
    kept = []
    return lambda s: kept.append(eqx.nn.Sequential([eqx.nn.Lambda(Box(s))]))


def in_the_value_of_another_state():
    kept = sf.State({"s": sf.State(ONE)})
    return lambda s: setattr(kept, "value", {"s": s})


PLACES = [
    in_a_dict,
    in_an_attribute,
    in_a_global_list,
    in_a_class,
    in_a_closure,
    in_a_variable_of_the_function_around,
    in_a_module,
    in_the_value_of_another_state,
]


def custom_vjp(f):
    def forward(perturbed, x):
        return f(x), None

    fun = sf.filter_custom_vjp(f)
    fun.def_fwd(forward)
    fun.def_bwd(lambda residuals, grad, perturbed, x: grad)
    return fun


def custom_jvp(f):
    fun = sf.filter_custom_jvp(f)
    fun.def_jvp(lambda primals, tangents: (f(*primals), tangents[0]))
    return fun


def sharded(f):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("i")
    return sf.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)


ENDING = {
    "filter_jit": lambda f: sf.filter_jit(f)(ONE),
    "grad in jit": lambda f: sf.filter_jit(sf.filter_grad(f))(ONE),
    "jvp in jit": lambda f: sf.filter_jit(lambda x: sf.filter_jvp(f, (x,), (x,)))(ONE),
    "filter_vmap": lambda f: sf.filter_vmap(f)(THREE),
    "grad in vmap": lambda f: sf.filter_vmap(sf.filter_grad(f))(THREE),
    "shard_map": lambda f: sharded(f)(jnp.ones(1)),
    "scan": lambda f: sf.scan(lambda c, x: (c, f(x)), 0, THREE),
    "map": lambda f: sf.map(f, THREE),
    "map in batches": lambda f: sf.map(f, THREE, batch_size=2),
    "fori_loop": lambda f: sf.fori_loop(0, 3, lambda i, x: f(x), ONE),
    "while_loop": lambda f: sf.while_loop(lambda x: x < 3, lambda x: f(x) + 1, ONE),
    "associative_scan": lambda f: sf.associative_scan(lambda a, b: a + f(b), THREE),
    "cond": lambda f: sf.cond(True, f, lambda x: x, ONE),
    "switch": lambda f: sf.switch(1, [lambda x: x, f], ONE),
    "filter_checkpoint": lambda f: sf.filter_checkpoint(f)(ONE),
    "checkify": lambda f: sf.checkify(f)(ONE),
    "filter_custom_jvp": lambda f: custom_jvp(f)(ONE),
    "filter_custom_vjp": lambda f: custom_vjp(f)(ONE),
    "filter_eval_shape": lambda f: sf.filter_eval_shape(f, ONE),
    "filter_make_jaxpr": lambda f: sf.filter_make_jaxpr(f)(ONE),
    "filter_closure_convert": lambda f: sf.filter_closure_convert(f, ONE),
    "make_jaxpr": lambda f: sf.make_jaxpr(f)(ONE),
    "get_states": lambda f: sf.StatefulFunction(f).get_states(ONE),
}
"""Transforms at whose end the values of the States that the function made end."""

IN_PLACE = {
    "filter_grad": lambda f: sf.filter_grad(f)(ONE),
    "filter_value_and_grad": lambda f: sf.filter_value_and_grad(f)(ONE),
    "filter_jvp": lambda f: sf.filter_jvp(f, (ONE,), (ONE,)),
    "filter_vjp": lambda f: sf.filter_vjp(f, ONE),
    "filter_jacfwd": lambda f: sf.filter_jacfwd(f)(ONE),
    "filter_jacrev": lambda f: sf.filter_jacrev(f)(ONE),
}
"""Transforms that run the function at every call, and whose primal values are at hand."""


@pytest.fixture(autouse=True)
def nothing_kept():
    KEPT.clear()
    Registry.found = None


def left_by(keep, name="lost"):
    def f(x):
        state = sf.State(x, name=name)
        keep(state)
        return x * state.value

    return f


def refused():
    return pytest.raises(
        sf.StateTraceError,
        match=r"^State 'lost' \(created at .*test_escape.py:\d+\) was created inside a "
        "traced function, which left it",
    )


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_state_that_is_left_anywhere_is_refused(place):
    with refused():
        sf.filter_jit(left_by(place()))(ONE)


@pytest.mark.parametrize("twin", ENDING)
def test_every_transform_refuses_a_state_that_is_left_behind(twin):
    with refused():
        ENDING[twin](left_by(in_a_dict()))


@pytest.mark.parametrize("twin", ENDING)
def test_a_state_that_is_not_kept_is_nobodys_concern(twin):
    ENDING[twin](left_by(lambda state: None))


@pytest.mark.parametrize("twin", IN_PLACE)
def test_a_transform_that_runs_the_function_itself_leaves_states_with_values(twin):
    kept = {}
    IN_PLACE[twin](left_by(lambda s: kept.setdefault("s", s)))
    assert kept["s"].value == 1.0


def test_the_states_there_are_stay_as_they_were():
    kept, count = [], sf.State(jnp.array(0))

    @sf.filter_jit
    def f(x):
        count.value += 1
        kept.append(sf.State(x, name="lost"))

    for _ in range(2):  # nothing was compiled: each call says it
        with refused():
            f(ONE)
    assert count.value == 0


def test_an_argument_that_keeps_a_state_is_refused():
    def f(thing, x):
        thing.s = sf.State(x, name="lost")
        return x

    for call in (sf.filter_jit(f), sf.filter_vmap(f, in_axes=(None, 0))):
        with refused():
            call(Object(), THREE)


def test_a_function_in_the_result_that_keeps_a_state_is_refused():
    def f(x):
        state = sf.State(x, name="lost")
        return lambda: state.value

    with refused():
        sf.filter_jit(f)(ONE)


def test_a_state_that_is_returned_and_kept_is_refused():
    kept = []

    def f(x):
        kept.append(Box(sf.State(x, name="lost")))
        return kept[0]

    with refused():
        sf.filter_jit(f)(ONE)


def test_an_inner_function_may_leave_a_state_to_the_one_around():
    @sf.filter_jit
    def f(x):
        made = []
        grad = sf.filter_grad(left_by(made.append))(x)
        made[0].value += 1
        return grad, Box(made[0])

    grad, box = f(2 * ONE)
    assert (grad, box.state.value) == (4.0, 3.0)


# -- what lives on without having been left anywhere ----------------------------------


def caught(state):
    try:
        raise ValueError(state)
    except ValueError as error:
        kept = error  # noqa: F841  # a cycle: the frame, its traceback, the error
    return ONE


def recursive(state):
    def go(n):
        return state.value if n == 0 else go(n - 1)

    return go(3)


def under_custom_jvp(state):
    @jax.custom_jvp
    def f(x):
        return x * state.value

    f.defjvp(lambda primals, tangents: (f(*primals), tangents[0]))
    return f(ONE)


def under_custom_vjp(state):
    @jax.custom_vjp
    def f(x):
        return x * state.value

    f.defvjp(lambda x: (f(x), None), lambda residuals, grad: (grad,))
    return f(ONE)


def in_a_callback(state):
    return jax.pure_callback(lambda x: (state.name, x)[1], ONE, ONE)


USES = {
    "caught": caught,
    "recursive": recursive,
    "jax.jit": lambda s: jax.jit(lambda x: x * s.value)(ONE),
    "eqx.filter_jit": lambda s: eqx.filter_jit(lambda x: x * s.value)(ONE),
    "lax.scan": lambda s: jax.lax.scan(lambda c, x: (c + s.value, x), ONE, THREE)[0],
    "jax.checkpoint": lambda s: jax.checkpoint(lambda x: x * s.value)(ONE),
    "eqx.filter_checkpoint": lambda s: eqx.filter_checkpoint(lambda x: x * s.value)(
        ONE
    ),
    "jax.custom_jvp": under_custom_jvp,
    "jax.custom_vjp": under_custom_vjp,
    "filter_custom_jvp": lambda s: custom_jvp(lambda x: x * s.value)(ONE),
    "filter_custom_vjp": lambda s: custom_vjp(lambda x: x * s.value)(ONE),
    "a callback": in_a_callback,
    "filter_jit": lambda s: sf.filter_jit(lambda x: x * s.value)(ONE),
    "filter_grad": lambda s: sf.filter_grad(lambda x: x * s.value)(ONE),
    "scan": lambda s: sf.scan(lambda c, x: (c + s.value, x), ONE, THREE)[0],
    "filter_closure_convert": lambda s: sf.filter_closure_convert(
        lambda x: x * s.value, ONE
    )(ONE),
}


@pytest.mark.parametrize("use", USES)
def test_what_jax_keeps_of_a_state_was_not_left_there_by_the_function(use):
    @sf.filter_jit
    def f(x):
        return USES[use](sf.State(x))

    assert f(ONE) == f(ONE)


def test_a_state_in_a_cycle_goes_with_the_trace():
    made = []

    @sf.filter_jit
    def f(x):
        thing = Object()
        thing.itself, thing.state = thing, sf.State(x)
        made.append(weakref.ref(thing.state))
        return thing.state.value

    enabled = gc.isenabled()
    gc.disable()  # or it may be collected by chance
    try:
        assert f(ONE) == 1.0
    finally:
        if enabled:
            gc.enable()
    assert [ref() for ref in made] == [None]
