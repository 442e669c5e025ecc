"""Functions that are wrapped anew share what was traced, and nothing outlives them."""

import copy
import functools
import gc
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import statefun as sf

ONE = jnp.ones(())
runs = []


@pytest.fixture(autouse=True)
def none_has_run():
    runs.clear()


class Net(eqx.Module):
    weight: jax.Array
    count: sf.State

    def __init__(self, weight=1.0):
        self.weight = jnp.array(weight)
        self.count = sf.State(jnp.array(0), name="count")

    def __call__(self, x, n=0):
        return self.method(x) + n

    def method(self, x):
        runs.append("net")
        self.count.value += 1
        return self.weight * x

    @sf.filter_jit
    def jitted(self, x):
        return self.method(x)


class Double(eqx.Module):
    def __call__(self, x):
        runs.append("double")
        return 2 * x


param = sf.Param(jnp.array(2.0), name="param")
net = Net()


def loss(x):
    runs.append("loss")
    return jnp.sum(param.value * x)


def scaled(x, y):
    runs.append("scaled")
    return x * y


def vmapped(fun, vmap=sf.filter_vmap, **axes):
    return lambda: lambda x: sf.filter_jit(vmap(fun(), **axes))(x[None])


def jitted(make):
    return lambda: sf.filter_jit(make())


WRAPPED = {
    "function": jitted(lambda: loss),
    "checked function": lambda: sf.filter_jit(loss, checkify=True),
    "options": lambda: sf.filter_jit(
        loss, name="f", donate_states=True, static_argnames=[]
    ),
    "as a decorator": lambda: sf.filter_jit(inline=True)(loss),
    "grad": jitted(lambda: sf.filter_grad(loss)),
    "grad with respect to a State": jitted(lambda: sf.filter_grad(loss, wrt=param)),
    "grad of a jitted function": jitted(lambda: sf.filter_grad(sf.filter_jit(loss))),
    "checkpoint of grad": jitted(lambda: sf.filter_checkpoint(sf.filter_grad(loss))),
    "Hessian": jitted(lambda: sf.filter_hessian(loss)),
    "checkify": jitted(lambda: sf.checkify(loss)),
    "jitted function": jitted(jitted(lambda: loss)),
    "vmap": vmapped(lambda: loss),
    "vmap with axes": vmapped(lambda: loss, state_axes=[(param, None)], in_axes=0),
    "vmap of Equinox": vmapped(lambda: Double(), eqx.filter_vmap),
    "partial function": jitted(lambda: eqx.Partial(scaled, jnp.ones(2))),
    "module without arrays": jitted(Double),
    "module": jitted(lambda: net),
    "new module": jitted(Net),
    "vmap of a module": vmapped(lambda: net, in_axes=0),
    "vmap by Equinox of a module": vmapped(Double, eqx.filter_vmap),
    "method": jitted(lambda: net.method),
    "method of a new module": jitted(lambda: Net().method),
    "jitted method": jitted(lambda: net.jitted),
    "gradient of a method": jitted(lambda: sf.filter_grad(net.method)),
}


@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_what_is_wrapped_anew_is_traced_once(make):
    first, *others = [make()(ONE) for _ in range(4)]
    assert len(runs) <= 1  # none if another test has done it
    for other in others:
        assert jax.tree.all(jax.tree.map(jnp.array_equal, first, other))


def test_other_options_are_another_program():
    def fun(x, n):
        runs.append("fun")
        return x * n

    for options in ({}, {"static_argnums": 1}, {"static_argnums": 1, "name": "f"}) * 2:
        assert sf.filter_jit(fun, **options)(ONE, 2) == 2
    assert len(runs) == 3


def test_twins_with_other_options_are_other_functions():
    def fun(x):
        return jnp.sum(x**2), x

    twins = [
        sf.filter_grad(fun, has_aux=True),
        sf.filter_value_and_grad(fun, has_aux=True),
        sf.filter_vmap(fun, in_axes=0, axis_name="i"),
        sf.filter_vmap(fun, in_axes=1, axis_name="i"),
    ]
    x = jnp.arange(6.0).reshape(2, 3)
    for twin in twins * 2:
        found, right = sf.filter_jit(twin)(x), twin(x)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, found, right))


def test_closures_made_anew_are_different_functions():
    def plus(n):
        return lambda x: x + n

    assert [sf.filter_jit(plus(i))(ONE) for i in range(3)] == [1, 2, 3]
    assert [sf.filter_jit(sf.filter_checkpoint(plus(i)))(ONE) for i in range(3)] == [
        1,
        2,
        3,
    ]


