"""`filter_grad` and `filter_value_and_grad`: Equinox's, and gradients of States."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefun as sf


class Net(eqx.Module):
    """A module with States of two kinds, one shared by two places, and static leaves."""

    w: sf.Param
    again: sf.Param
    mean: sf.State
    bias: jax.Array
    label: str

    def __init__(self):
        self.label = "net"
        self.w = self.again = sf.Param(jnp.array([1.0, 2.0]), name="w")
        self.mean = sf.State(jnp.zeros(2), name="mean")
        self.bias = jnp.array([3.0, 4.0])

    def __call__(self, x):
        self.mean.value = 0.5 * self.mean.value + x
        return jnp.sum(self.w.value * self.again.value * x + self.bias)


@pytest.fixture
def w():
    return sf.Param(jnp.array([1.0, 2.0]), name="w")


@pytest.fixture
def count():
    return sf.State(jnp.array(0), name="count")


# -- as in Equinox ------------------------------------------------------------------


PURE = {
    "array": (lambda x: jnp.sum(x**3), (jnp.arange(3.0),)),
    "integer leaves get None": (
        lambda tree: jnp.sum(tree[0] * 2) + tree[1].astype(jnp.float32) * 0,
        ((jnp.arange(3.0), jnp.array(1), "static", None),),
    ),
    "only the first argument": (
        lambda x, y: jnp.sum(x * y),
        (jnp.ones(2), jnp.ones(2)),
    ),
    "module": (
        lambda net, x: jnp.sum(net(x)),
        (eqx.nn.Linear(2, 3, key=jax.random.key(0)), jnp.ones(2)),
    ),
    "no use of the argument": (lambda x: jnp.array(1.0), (jnp.ones(2),)),
    "bfloat16": (lambda x: jnp.sum(x * x), (jnp.ones(2, jnp.bfloat16),)),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("case", PURE)
def test_without_states_it_is_equinox(case, jitted):
    fun, args = PURE[case]
    ours, theirs = sf.filter_value_and_grad(fun), eqx.filter_value_and_grad(fun)
    if jitted:
        ours, theirs = sf.filter_jit(ours), eqx.filter_jit(theirs)
    assert eqx.tree_equal(ours(*args), theirs(*args), typematch=True)
    assert eqx.tree_equal(
        sf.filter_grad(fun)(*args), eqx.filter_grad(fun)(*args), typematch=True
    )


@pytest.mark.parametrize("has_aux", [False, True])
def test_decorators_aux_and_keywords_are_those_of_equinox(has_aux):
    def fun(x, *, y, label="a"):
        out = jnp.sum(x * y)
        return (out, {"label": label, "x": x}) if has_aux else out

    x, y = jnp.arange(2.0), jnp.ones(2)
    for name in ("filter_grad", "filter_value_and_grad"):
        ours = getattr(sf, name)(has_aux=has_aux)(fun)
        theirs = getattr(eqx, name)(has_aux=has_aux)(fun)
        assert eqx.tree_equal(ours(x, y=y, label="b"), theirs(x, y=y, label="b"))
        assert ours.__wrapped__ is fun
        assert ours.__name__ == "fun"


def _none_to_differentiate():
    return (lambda x: jnp.array(1.0)), (jnp.array(1),)


ERRORS = {
    "not a scalar": (lambda x: x, (jnp.ones(2),), {}),
    "not an array": (lambda x: "result", (jnp.ones(2),), {}),
    "an integer": (lambda x: jnp.array(1), (jnp.ones(2),), {}),
    "no argument": (lambda: jnp.array(1.0), (), {}),
    "no pair with has_aux": (lambda x: jnp.sum(x), (jnp.ones(2),), {"has_aux": True}),
    "argnums": (lambda x: jnp.sum(x), (jnp.ones(2),), {"argnums": 0}),
    "an unknown keyword": (lambda x: jnp.sum(x), (jnp.ones(2),), {"bogus": 0}),
    "a wrong argument": (lambda x: jnp.sum(x), (jnp.ones(2), 1), {}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_of_the_types_that_equinox_raises(case):
    fun, args, options = ERRORS[case]
    with pytest.raises(Exception) as theirs:
        eqx.filter_value_and_grad(fun, **options)(*args)
    with pytest.raises(type(theirs.value)):
        sf.filter_value_and_grad(fun, **options)(*args)
    with pytest.raises(type(theirs.value)):
        sf.filter_grad(fun, **options)(*args)


def test_keywords_of_jax_are_passed_on():
    def f(z):
        return z**2

    z = jnp.array(1.0 + 2.0j)
    ours = sf.filter_grad(f, holomorphic=True)(z)
    assert eqx.tree_equal(ours, eqx.filter_grad(f, holomorphic=True)(z))
    with pytest.raises(TypeError):
        sf.filter_grad(f)(z)


def test_it_binds_as_a_method(w):
    class Module(eqx.Module):
        scale: jax.Array

        @sf.filter_grad
        def grad(self, x):
            return jnp.sum(self.scale * x)

        @sf.filter_value_and_grad(wrt=w)
        def grad_w(self, x):
            return jnp.sum(self.scale * w.value * x)

    module = Module(jnp.array([2.0, 3.0]))
    assert np.array_equal(module.grad(jnp.ones(2)).scale, [1.0, 1.0])
    assert np.array_equal(module.grad_w(jnp.ones(2))[1], [2.0, 3.0])


# -- States in the first argument ---------------------------------------------------


def test_params_of_the_first_argument_are_differentiated_and_other_states_are_not():
    net = Net()
    value, grad = sf.filter_value_and_grad(lambda net, x: net(x))(net, jnp.ones(2))
    assert value == 12.0
    assert type(grad) is Net
    # Tied: one gradient, the sum of both uses, in both places.
    assert np.array_equal(grad.w, [2.0, 4.0])
    assert np.array_equal(grad.again, [2.0, 4.0])
    assert np.array_equal(grad.bias, [1.0, 1.0])
    assert grad.mean is None
    assert grad.label is None
    # And what was written is a value.
    assert np.array_equal(net.mean.value, [1.0, 1.0])


def test_params_in_a_later_argument_or_the_closure_are_not_differentiated(w):
    net = Net()
    grad = sf.filter_grad(lambda x, net: net(x) + jnp.sum(w.value))(jnp.ones(2), net)
    assert np.array_equal(grad, [1.0, 4.0])


def test_a_subclass_of_param_is_differentiated():
    class Weight(sf.Param):
        pass

    class Module(eqx.Module):
        w: Weight

    grad = sf.filter_grad(lambda m: m.w.value**2)(Module(Weight(jnp.array(3.0))))
    assert grad.w == 6.0


def test_a_param_that_holds_a_module_gets_a_module_of_gradients():
    class Module(eqx.Module):
        net: sf.Param

    net = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    x = jnp.ones(2)
    grad = sf.filter_grad(lambda m: m.net.value(x)[0])(Module(sf.Param(net)))
    want = eqx.filter_grad(lambda net: net(x)[0])(net)
    assert eqx.tree_equal(grad.net, want, typematch=True)
    assert grad.net.activation is None


def test_a_param_inside_the_value_of_a_state_is_differentiated_through_wrt():
    inner = sf.Param(jnp.array(3.0), name="inner")
    outer = sf.Param((inner, jnp.array(2.0)), name="outer")

    def f():
        held, factor = outer.value
        return held.value**2 * factor

    assert sf.filter_grad(f, wrt=inner)() == 12.0
    assert sf.filter_grad(f, wrt=[inner])() == [12.0]


# -- wrt ----------------------------------------------------------------------------


def test_wrt_a_state_differentiates_it_and_not_the_arguments(w):
    loss = lambda x, y: jnp.sum(w.value**2 * x * y)  # noqa: E731
    value, grad = sf.filter_value_and_grad(loss, wrt=w)(jnp.ones(2), jnp.ones(2))
    assert value == 5.0
    assert np.array_equal(grad, [2.0, 4.0])
    assert np.array_equal(
        sf.filter_grad(loss, wrt=w)(x=jnp.ones(2), y=jnp.ones(2)), grad
    )
    assert sf.filter_grad(lambda: jnp.sum(w.value), wrt=w)().shape == (2,)


def test_wrt_any_state_not_only_params(count):
    s = sf.State(jnp.array(3.0))
    assert sf.filter_grad(lambda: s.value**2, wrt=s)() == 6.0


def test_the_result_has_the_structure_of_wrt(w):
    net, b = Net(), sf.State(jnp.array(1.0), name="b")
    unused = sf.State(jnp.ones((2, 3)), name="unused")
    wrt = {
        "w": w,
        "rest": (b, [unused, b]),
        "net": net,
        "static": 7,
        "array": jnp.ones(1),
    }

    def loss(x):
        return jnp.sum(w.value * b.value * x) + net(x)

    grad = sf.filter_grad(loss, wrt=wrt)(jnp.ones(2))
    assert np.array_equal(grad["w"], [1.0, 1.0])
    assert grad["rest"][0] == 3.0
    assert grad["rest"][1][1] == 3.0  # the same State again: the same gradient
    # One that is never read: zeros, and not None.
    assert eqx.tree_equal(grad["rest"][1][0], jnp.zeros((2, 3)))
    assert type(grad["net"]) is Net
    assert np.array_equal(grad["net"].w, [2.0, 4.0])
    assert np.array_equal(grad["net"].mean, [0.0, 0.0])
    assert (grad["net"].bias, grad["net"].label) == (None, None)
    assert (grad["static"], grad["array"]) == (None, None)


def test_integer_states_in_wrt_have_none_for_a_gradient(w, count):
    def loss():
        return jnp.sum(w.value) * count.value.astype(jnp.float32)

    grads = sf.filter_grad(loss, wrt=[w, count])()
    assert np.array_equal(grads[0], [0.0, 0.0])
    assert grads[1] is None


def test_a_state_that_holds_a_module_gets_none_at_its_other_leaves():
    net = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    held, x = sf.State(net), jnp.ones(2)
    grad = sf.filter_grad(lambda x: held.value(x)[0], wrt=held)(x)
    want = eqx.filter_grad(lambda net: net(x)[0])(net)
    assert eqx.tree_equal(grad, want, typematch=True)
    # which is what optax and Equinox want
    held.value = eqx.apply_updates(held.value, grad)


def test_a_state_that_the_function_overwrites_before_reading_has_no_influence(w):
    def loss(x):
        w.value = x
        return jnp.sum(w.value**2)

    grad = sf.filter_grad(loss, wrt=w)(jnp.ones(2))
    assert np.array_equal(grad, [0.0, 0.0])
    assert np.array_equal(w.value, [1.0, 1.0])


def test_wrt_of_nothing_is_refused_or_empty_but_never_wrong():
    grad = sf.filter_grad(lambda x: jnp.sum(x), wrt=())(jnp.ones(2))
    assert grad == ()


def test_has_aux_gives_anything_back(w, count):
    def loss(x):
        count.value += 1
        return jnp.sum(w.value * x), {"n": count.value, "label": "static"}

    (value, aux), grad = sf.filter_value_and_grad(loss, has_aux=True, wrt=w)(
        jnp.ones(2)
    )
    assert (value, aux) == (3.0, {"n": 1, "label": "static"})
    grad_only, aux = sf.filter_grad(loss, has_aux=True, wrt=w)(jnp.ones(2))
    assert np.array_equal(grad_only, grad)
    assert aux["n"] == 2


def test_a_tied_state_has_one_gradient_the_sum(w):
    def loss(x):
        return jnp.sum(w.value * x) + jnp.sum(w.value * 3.0)

    a, b = sf.filter_grad(loss, wrt=[w, w])(jnp.ones(2))
    assert np.array_equal(a, [4.0, 4.0])
    assert np.array_equal(b, [4.0, 4.0])


def test_states_differentiate_as_the_same_function_of_arguments():
    """A network with its weights in States, one State a layer, against Equinox."""
    net = eqx.nn.MLP(3, 2, 8, 2, key=jax.random.key(0))
    layers = [sf.Param(layer) for layer in net.layers]
    x = jnp.linspace(-1, 1, 3)

    def stateful(x):
        for layer in layers[:-1]:
            x = jax.nn.relu(layer.value(x))
        return jnp.sum(layers[-1].value(x) ** 2)

    def pure(net_layers, x):
        for layer in net_layers[:-1]:
            x = jax.nn.relu(layer(x))
        return jnp.sum(net_layers[-1](x) ** 2)

    ours = sf.filter_jit(sf.filter_value_and_grad(stateful, wrt=layers))(x)
    theirs = eqx.filter_jit(eqx.filter_value_and_grad(pure))(list(net.layers), x)
    assert eqx.tree_equal(ours, theirs, typematch=True)


# -- what is written ----------------------------------------------------------------


def test_what_is_written_comes_out_as_primal_values(w, count):
    seen = sf.State(jnp.zeros(2), name="seen")

    def loss(x):
        count.value += 1
        seen.value = w.value * x
        return jnp.sum(seen.value)

    grad = sf.filter_grad(loss, wrt=w)(jnp.array([5.0, 7.0]))
    assert np.array_equal(grad, [5.0, 7.0])
    assert isinstance(seen.value, jax.Array)
    assert not isinstance(seen.value, jax.core.Tracer)
    assert np.array_equal(seen.value, [5.0, 14.0])
    assert count.value == 1


def test_no_gradient_flows_through_the_write_back():
    s = sf.State(jnp.array(1.0))

    def outer(x):
        inner = sf.filter_grad(lambda y: _write(s, y * 2))(x)
        return inner

    assert outer(jnp.array(3.0)) == 2.0
    assert s.value == 6.0
    # What a first gradient has written is a constant for the next one.
    assert sf.filter_grad(lambda x: s.value * x)(jnp.array(1.0)) == 6.0


def test_under_an_outer_gradient_a_written_value_depends_on_its_variables():
    """As the auxiliary output that a hand-written program would return it in."""
    s = sf.State(jnp.array(1.0))

    def f(x):
        sf.filter_grad(lambda y: _write(s, y**2))(x)
        return s.value * x

    assert sf.filter_grad(f)(jnp.array(3.0)) == 27.0  # of x**3
    assert s.value == 9.0


def _write(state, value):
    state.value = value
    return value


def test_a_state_in_wrt_may_be_written(w):
    def loss(x):
        out = jnp.sum(w.value**2 * x)
        w.value = w.value - 1
        return out

    grad = sf.filter_grad(loss, wrt=w)(jnp.ones(2))
    assert np.array_equal(grad, [2.0, 4.0])
    assert np.array_equal(w.value, [0.0, 1.0])


def test_a_state_made_inside_and_returned_as_aux_has_its_value(w):
    class Made(eqx.Module):
        s: sf.State

    def loss(x):
        return jnp.sum(w.value * x), Made(sf.State(w.value * x, name="made"))

    _, made = sf.filter_grad(loss, has_aux=True, wrt=w)(jnp.ones(2))
    assert np.array_equal(made.s.value, [1.0, 2.0])
    made.s.value = jnp.zeros(2)
    assert made.s.name == "made"


def test_a_bare_state_as_the_result_is_refused(w, count):
    with pytest.raises(TypeError, match=r"^State 'count' .* was returned"):
        sf.filter_grad(lambda x: (jnp.sum(x), count), has_aux=True)(jnp.ones(2))


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_function_that_raises_changes_no_state(w, count, jitted):
    def loss(x):
        count.value += 1
        w.value = w.value * 2
        raise RuntimeError("stop")

    run = sf.filter_grad(loss, wrt=w)
    with pytest.raises(RuntimeError, match="stop"):
        (sf.filter_jit(run) if jitted else run)(jnp.ones(2))
    assert count.value == 0
    assert np.array_equal(w.value, [1.0, 2.0])


def test_a_result_that_cannot_be_differentiated_changes_no_state(w, count):
    def loss(x):
        count.value += 1
        return w.value  # no scalar

    with pytest.raises(TypeError):
        sf.filter_grad(loss, wrt=w)(jnp.ones(2))
    assert count.value == 0


def test_the_function_runs_once_a_call_and_once_under_jit(w):
    runs = []

    def loss(x):
        runs.append(0)
        return jnp.sum(w.value * x)

    run = sf.filter_grad(loss, wrt=w)
    run(jnp.ones(2))
    run(jnp.ones(2))
    assert len(runs) == 2  # eagerly, as in jax
    jitted = sf.filter_jit(run)
    for _ in range(3):
        w.value = w.value + 1
        jitted(jnp.ones(2))
    assert len(runs) == 3


def test_the_value_that_a_jitted_gradient_sees_is_the_present_one(w):
    step = sf.filter_jit(sf.filter_grad(lambda x: jnp.sum(w.value**2 * x), wrt=w))
    assert np.array_equal(step(jnp.ones(2)), [2.0, 4.0])
    w.value = jnp.array([5.0, 5.0])
    assert np.array_equal(step(jnp.ones(2)), [10.0, 10.0])


def test_gradients_leave_no_tracer_behind(w, count, checking_leaks):
    def loss(x):
        count.value += 1
        return jnp.sum(w.value * x)

    sf.filter_grad(loss, wrt=w)(jnp.ones(2))
    sf.filter_jit(sf.filter_grad(loss, wrt=w))(jnp.ones(2))
    assert count.value == 2


def test_a_training_step_reads_the_gradient_and_writes_the_state(w):
    @sf.filter_jit
    def step(x):
        value, grad = sf.filter_value_and_grad(
            lambda x: jnp.sum((w.value - x) ** 2), wrt=w
        )(x)
        w.value -= 0.25 * grad
        return value

    assert step(jnp.zeros(2)) == 5.0
    assert np.array_equal(w.value, [0.5, 1.0])


# -- Params in the values of States ---------------------------------------------------


class Holder(eqx.Module):
    held: sf.State


def nested(kind=sf.Param):
    inner = sf.Param(jnp.array(2.0), name="inner")
    mean = sf.State(jnp.array(7.0), name="mean")
    value = {"w": jnp.array(3.0), "inner": inner, "mean": mean, "act": "relu"}
    return kind(value, name="outer"), inner


def product(outer):
    value = outer.value
    return value["w"] * value["inner"].value ** 2 + value["mean"].value


@pytest.mark.parametrize("jit", [False, True])
def test_a_param_in_the_value_of_a_param_is_differentiated(jit):
    outer, _ = nested()
    wrap = sf.filter_jit if jit else (lambda f: f)
    expected = {"w": 4, "inner": 12, "mean": None, "act": None}
    assert wrap(sf.filter_grad(lambda: product(outer), wrt=outer))() == expected
    by_argument = sf.filter_grad(lambda holder: product(holder.held))
    assert wrap(by_argument)(Holder(outer)).held == expected
    _, pull = sf.filter_vjp(lambda holder: product(holder.held), Holder(outer))
    assert pull(jnp.array(1.0))[0].held == expected


def test_a_param_in_the_value_of_another_state_is_differentiated():
    outer, _ = nested(sf.State)
    grad = sf.filter_grad(lambda holder: product(holder.held))(Holder(outer))
    assert grad.held == {"w": None, "inner": 12, "mean": None, "act": None}


def test_a_param_inside_and_beside_another_has_one_gradient():
    outer, inner = nested()
    for wrt, places in (((outer, inner), (0, 1)), ((inner, outer), (1, 0))):
        grads = sf.filter_grad(lambda: product(outer) + inner.value, wrt=wrt)()
        assert grads[places[0]]["inner"] == grads[places[1]] == 13


def test_derivatives_of_params_inside_others_agree():
    outer, inner = nested()
    hessian = sf.filter_hessian(lambda: product(outer), wrt=outer)()
    assert hessian["inner"]["inner"] == 6 and hessian["w"]["inner"] == 4
    assert sf.filter_jacfwd(lambda: product(outer), wrt=outer)()["inner"] == 12
    assert inner.value == 2


def test_what_is_written_to_a_param_inside_another_is_kept():
    outer, inner = nested()

    def f():
        loss = product(outer)
        inner.value = inner.value + 1
        return loss

    assert sf.filter_grad(f, wrt=outer)()["inner"] == 12
    assert inner.value == 3 and outer.value["inner"] is inner
