"""Algebraic simplification: small jaxprs before and after, and what stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import ClosedJaxpr, Literal, primitives

from statefun import ir
from tests.ir.helpers import checked, find, names, top, trace

NAME = "algebraic_simplification"
X = jnp.arange(6.0).reshape(2, 3)
I = jnp.arange(6).reshape(2, 3)  # noqa: E741
P = jnp.array([[True, False, True], [False, False, True]])

# function, arguments, primitives left once dce has swept up
TABLE = {
    "product with a splat": (
        lambda x: lax.mul(x, lax.full(x.shape, np.float32(1))),
        (X,),
        [],
    ),
    "one on the left": (lambda x: np.float32(1) * x, (X,), []),
    "int minus itself": (lambda x: x - x, (I,), ["broadcast_in_dim"]),
    "scalar int minus itself": (lambda x: x - x, (jnp.int32(3),), []),
    "int times zero": (lambda x: x * np.int32(0), (I,), ["broadcast_in_dim"]),
    "then and": (lambda x: (x - x) & x, (I,), ["broadcast_in_dim"]),
    "select on not": (lambda p, x, y: lax.select(~p, x, y), (P, X, -X), ["select_n"]),
    "select of bools": (
        lambda p: lax.select(p, lax.full(p.shape, True), lax.full(p.shape, False)),
        (P,),
        [],
    ),
    "select of bools, other way": (
        lambda p: lax.select(p, lax.full(p.shape, False), lax.full(p.shape, True)),
        (P,),
        ["not"],
    ),
    "three selects": (
        lambda x, y: lax.select_n(np.int32(2), x, y, x + y),
        (X, X),
        ["add"],
    ),
    "transposes": (
        lambda x: x[None].transpose(1, 2, 0).transpose(1, 2, 0).transpose(1, 2, 0),
        (X,),
        ["broadcast_in_dim"],
    ),
    "two transposes": (
        lambda x: x.transpose(1, 2, 0).transpose(1, 0, 2),
        (jnp.zeros((2, 3, 4)),),
        ["transpose"],
    ),
    "reshapes": (lambda x: x.reshape(6).reshape(3, 2), (X,), ["reshape"]),
    "reshape, squeeze, expand": (
        lambda x: jnp.expand_dims(x.reshape(1, 6).squeeze(0), 1).reshape(2, 3),
        (X,),
        [],
    ),
    "broadcasts": (
        lambda x: lax.broadcast(lax.broadcast(x, (4,)), (5,)),
        (X,),
        ["broadcast_in_dim"],
    ),
    "broadcast through added axes": (
        lambda x: lax.broadcast_in_dim(x[:, None], (2, 5, 3), (0, 1, 2)),
        (X,),
        ["broadcast_in_dim"],
    ),
    "sum of one": (
        lambda x: x.reshape(1, 6).sum(0).reshape(2, 3),
        (X,),
        [],
    ),
    "inside a jit": (lambda x: jax.jit(lambda x: x * 1.0 + 2)(x), (X,), ["jit"]),
}


@pytest.mark.parametrize(("fn", "args", "left"), TABLE.values(), ids=TABLE)
def test_before_and_after(fn, args, left):
    jaxpr = trace(fn, *args)
    simple = checked(NAME, jaxpr)
    assert top(ir.dce(simple)) == left
    got = jax.jit(jax.extend.core.jaxpr_as_fun(simple))(*args)
    assert np.array_equal(got[0], fn(*args))


def test_never_changes_a_weak_type():
    jaxpr = trace(lambda x: lax.mul(x, jnp.float32(1)), 2.0)
    assert jaxpr.in_avals[0].weak_type and not jaxpr.out_avals[0].weak_type
    assert checked(NAME, jaxpr) is jaxpr


def test_a_weak_zero_stays_weak():
    jaxpr = trace(lambda x: x - x, 3)
    assert jaxpr.out_avals[0].weak_type
    simple = checked(NAME, jaxpr)
    assert top(simple) == [] and isinstance(simple.jaxpr.outvars[0], Literal)
    out = jax.jit(jax.extend.core.jaxpr_as_fun(simple))(3)
    assert out[0].weak_type


STAYS = {
    "max of a float with itself": (lambda x: lax.max(x, x), (X,)),
    "part of an array": (lambda x: lax.slice(x, (0, 1), (2, 3)), (X,)),
    "every second": (lambda x: lax.slice(x, (0, 0), (1, 3), (2, 1)), (X,)),
    "a pad that cuts and fills": (
        lambda x: lax.pad(x, np.float32(0), [(1, -1, 0), (0, 0, 0)]),
        (X,),
    ),
    "rev": (lambda x: lax.rev(x, (1,)), (X,)),
    "real transpose": (lambda x: x.T, (X,)),
    "sum of two": (lambda x: x.sum(0), (X,)),
    "select out of range": (lambda x, y: lax.select_n(np.int32(7), x, y, x), (X, X)),
    "neg of abs": (lambda x: -lax.abs(x), (X,)),
    "bool and its negation": (lambda p: p & ~p, (P,)),
    "division of one": (lambda x: 1.0 / x, (X,)),
    "stop_gradient": (lambda x: lax.stop_gradient(x), (X,)),
    "power of two": (lambda x: lax.integer_pow(x, 2), (X,)),
}


@pytest.mark.parametrize(("fn", "args"), STAYS.values(), ids=STAYS)
def test_stays(fn, args):
    jaxpr = trace(fn, *args)
    assert jaxpr.eqns
    assert checked(NAME, jaxpr) is jaxpr


def test_never_moves_an_operation_to_another_place():
    def fn(x):
        with set_xla_metadata(stream="other"):
            y = x.T
        return y.T

    jaxpr = trace(fn, X)
    assert names(checked(NAME, jaxpr))["transpose"] == 2


def test_never_composes_what_is_sharded():
    mesh = jax.make_mesh((2,), ("x",))

    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.zeros((4, 4)), jax.P("x"))
        jaxpr = trace(lambda x: x.T.T * 1.0, x)
        simple = checked(NAME, jaxpr)
    assert top(simple) == ["transpose", "transpose"]  # the product may go


def test_gradients_stay():
    def fn(x):
        y = lax.neg(lax.neg(x * 1.0)) + jnp.where(x > 0, x, x) ** 1
        return (y.reshape(6).reshape(2, 3) / 1.0 - 0.0).T.T.sum()

    jaxpr = trace(fn, X)
    simple = checked(NAME, jaxpr)
    assert simple is not jaxpr
    want = jax.grad(fn)(X)
    got = jax.grad(lambda x: jax.extend.core.jaxpr_as_fun(simple)(x)[0])(X)
    assert np.array_equal(want, got)


def by_hand(jaxpr, eqns):
    return ClosedJaxpr(jaxpr.jaxpr.replace(eqns=eqns), jaxpr.consts)


def test_broadcast_to_the_same_shape():
    # Tracing never writes one down: two broadcasts, the second turned by hand.
    jaxpr = trace(lambda x: lax.broadcast(x, (2,)) + 1, jnp.zeros(2))
    first, second = jaxpr.eqns
    same = first.replace(
        invars=second.outvars,
        outvars=[type(first.outvars[0])(first.outvars[0].aval)],
        params={
            "shape": (2, 2),
            "broadcast_dimensions": (0, 1),
            "sharding": None,
        },
    )
    jaxpr = ClosedJaxpr(
        jaxpr.jaxpr.replace(eqns=[first, second, same], outvars=same.outvars), []
    )
    assert top(checked(NAME, jaxpr)) == ["broadcast_in_dim", "add"]
    assert top(checked("copy_propagation", jaxpr)) == ["broadcast_in_dim", "add"]


def test_reshape_that_transposes_stays():
    jaxpr = trace(lambda x: x.reshape(6).reshape(3, 2), X)
    first, second = jaxpr.eqns
    odd = first.replace(params={**first.params, "dimensions": (1, 0)})
    assert first.primitive is primitives.reshape_p
    jaxpr = by_hand(jaxpr, [odd, second])
    assert ir.algebraic_simplification(jaxpr) is jaxpr


def test_rule_sees_through_a_splat_only():
    jaxpr = trace(lambda x, y: x * lax.broadcast(y, (2, 3)), X, jnp.float32(1))
    assert checked(NAME, jaxpr) is jaxpr
    assert find(jaxpr, "mul")