@pytest.mark.parametrize("call", [lambda n: n, lambda n: n.method, lambda n: n.jitted])
def test_modules_of_one_structure_share_a_program_and_no_values(call):
    nets = [Net(1.0), Net(2.0), Net(3.0)]
    for i, each in enumerate(nets):
        for _ in range(i):
            sf.filter_jit(call(each))(ONE)
    assert [each.count.value for each in nets] == [0, 1, 2]
    assert [sf.filter_jit(call(each))(ONE) for each in nets] == [1, 2, 3]
    assert len(runs) <= 1  # none if another test has done it


def test_a_module_whose_state_the_function_reaches_otherwise_too():
    class Twice(eqx.Module):
        count: sf.State

        def __call__(self, x):
            self.count.value += 1
            shared.value += 10
            return x

    shared = sf.State(jnp.array(0))
    for i in range(3):
        sf.filter_jit(Twice(shared))(ONE)
        assert shared.value == 11 * (i + 1)
    other = Twice(sf.State(jnp.array(0)))
    sf.filter_jit(other)(ONE)
    assert (other.count.value, shared.value) == (1, 43)


def test_a_module_with_tracers_is_compiled_inside_a_trace():
    def double(weight):
        return sf.filter_jit(eqx.tree_at(lambda n: n.weight, net, weight))(ONE)

    assert sf.filter_jit(sf.filter_grad(double))(ONE) == 1
    assert jax.grad(lambda w: sf.filter_jit(eqx.Partial(scaled, w))(ONE))(ONE) == 1


def test_what_a_library_wraps_is_told_apart_by_what_it_wraps():
    table = [eqx.Partial(lambda x, y, n=n: x * y + n, ONE) for n in range(3)]
    assert [sf.filter_jit(fun)(ONE) for fun in table * 2] == [1, 2, 3] * 2


def test_what_a_decorator_has_copied_the_attributes_of_is_another_function():
    def negative(fun):
        @functools.wraps(fun)
        def wrapper(x):
            return -fun(x)

        return wrapper

    sf.filter_jit(loss)(ONE)
    assert sf.filter_jit(negative(loss))(ONE) == -2
    assert sf.filter_jit(negative(negative(loss)))(ONE) == sf.filter_jit(loss)(ONE) == 2


def test_static_values_of_a_module_count_by_type():
    class Power(eqx.Module):
        n: float = eqx.field(static=True)

        def __call__(self, x):
            return x**self.n

    one = jnp.array(2)
    results = [sf.filter_jit(Power(n))(one).dtype for n in (1, 1.0)]
    assert results == [jnp.int32, jnp.float32]


def test_a_module_that_is_no_possible_argument_is_compiled_all_the_same():
    class Unhashable(eqx.Module):
        names: set
        weight: jax.Array

        def __call__(self, x):
            return self.weight * x * len(self.names)

    assert sf.filter_jit(Unhashable({"a", "b"}, ONE))(ONE) == 2


# -- lifetimes ----------------------------------------------------------------------


def dies(make):
    """Whether what `make` returns is gone when it was all that referred to it."""
    ref = weakref.ref(make())
    gc.collect()
    return ref() is None


def of_closure(wrap):
    def make():
        model = Net()

        def fun(x):
            return model(x)

        wrap(fun)(jnp.ones(1))
        wrap(fun)(jnp.ones(2))
        return model

    return make


@pytest.mark.parametrize(
    "wrap",
    [
        sf.filter_jit,
        lambda f: sf.filter_jit(sf.filter_vmap(f)),
        lambda f: sf.filter_jit(sf.filter_checkpoint(sf.filter_jit(f))),
        lambda f: sf.filter_jit(eqx.Partial(f)),
    ],
)
def test_nothing_of_a_closure_outlives_it(wrap):
    assert dies(of_closure(wrap))


def test_nothing_of_a_module_outlives_it():
    def make():
        model = Net()
        sf.filter_jit(model)(ONE)
        sf.filter_jit(sf.filter_grad(model.method))(ONE)
        return model

    assert dies(make)


def table_of(fun):
    return vars(fun)["_statefun_calls"].calls


def test_what_was_compiled_for_the_states_of_a_twin_goes_with_them():
    state = sf.Param(ONE)

    def square(x):
        return x * state.value**2

    for i in range(5):
        wrt = [sf.Param(ONE), state]
        assert sf.filter_jit(sf.filter_grad(square, wrt=wrt))(i * ONE) == [0, 2 * i]
        del wrt
    gc.collect()
    assert len(table_of(square)) == 0


