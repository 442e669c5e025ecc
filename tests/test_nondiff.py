"""States whose derivative would be lost in other libraries: right, or an error."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import statefun as sf

from .fresh import run_fresh

MATRIX = jnp.array([[2.0, 1.0], [0.0, 3.0]])
B = jnp.ones(2)
LIKE = jax.ShapeDtypeStruct((2,), jnp.float32)
GMRES = lx.GMRES(1e-5, 1e-5)

matrix = sf.Param(MATRIX, name="matrix")


def by_global(x):
    return matrix.value @ x


class Field(eqx.Module):
    weight: sf.Param

    def __call__(self, x, *_):
        return self.weight.value @ x

    def slope(self, t, y, args):
        return -(self.weight.value @ y)


class Operator(lx.AbstractLinearOperator):
    weight: sf.Param

    def mv(self, vector):
        return self.weight.value @ vector

    def as_matrix(self):
        return self.weight.value

    def transpose(self):
        return lx.MatrixLinearOperator(self.weight.value.T)

    def in_structure(self):
        return LIKE

    out_structure = in_structure


def _no(_):
    return False


for question in (
    lx.is_symmetric,
    lx.is_diagonal,
    lx.is_tridiagonal,
    lx.is_lower_triangular,
    lx.is_upper_triangular,
    lx.has_unit_diagonal,
    lx.is_positive_semidefinite,
    lx.is_negative_semidefinite,
):
    question.register(Operator)(_no)
for same in (lx.linearise, lx.materialise, lx.conj):
    same.register(Operator)(lambda operator: operator)


def solve(operator, solver):
    return lx.linear_solve(operator, B, solver).value.sum()


def function(f):
    return lx.FunctionLinearOperator(f, LIKE)


HIDDEN = {
    "global": lambda: function(by_global),
    "jacobian": lambda: lx.JacobianLinearOperator(lambda x, _: matrix.value @ x, B),
    "argument": lambda: lx.JacobianLinearOperator(
        lambda x, f: f(x), B, args=Field(matrix)
    ),
    "own operator": lambda: Operator(matrix),
    "sum": lambda: function(by_global) + lx.MatrixLinearOperator(jnp.eye(2)),
}
READ_BY_SOLVER = r"Param 'matrix' \(created at .*\) was read by a solver of lineax"


def gradients(f):
    """With a jit around the gradient, and inside of it."""
    yield lambda: sf.filter_grad(f, wrt=matrix)()
    yield lambda: sf.filter_jit(sf.filter_grad(f, wrt=matrix))()
    yield lambda: sf.filter_grad(sf.filter_jit(f), wrt=matrix)()


@pytest.mark.parametrize("solver", [lx.LU(), GMRES], ids=["LU", "GMRES"])
@pytest.mark.parametrize("make", HIDDEN.values(), ids=HIDDEN.keys())
def test_an_operator_that_hides_a_state_has_no_gradient_of_zeros(make, solver):
    for gradient in gradients(lambda: solve(make(), solver)):
        with pytest.raises(sf.StateTraceError, match=READ_BY_SOLVER):
            gradient()


def test_a_gradient_of_which_a_part_would_be_lost_is_refused():
    def f():
        return lx.linear_solve(
            function(by_global), matrix.value[0], lx.LU()
        ).value.sum()

    with pytest.raises(sf.StateTraceError, match=READ_BY_SOLVER):
        sf.filter_grad(f, wrt=matrix)()


def test_a_forward_mode_derivative_that_would_be_lost_is_refused():
    def f(field):
        return solve(function(by_global), lx.LU())

    primals, tangents = (Field(matrix),), (Field(jnp.ones((2, 2))),)
    with pytest.raises(sf.StateTraceError, match=READ_BY_SOLVER):
        sf.filter_jvp(f, primals, tangents)


def test_an_operator_that_converts_its_closure_has_its_gradient():
    mine = matrix
    expected = jax.grad(lambda a: jnp.linalg.solve(a, B).sum())(MATRIX)
    for f in (lambda x: mine.value @ x, Field(matrix)):
        for gradient in gradients(lambda f=f: solve(function(f), lx.LU())):
            np.testing.assert_allclose(gradient(), expected, atol=1e-4)


def test_an_operator_that_hides_a_state_has_its_value():
    value = sf.filter_jit(lambda: solve(function(by_global), lx.LU()))
    np.testing.assert_allclose(value(), 0.5 * (1 - 1 / 3) + 1 / 3, rtol=1e-5)


def test_a_state_that_is_not_differentiated_may_be_hidden():
    b = sf.Param(B)

    def f():
        return lx.linear_solve(function(by_global), b.value, lx.LU()).value.sum()

    expected = jnp.linalg.solve(MATRIX.T, B)
    np.testing.assert_allclose(sf.filter_grad(f, wrt=b)(), expected, rtol=1e-5)


OTHERS = {
    "root_find, args": lambda w: (
        optx.root_find(
            lambda x, f: f(x) - B, optx.Newton(1e-6, 1e-6), B, args=Field(w)
        ).value
    ),
    "root_find, global": lambda w: (
        optx.root_find(
            lambda x, _: matrix.value @ x - B, optx.Newton(1e-6, 1e-6), B
        ).value
    ),
    "diffeqsolve, term": lambda w: (
        diffrax.diffeqsolve(
            diffrax.ODETerm(Field(w).slope), diffrax.Heun(), 0.0, 1.0, 0.1, B
        ).ys
    ),
    "diffeqsolve, args": lambda w: (
        diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, f: -f(y)),
            diffrax.Heun(),
            0.0,
            1.0,
            0.1,
            B,
            Field(w),
        ).ys
    ),
}
PURE = {
    "root_find": lambda a: jnp.linalg.solve(a, B),
    "diffeqsolve": lambda a: (
        diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, _: -(a @ y)), diffrax.Heun(), 0.0, 1.0, 0.1, B
        ).ys
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_state_in_what_another_library_compiles_has_its_gradient(name):
    pure = PURE[name.partition(",")[0]]
    expected = jax.grad(lambda a: pure(a).sum())(MATRIX)
    for gradient in gradients(lambda: OTHERS[name](matrix).sum()):
        np.testing.assert_allclose(gradient(), expected, atol=1e-4)


def test_a_gradient_that_was_refused_leaves_no_tracer_to_jax():
    run_fresh("""
        import jax, jax.numpy as jnp, statefun as sf

        w = sf.Param(jnp.array(2.0))
        fails = True

        @jax.jit
        def f():
            return w.value**2

        def loss():
            y = f()
            if fails:
                raise KeyError
            return y

        try:
            sf.filter_jit(sf.filter_grad(loss, wrt=w))()
        except KeyError:
            pass
        fails = False
        assert sf.filter_jit(sf.filter_grad(loss, wrt=w))() == 4
    """)


def test_a_custom_rule_in_a_compiled_gradient_does_not_trace_for_ever():
    @jax.custom_jvp
    def f(x):
        return matrix.value @ x

    f.defjvp(lambda primals, tangents: (f(*primals), tangents[0]))
    gradient = sf.filter_jit(sf.filter_grad(lambda: f(B).sum(), wrt=matrix))
    with pytest.raises(
        sf.StateTraceError, match="the value of Param 'matrix' .* was use"
    ):
        gradient()


def test_a_raw_jit_of_a_module_with_states_sees_what_is_written():
    run_fresh("""
        import equinox as eqx, jax.numpy as jnp, statefun as sf

        class Module(eqx.Module):
            count: sf.State

        @eqx.filter_jit
        def read(module):
            return module.count.value

        module = Module(sf.State(jnp.array(0)))

        def step(module):
            before = read(module)
            module.count.value += 1
            return before, read(module)

        for n, run in enumerate((sf.filter_jit(step), sf.filter_jit(step), step)):
            try:
                assert [*map(int, run(module))] == [n, n + 1], n
            except (TypeError, ValueError) as error:
                assert run is step and "was hashed" in str(error)
            else:
                assert run is not step
    """)
