"""`filter_custom_jvp` and `filter_custom_vjp`: Equinox's, with States in the rules."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefun as sf

X = jnp.array([1.0, 2.0])
S = jnp.array(2.0)


@pytest.fixture
def scale():
    return sf.State(jnp.array(3.0), name="scale")


@pytest.fixture
def count():
    return sf.State(jnp.array(0), name="count")


JIT = pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])


def jit_if(jitted, fun):
    return sf.filter_jit(fun) if jitted else fun


# -- as in Equinox ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["filter_custom_jvp", "filter_custom_vjp"])
def test_the_signature_is_that_of_equinox(name):
    ours = inspect.signature(getattr(sf, name)).parameters
    theirs = inspect.signature(getattr(eqx, name)).parameters
    assert list(ours) == list(theirs)
    methods = {
        "filter_custom_jvp": ["def_jvp"],
        "filter_custom_vjp": ["def_fwd", "def_bwd"],
    }
    for method in methods[name]:
        ours, theirs = getattr(sf, name), getattr(eqx, name)
        assert list(inspect.signature(getattr(ours, method)).parameters) == list(
            inspect.signature(getattr(theirs, method)).parameters
        )


def with_jvp(module, seen=None):
    """`x * y + n` with a rule of its own: twice the tangent of x, thrice that of y."""

    @module.filter_custom_jvp
    def f(x, y, n=1, *, flag=True):
        return x * y + n if flag else x

    @f.def_jvp
    def rule(primals, tangents, *, flag=True):
        x, y, *rest = primals
        tx, ty, *t_rest = tangents
        if seen is not None:
            seen.append((tx is None, ty is None, t_rest))
        out = f(x, y, *rest, flag=flag)
        t = 0.0 if tx is None else 2 * tx
        return out, jnp.broadcast_to(t + (0.0 if ty is None else 3 * ty), out.shape)

    return f


def with_vjp(module, seen=None):
    @module.filter_custom_vjp
    def f(arg, y, *, power=2):
        x, label = arg
        return x**power * y, label

    @f.def_fwd
    def fwd(perturbed, arg, y, *, power=2):
        if seen is not None:
            seen.append(perturbed)
        return f(arg, y, power=power), {"x": arg[0], "label": arg[1]}

    @f.def_bwd
    def bwd(residuals, grad, perturbed, arg, y, *, power=2):
        return 7 * residuals["x"] * grad[0] * y, None

    return f


TRANSFORMS = {
    "call": lambda f: f(X, S),
    "grad": lambda f: jax.grad(lambda x: jnp.sum(f(x, S)))(X),
    "filter_grad": lambda f: sf.filter_grad(lambda x: jnp.sum(f(x, S)))(X),
    "grad of both": lambda f: jax.grad(lambda t: jnp.sum(f(*t)))((X, S)),
    "jvp": lambda f: jax.jvp(f, (X, S), (X, S)),
    "jit(grad)": lambda f: jax.jit(jax.grad(lambda x: jnp.sum(f(x, S))))(X),
    "vmap(grad)": lambda f: jax.vmap(jax.grad(lambda x: f(x, S)))(X),
    "grad(vmap)": lambda f: jax.grad(lambda x: jnp.sum(jax.vmap(lambda a: f(a, S))(x)))(
        X
    ),
    "grad(scan)": lambda f: jax.grad(
        lambda x: jnp.sum(jax.lax.scan(lambda c, _: (f(c, S), None), x, length=3)[0])
    )(X),
    "grad(checkpoint)": lambda f: jax.grad(
        lambda x: jnp.sum(jax.checkpoint(lambda x: f(x, S))(x))
    )(X),
    "static and keyword arguments": lambda f: f(X, S, 4, flag=False),
    "integers": lambda f: f(jnp.array([1, 2]), jnp.array(3)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_without_states_custom_jvp_is_that_of_equinox(name):
    run = TRANSFORMS[name]
    assert eqx.tree_equal(run(with_jvp(sf)), run(with_jvp(eqx)), typematch=True)


@pytest.mark.parametrize("name", [n for n in TRANSFORMS if "both" not in n])
def test_without_states_custom_vjp_is_that_of_equinox(name):
    if name in ("jvp", "static and keyword arguments"):
        pytest.skip("not for a custom_vjp")

    def run(module):
        f = with_vjp(module)
        return TRANSFORMS[name](lambda x, y: f((x, "label"), y)[0])

    assert eqx.tree_equal(run(sf), run(eqx), typematch=True)


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda f: jax.grad(lambda x: jnp.sum(f(x, S)))(X),
        lambda f: jax.grad(lambda y: jnp.sum(f(X, y)))(S),
        lambda f: jax.grad(lambda t: jnp.sum(f(*t)))((X, S)),
        lambda f: jax.grad(lambda x: jnp.sum(f(x, S, 2)))(X),
        lambda f: jax.grad(lambda x: jnp.sum(f(x, S, jnp.array(2.0))))(X),
    ],
)
def test_the_rule_is_told_what_is_not_differentiated(differentiate):
    ours, theirs = [], []
    assert eqx.tree_equal(
        differentiate(with_jvp(eqx, theirs)), differentiate(with_jvp(sf, ours))
    )
    assert ours == theirs


def test_the_forward_rule_is_told_what_is_differentiated():
    ours, theirs = [], []
    for module, seen in ((sf, ours), (eqx, theirs)):
        f = with_vjp(module, seen)
        jax.grad(lambda x, f=f: jnp.sum(f((x, "label"), S)[0]))(X)
    assert ours == theirs == [(True, False)]


def test_a_second_derivative_of_a_custom_jvp_is_that_of_equinox():
    def make(module):
        @module.filter_custom_jvp
        def f(x):
            return x**3

        @f.def_jvp
        def rule(primals, tangents):
            (x,), (t,) = primals, tangents
            return f(x), 5 * x**2 * t

        return f

    ours, theirs = (jax.grad(jax.grad(make(m)))(S) for m in (sf, eqx))
    assert ours == theirs == 20.0


def undefined_jvp(m):
    return jax.grad(m.filter_custom_jvp(lambda x: x))(S)


def undefined_vjp(m):
    return jax.grad(m.filter_custom_vjp(lambda x: x))(S)


def only_fwd(m):
    f = m.filter_custom_vjp(lambda x: x)
    f.def_fwd(lambda p, x: (x, None))
    return f(S)


def keyword_tangent(m):
    f = with_jvp(m)
    return jax.grad(lambda flag: jnp.sum(f(X, S, flag=flag)))(S)


def other_arguments_differentiated(m):
    f = with_vjp(m)
    return jax.grad(lambda y: jnp.sum(f((X, "a"), y)[0]))(S)


def wrong_structure(m):
    f = m.filter_custom_vjp(lambda x: x["a"] * 2)
    f.def_fwd(lambda p, x: (x["a"] * 2, None))
    f.def_bwd(lambda r, g, p, x: g)
    return jax.grad(f)({"a": S})


def vjp_forwards(m):
    f = with_vjp(m)
    return jax.jvp(lambda x: f((x, "a"), S)[0], (X,), (X,))


def closing_over_jvp(m, y):
    f = m.filter_custom_jvp(lambda x: x * y)
    f.def_jvp(lambda primals, tangents: (primals[0] * y, tangents[0]))
    return f(S)


def closing_over_vjp(m, y):
    f = m.filter_custom_vjp(lambda x: x * y)
    f.def_fwd(lambda perturbed, x: (x * y, None))
    f.def_bwd(lambda residuals, grad, perturbed, x: grad)
    return f(S)


def closed_over_jvp(m):
    return jax.grad(lambda y: closing_over_jvp(m, y))(S)


def closed_over_vjp(m):
    return jax.grad(lambda y: closing_over_vjp(m, y))(S)


def closed_over_vjp_jitted(m):
    return jax.grad(jax.jit(lambda y: closing_over_vjp(m, y)))(S)


def several_rules(m):
    return m.filter_custom_jvp(lambda x: x).defjvps(lambda t, out, x: t)


def result_of_another_structure(m):
    f = m.filter_custom_jvp(lambda x: x)
    f.def_jvp(lambda primals, tangents: ((primals[0],), tangents[0]))
    return jax.grad(f)(S)


def no_tangent(m):
    f = m.filter_custom_jvp(lambda x: x)
    f.def_jvp(lambda primals, tangents: primals[0])
    return jax.grad(f)(S)


def control_flow_under_jit(m):
    f = m.filter_custom_jvp(lambda x: x if x > 0 else -x)
    f.def_jvp(lambda primals, tangents: (primals[0], tangents[0]))
    return jax.jit(f)(S)


ERRORS = [
    undefined_jvp,
    undefined_vjp,
    only_fwd,
    keyword_tangent,
    other_arguments_differentiated,
    wrong_structure,
    vjp_forwards,
    closed_over_jvp,
    closed_over_vjp,
    closed_over_vjp_jitted,
    several_rules,
    result_of_another_structure,
    no_tangent,
    control_flow_under_jit,
]


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_of_the_types_that_equinox_raises(case):
    with pytest.raises(Exception) as theirs:
        case(eqx)
    with pytest.raises(Exception) as ours:
        case(sf)
    assert type(ours.value) is type(theirs.value)


def test_control_flow_on_concrete_values_works_outside_of_jit():
    def make(module):
        @module.filter_custom_jvp
        def f(x, flag):
            return x**2 if flag and x > 0 else -x

        @f.def_jvp
        def rule(primals, tangents):
            x, flag = primals
            return f(x, flag), 5 * tangents[0] if x > 1 else tangents[0]

        @module.filter_custom_vjp
        def g(x):
            return x if x > 0 else -x

        @g.def_fwd
        def fwd(perturbed, x):
            return (x if x > 0 else -x), bool(x > 0)

        @g.def_bwd
        def bwd(residuals, grad, perturbed, x):
            return 2 * grad if residuals and x > 0 else grad

        return f, g

    (f, g), (eqx_f, eqx_g) = make(sf), make(eqx)
    for x in (S, -S):
        for flag in (True, jnp.array(False)):
            assert f(x, flag) == eqx_f(x, flag)
            assert sf.filter_grad(f)(x, flag) == jax.grad(eqx_f)(x, flag)
        assert g(x) == eqx_g(x)
        assert sf.filter_grad(g)(x) == jax.grad(g)(x) == jax.grad(eqx_g)(x)


def test_the_rules_that_equinox_deprecates_work_and_say_so():
    def make(module):
        f = module.filter_custom_jvp(lambda x, n: x**n)
        with pytest.warns(UserWarning, match="deprecated"):
            f.defjvp(lambda primals, tangents: (f(*primals), 5 * tangents[0]))
        g = module.filter_custom_vjp(lambda x: x**3)
        with pytest.warns(UserWarning, match="deprecated"):
            g.defvjp(lambda x: (x**3, x), lambda residuals, grad, x: 7 * grad)
        return jax.grad(lambda x: f(x, 3))(S), jax.grad(g)(S)

    assert make(sf) == make(eqx)


def test_function_and_rule_run_as_often_as_they_do_in_equinox():
    def counted(module):
        runs = []

        @module.filter_custom_jvp
        def f(x):
            runs.append("f")
            return jnp.sin(x)

        @f.def_jvp
        def rule(primals, tangents):
            runs.append("rule")
            return jnp.sin(primals[0]), tangents[0]

        return f, runs

    (f, ours), (g, theirs) = counted(sf), counted(eqx)
    f(S), g(S)
    jax.vmap(f)(X), jax.vmap(g)(X)
    assert ours == theirs
    jax.grad(f)(S), jax.grad(g)(S)
    assert ours == theirs == ["f", "f", "rule"]


def test_a_custom_rule_binds_as_a_method():
    class Module(eqx.Module):
        factor: jax.Array

        @sf.filter_custom_jvp
        def f(self, x):
            return self.factor * x

        @f.def_jvp
        def _(primals, tangents):
            self, x = primals
            return self.factor * x, 10 * tangents[1]

    module = Module(jnp.array(4.0))
    assert module.f(S) == 8.0
    assert jax.grad(module.f)(S) == 10.0


# -- States: custom_jvp -------------------------------------------------------------


def stateful_jvp(scale, count):
    @sf.filter_custom_jvp
    def f(x):
        count.value += 1
        return scale.value * x

    @f.def_jvp
    def rule(primals, tangents):
        count.value += 10
        return scale.value * primals[0], 100 * scale.value * tangents[0]

    return f


@JIT
def test_states_are_read_in_function_and_rule_and_written_by_the_one_that_runs(
    scale, count, jitted
):
    f = stateful_jvp(scale, count)
    call, grad = jit_if(jitted, lambda x: f(x)), jit_if(jitted, sf.filter_grad(f))
    for value in (3.0, 5.0):  # a value that was changed is seen
        scale.value = value
        count.value = 0
        assert call(S) == value * 2
        assert count.value == 1
        assert grad(S) == 100 * value
        assert count.value == 11


@JIT
def test_the_rule_runs_in_a_jvp_and_in_a_nest(scale, count, jitted):
    f = stateful_jvp(scale, count)
    run = jit_if(jitted, lambda x: sf.filter_jvp(f, (x,), (jnp.array(1.0),)))
    assert [float(v) for v in run(S)] == [6.0, 300.0]
    assert count.value == 10

    def loop(x):
        return sf.scan(lambda c, _: (f(c), None), x, length=2)[0]

    count.value = 0
    assert jit_if(jitted, sf.filter_grad(loop))(S) == 300.0**2
    assert count.value == 20
    assert jit_if(jitted, loop)(S) == 18.0
    assert count.value == 22
    count.value = 0
    run = jit_if(jitted, sf.filter_vmap(sf.filter_grad(f)))
    assert np.array_equal(run(X), [300.0, 300.0])
    assert count.value == 10


@JIT
def test_differentiating_a_state_that_is_read_in_there_raises_and_names_it(
    scale, count, jitted
):
    f = stateful_jvp(scale, count)
    run = jit_if(jitted, sf.filter_grad(lambda x: f(x), wrt=scale))
    with pytest.raises(
        sf.StateTraceError,
        match=r"^State 'scale' \(created at .*\) is read in f, which has a custom "
        r"derivative, and was differentiated\.",
    ):
        run(S)
    assert count.value == 0
    # Also where the derivative comes by another State.
    mixed = sf.State(jnp.array(1.0), name="mixed")

    def through(x):
        scale.value = mixed.value * x
        return f(jax.lax.stop_gradient(x))

    with pytest.raises(sf.StateTraceError, match=r"^State 'scale' .* is read in f"):
        jit_if(jitted, sf.filter_grad(through))(S)
    assert scale.value == 3.0


def test_a_state_that_is_not_differentiated_may_stand_beside_one_that_is(scale, count):
    f = stateful_jvp(scale, count)
    w = sf.Param(jnp.array(7.0), name="w")
    assert sf.filter_grad(lambda x: f(w.value * x), wrt=w)(S) == 600.0


def test_what_the_function_wrote_before_is_what_the_rule_reads(scale, count):
    f = stateful_jvp(scale, count)

    @sf.filter_jit
    def step(x):
        scale.value = jnp.array(4.0)
        return sf.filter_grad(f)(x), f(x)

    assert [float(v) for v in step(S)] == [400.0, 8.0]
    assert count.value == 11


def test_states_of_a_module_argument_are_seen():
    class Module(eqx.Module):
        s: sf.State

    @sf.filter_custom_jvp
    def f(x, m):
        m.s.value += 1
        return x * m.s.value

    @f.def_jvp
    def rule(primals, tangents):
        x, m = primals
        m.s.value += 10
        return x * m.s.value, tangents[0]

    m = Module(sf.State(jnp.array(0.0), name="s"))
    assert f(S, m) == 2.0
    sf.filter_grad(lambda x: f(x, m))(S)
    assert m.s.value == 11.0


@JIT
@pytest.mark.parametrize("where", ["function", "rule"])
def test_a_function_or_rule_that_raises_changes_no_state(where, jitted, scale, count):
    @sf.filter_custom_jvp
    def f(x):
        count.value += 1
        if where == "function":
            raise RuntimeError("stop")
        return x

    @f.def_jvp
    def rule(primals, tangents):
        count.value += 1
        raise RuntimeError("stop")

    def loss(x):
        scale.value = x
        return f(x)

    # Where it is differentiated the rule runs in place of the function.
    run = sf.filter_vmap(loss) if where == "function" else sf.filter_grad(loss)
    with pytest.raises(RuntimeError, match="stop"):
        jit_if(jitted, run)(X if where == "function" else S)
    assert (float(scale.value), int(count.value)) == (3.0, 0)


def test_a_state_that_the_rule_alone_touches_is_written_too(count):
    @sf.filter_custom_jvp
    def f(x):
        return x

    @f.def_jvp
    def rule(primals, tangents):
        count.value += 1
        return primals[0], tangents[0]

    for _ in range(2):
        sf.filter_grad(f)(S)
    sf.filter_jit(sf.filter_grad(f))(S)
    assert count.value == 3
    f(S)
    assert count.value == 3


# -- States: custom_vjp -------------------------------------------------------------


def stateful_vjp(scale, count):
    @sf.filter_custom_vjp
    def f(x):
        count.value += 1
        return scale.value * x

    @f.def_fwd
    def fwd(perturbed, x):
        count.value += 10
        return scale.value * x, {"x": x, "label": "residual"}

    @f.def_bwd
    def bwd(residuals, grad, perturbed, x):
        assert residuals["label"] == "residual"
        return 100 * scale.value * residuals["x"] * grad

    return f


@JIT
def test_the_forward_rule_writes_states_and_the_backward_rule_reads_them(
    scale, count, jitted
):
    f = stateful_vjp(scale, count)
    call, grad = jit_if(jitted, lambda x: f(x)), jit_if(jitted, sf.filter_grad(f))
    for value in (3.0, 5.0):
        scale.value = value
        count.value = 0
        assert call(S) == 2 * value
        assert count.value == 1
        assert grad(S) == 200 * value
        assert count.value == 11


@JIT
def test_the_backward_rule_sees_states_as_they_were_at_the_call(scale, count, jitted):
    f = stateful_vjp(scale, count)

    def loss(x):
        y = f(x)
        scale.value = jnp.array(1000.0)
        return y

    assert jit_if(jitted, sf.filter_grad(loss))(S) == 600.0
    assert scale.value == 1000.0


@JIT
def test_custom_vjp_in_a_nest(scale, count, jitted):
    f = stateful_vjp(scale, count)

    def loop(x):
        return sf.scan(lambda c, _: (f(c), None), x, length=2)[0]

    # d f(f(x)): 300 f(x) * 300 x with f(x) = 3 x
    assert jit_if(jitted, sf.filter_grad(loop))(S) == 300.0 * 6 * 300 * 2
    assert count.value == 20
    count.value = 0
    run = jit_if(jitted, sf.filter_vmap(sf.filter_grad(f)))
    assert np.array_equal(run(X), 300 * X)
    assert count.value == 10
    run = jit_if(jitted, sf.filter_grad(lambda x: sf.filter_checkpoint(f)(x)))
    assert run(S) == 600.0
    assert count.value == 20


@JIT
def test_differentiating_a_state_read_in_a_custom_vjp_raises_and_names_it(
    scale, count, jitted
):
    f = stateful_vjp(scale, count)
    run = jit_if(jitted, sf.filter_grad(lambda x: f(x), wrt=scale))
    with pytest.raises(
        sf.StateTraceError,
        match=r"^State 'scale' \(created at .*\) is read in f, which has a custom",
    ):
        run(S)
    assert count.value == 0


@JIT
def test_a_backward_rule_that_writes_a_state_is_refused(count, jitted):
    @sf.filter_custom_vjp
    def f(x):
        return x * count.value.astype(x.dtype)

    @f.def_fwd
    def fwd(perturbed, x):
        return f(x), None

    @f.def_bwd
    def bwd(residuals, grad, perturbed, x):
        count.value += 1
        return grad

    with pytest.raises(
        sf.StateTraceError,
        match=r"^a rule of the custom derivative of f wrote State 'count' \(created at",
    ):
        jit_if(jitted, sf.filter_grad(f))(S)
    assert count.value == 0


@JIT
@pytest.mark.parametrize("where", ["function", "fwd", "bwd"])
def test_a_rule_of_a_custom_vjp_that_raises_changes_no_state(
    where, jitted, scale, count
):
    def maybe(here):
        if where == here:
            raise RuntimeError("stop")

    @sf.filter_custom_vjp
    def f(x):
        count.value += 1
        maybe("function")
        return x

    @f.def_fwd
    def fwd(perturbed, x):
        count.value += 1
        maybe("fwd")
        return x, None

    @f.def_bwd
    def bwd(residuals, grad, perturbed, x):
        maybe("bwd")
        return grad

    def loss(x):
        scale.value = x
        return f(x)

    # Where it is differentiated the rule runs in place of the function.
    run = sf.filter_vmap(loss) if where == "function" else sf.filter_grad(loss)
    with pytest.raises(RuntimeError, match="stop"):
        jit_if(jitted, run)(X if where == "function" else S)
    assert (float(scale.value), int(count.value)) == (3.0, 0)


def test_custom_rules_leave_no_tracer(scale, count, checking_leaks):
    for make in (stateful_jvp, stateful_vjp):
        f = make(scale, count)
        f(S)
        sf.filter_grad(f)(S)
        sf.filter_jit(f)(S)
        sf.filter_jit(sf.filter_grad(f))(S)
    assert not isinstance(count.value, jax.core.Tracer)


def test_a_bare_state_is_no_result(count):
    f = sf.filter_custom_jvp(lambda x: count)
    f.def_jvp(lambda primals, tangents: (primals[0], tangents[0]))
    with pytest.raises(TypeError, match=r"^State 'count' .* was returned"):
        f(S)


@JIT
def test_a_rule_that_insists_on_what_is_differentiated_may_touch_states(
    scale, count, jitted
):
    @sf.filter_custom_jvp
    def f(x, y):
        count.value += 1
        return x * y * scale.value

    @f.def_jvp
    def rule(primals, tangents):
        (x, y), (tx, ty) = primals, tangents
        assert ty is None
        count.value += 10
        return x * y * scale.value, tx * scale.value

    assert jit_if(jitted, sf.filter_grad(f))(S, S) == 3.0
    assert count.value == 10
    # As here: it runs long after the call, and knows the States of the function.
    assert jit_if(jitted, sf.filter_grad(sf.filter_jit(f)))(S, S) == 3.0
    assert count.value == 20


def test_such_a_rule_is_refused_a_state_that_it_could_not_reach(scale, count):
    @sf.filter_custom_jvp
    def f(x, y):
        return x * y

    @f.def_jvp
    def rule(primals, tangents):
        (x, y), (tx, ty) = primals, tangents
        assert ty is None
        return x * y * scale.value, tx

    assert sf.filter_grad(f)(S, S) == 1.0
    assert sf.filter_jit(sf.filter_grad(f))(S, S) == 1.0
    with pytest.raises(
        sf.StateTraceError,
        match=r"^a rule of the custom derivative of f read State 'scale' \(created at",
    ):
        sf.filter_grad(sf.filter_jit(f))(S, S)


@JIT
def test_the_backward_rule_sees_what_the_forward_rule_wrote(count, jitted):
    last = sf.State(jnp.array(0.0), name="last")

    @sf.filter_custom_vjp
    def f(x):
        return x

    @f.def_fwd
    def fwd(perturbed, x):
        last.value = 10 * x
        return x, None

    @f.def_bwd
    def bwd(residuals, grad, perturbed, x):
        return last.value * grad

    assert jit_if(jitted, sf.filter_grad(f))(S) == 20.0
    assert jit_if(jitted, sf.filter_grad(sf.filter_jit(f)))(2 * S) == 40.0
    assert last.value == 40.0


@JIT
def test_new_states_of_the_function_and_the_rule_come_out(jitted):
    class Box(eqx.Module):
        s: sf.State

    @sf.filter_custom_vjp
    def f(x):
        return 2 * x, Box(sf.State(x))

    @f.def_fwd
    def fwd(perturbed, x):
        inner = sf.State(x * 5)  # not returned: has no meaning outside
        return (2 * x, Box(sf.State(inner.value))), Box(sf.State(x * 7))

    @f.def_bwd
    def bwd(residuals, grad, perturbed, x):
        return residuals.s.value * grad[0]

    _, box = jit_if(jitted, lambda x: f(x))(S)
    assert box.s.value == 2.0
    grad, box = jit_if(jitted, sf.filter_grad(f, has_aux=True))(S)
    assert (grad, box.s.value) == (14.0, 10.0)


@JIT
def test_states_that_hold_what_a_transform_around_traces(scale, count, jitted):
    """They are found by and by, and the call is made again: nothing is done twice."""
    other = sf.State(jnp.array(5.0), name="other")
    f = stateful_jvp(scale, count)

    @sf.filter_custom_jvp
    def outer(x):
        return f(x) + other.value

    @outer.def_jvp
    def rule(primals, tangents):
        return sf.filter_jvp(f, primals, tangents)[0] + other.value, tangents[0]

    def lane(x):
        scale.value, other.value = x, 2 * x
        return outer(x)

    run = jit_if(jitted, sf.filter_vmap(lane, state_axes=[(scale, 0), (other, 0)]))
    scale.value = other.value = jnp.zeros(2)
    assert np.array_equal(run(X), X * X + 2 * X)
    assert count.value == 1
    run = jit_if(
        jitted,
        sf.filter_vmap(sf.filter_grad(lane), state_axes=[(scale, 0), (other, 0)]),
    )
    with pytest.raises(sf.StateTraceError, match=r"^State 'scale' .* is read in"):
        run(X)
    assert count.value == 1


def test_a_callable_without_a_name_may_have_rules(scale):
    f = sf.filter_custom_jvp(eqx.nn.Lambda(lambda x: x * scale.value))
    f.def_jvp(lambda primals, tangents: (f(*primals), tangents[0]))
    assert f(S) == 6.0
    assert sf.filter_jit(jax.grad(f))(S) == 1.0
    with pytest.raises(AttributeError, match="No JVP defined for "):
        sf.filter_custom_jvp(eqx.nn.Identity())(S)


@JIT
@pytest.mark.parametrize("kind", ["jvp", "vjp"])
@pytest.mark.parametrize("loop", [False, True])
def test_what_a_rule_writes_may_be_read_by_the_next_call(kind, loop, jitted):
    """No derivative flows through a write, also not into the next call."""
    mean = sf.State(jnp.array(1.0), name="mean")

    def normalise(x):
        mean.value = 0.5 * mean.value + x
        return x / mean.value

    f = getattr(sf, f"filter_custom_{kind}")(normalise)
    if kind == "jvp":
        f.def_jvp(lambda primals, tangents: (normalise(*primals), 3 * tangents[0]))
    else:
        f.def_fwd(lambda perturbed, x: (normalise(x), None))
        f.def_bwd(lambda residuals, grad, perturbed, x: 3 * grad)

    def twice(x):
        if loop:
            return sf.scan(lambda c, _: (f(c), None), x, length=2)[0]
        return f(f(x))

    assert jit_if(jitted, sf.filter_grad(twice))(S) == 9.0
    assert mean.value == 0.5 * (0.5 * 1 + 2) + 2 / 2.5


def test_many_states_that_hold_tracers_are_found_at_once():
    many = [sf.State(jnp.ones(2) * i, name=str(i)) for i in range(20)]
    runs = []

    @sf.filter_custom_jvp
    def f(x):
        return x * sum(s.value for s in many)

    @f.def_jvp
    def rule(primals, tangents):
        runs.append(0)
        return primals[0] * sum(s.value for s in many), tangents[0]

    out = sf.filter_vmap(sf.filter_value_and_grad(f), state_axes=0)(X)
    assert eqx.tree_equal(out, (X * 190, jnp.ones(2)))
    assert len(runs) == 3