def test_no_more_than_so_many_are_kept():
    def fun(x):
        return x

    for i in range(300):
        sf.filter_jit(fun, name=f"f{i}")
    assert len(table_of(fun)) == 128


# -- what is shared, and what is not ------------------------------------------------


def test_clear_cache_and_retraces_are_about_all_that_share():
    def fun(x):
        runs.append("fun")
        return x

    one, other = sf.filter_jit(fun), sf.filter_jit(fun)
    one(ONE)
    assert str(other.retraces()) == str(one.retraces()) != "[]"
    other.clear_cache()
    one(ONE)
    assert len(runs) == 2


def test_a_stateful_function_and_a_copy_have_traces_of_their_own():
    def fun(x):
        runs.append("fun")
        return x

    sf.filter_jit(fun)(ONE)
    sf.StatefulFunction(fun)(ONE)
    copy.deepcopy(sf.filter_jit(fun))(ONE)
    assert len(runs) == 3
    assert sf.filter_jit(fun)(ONE) == 1
    assert len(runs) == 3


# -- a module that is called is the first argument ----------------------------------


def test_static_arguments_of_a_module_are_counted_without_it():
    for options in ({"static_argnums": 1}, {"static_argnames": "n"}):
        call = sf.filter_jit(net, **options)
        assert call(ONE, 2) == call(ONE, n=2) == 3
        call.trace(ONE, 2)
    with pytest.raises(TypeError, match="the static argument at position 1"):
        sf.filter_jit(net, static_argnums=1)(ONE, [])
    with pytest.raises(ValueError, match="the call has only 1 positional"):
        sf.filter_jit(net.method, static_argnums=1)(ONE)


def test_errors_name_the_arguments_of_a_module():
    with pytest.raises(TypeError, match="passed as argument 0"):
        sf.filter_jit(net)(param)

    class Branches(eqx.Module):
        weight: jax.Array

        def __call__(self, x):
            return x if self.weight > 0 else -x

    with pytest.raises(jax.errors.TracerBoolConversionError, match=r"self\.weight"):
        sf.filter_jit(Branches(ONE))(ONE)


@pytest.mark.parametrize(
    ("donate", "deleted"),
    [
        ("none", (False, False, False)),
        ("all", (True, True, True)),
        ("all-except-first", (True, False, True)),
    ],
)
def test_a_module_that_is_called_is_donated_as_by_equinox(donate, deleted):
    class Add(eqx.Module):
        weight: jax.Array

        def __call__(self, x, y):
            return self.weight + 1, x + 1, y + 1

    for jit in (eqx.filter_jit, sf.filter_jit):
        arrays = [jnp.arange(3.0) + i for i in range(3)]
        jit(Add(arrays[0]), donate=donate)(*arrays[1:])
        assert tuple(x.is_deleted() for x in arrays) == deleted


def test_shardings_are_about_the_arguments_of_a_module():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, P("d"))
    for shardings in (split, (split,)):
        call = sf.filter_jit(Net().method, in_shardings=shardings)
        arg = jnp.ones(4)
        assert call.trace(arg).lower().compile()(arg).sharding.spec[0] == "d"


def test_questions_about_a_module_that_is_called():
    model = Net(3.0)
    call = sf.filter_jit(model)
    fun = call.stateful_function
    assert fun.get_states(ONE) == fun.get_write_states(ONE) == (model.count,)
    (count,), out = fun.jaxpr_call((jnp.array(4),), ONE)
    assert (count, out) == (5, 3)
    assert fun.get_states_by_cache(fun.get_arg_cache_key(ONE)) == (model.count,)
    assert fun(ONE) == call.lower(ONE).compile()(ONE) == call(ONE) == 3
    assert model.count.value == 3
    assert [s.name for s in sf.explain(call, ONE).states] == ["count"]
    with jax.disable_jit():
        assert call(ONE) == 3


def test_a_check_that_fails_in_a_module_leaves_its_states():
    class Checked(Net):
        def __call__(self, x):
            checkify.check(jnp.all(x > 0), "negative")
            return super().__call__(x)

    model = Checked()
    for _ in range(2):
        with pytest.raises(checkify.JaxRuntimeError, match="negative"):
            sf.filter_jit(model, checkify=True)(-ONE)
        assert sf.filter_jit(model, checkify=True)(ONE) == 1
    assert (model.count.value, len(runs)) == (2, 1)
