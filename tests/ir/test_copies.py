"""Copy propagation: what is a copy, and what only looks like one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxpr_as_fun

from tests.ir.helpers import checked, find, names, top, trace

NAME = "copy_propagation"
X = jnp.arange(6.0).reshape(2, 3)


def weak_to_strong(x):
    return lax.convert_element_type(x, np.float32)


TABLE = {
    "copy": (lambda x: jnp.array(x, copy=True) + 1, (X,), ["add"]),
    "copy that is returned": (lambda x: jnp.copy(x), (X,), []),
    "copies of copies": (lambda x: jnp.copy(jnp.copy(jnp.copy(x))) + 1, (X,), ["add"]),
    "through a jit": (
        lambda x: jax.jit(lambda x, y: (x, y + 1))(x, x)[0] * 2,
        (X,),
        ["jit", "mul"],
    ),
}


@pytest.mark.parametrize(("fn", "args", "left"), TABLE.values(), ids=TABLE)
def test_before_and_after(fn, args, left):
    jaxpr = trace(fn, *args)
    plain = checked(NAME, jaxpr)
    assert top(plain) == left
    assert np.array_equal(jax.jit(jaxpr_as_fun(plain))(*args)[0], fn(*args))


def test_convert_to_the_same_type_goes():
    # Tracing never writes one down: a conversion to float16, turned by hand.
    jaxpr = trace(lambda x: lax.convert_element_type(x, np.float16) + 1, X)
    convert, add = jaxpr.eqns
    var = type(convert.outvars[0])(X_AVAL := convert.invars[0].aval)
    convert = convert.replace(
        outvars=[var], params={**convert.params, "new_dtype": np.dtype(np.float32)}
    )
    one = jax.extend.core.Literal(np.float32(1), jax.core.ShapedArray((), np.float32))
    add = add.replace(invars=[var, one], outvars=[type(var)(X_AVAL)], params=add.params)
    inner = jaxpr.jaxpr.replace(eqns=[convert, add], outvars=add.outvars)
    jaxpr = jax.extend.core.ClosedJaxpr(inner, [])
    assert top(checked(NAME, jaxpr)) == ["add"]


def same(value):
    return jax.sharding.SingleDeviceSharding(value.devices().pop())


MEANT = {
    "device_put": (lambda x: jax.device_put(x), "device_put"),
    "device_put to a device": (lambda x: jax.device_put(x, same(X)), "device_put"),
    "sharding constraint": (
        lambda x: lax.with_sharding_constraint(x, same(X)),
        "sharding_constraint",
    ),
    "optimization_barrier": (lax.optimization_barrier, "optimization_barrier"),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 8, 23), "reduce_precision"),
    "stop_gradient": (lax.stop_gradient, "stop_gradient"),
    "checkpoint name": (lambda x: checkpoint_name(x, "x"), "name"),
}


@pytest.mark.parametrize(("fn", "primitive"), MEANT.values(), ids=MEANT)
def test_never_drops_what_means_something(fn, primitive):
    jaxpr = trace(lambda x: fn(x) + 1, X)
    before = names(jaxpr)
    assert before.total() == 2
    for name in ("copy_propagation", "algebraic_simplification", "cse", "dce"):
        assert names(checked(name, jaxpr)) == before, (name, primitive)


def test_never_drops_a_convert_that_makes_a_type_strong():
    jaxpr = trace(weak_to_strong, 2.0)
    assert top(jaxpr) == ["convert_element_type"]
    assert checked(NAME, jaxpr) is jaxpr


def test_jit_with_an_output_sharding_is_not_looked_through():
    fn = jax.jit(lambda x: (x, x + 1), out_shardings=same(X))
    jaxpr = trace(lambda x: fn(x)[0] * 2, X)
    plain = checked(NAME, jaxpr)
    assert plain.eqns[1].invars[0] is plain.eqns[0].outvars[0]


def test_jit_that_donates_is_not_looked_through():
    fn = jax.jit(lambda x: (x, x + 1), donate_argnums=0)
    jaxpr = trace(lambda x: fn(x)[0] * 2, X)
    mul = find(checked(NAME, jaxpr), "mul")
    assert mul.invars[0] not in jaxpr.jaxpr.invars


def test_output_returned_twice_is_one():
    def fn(x):
        y = x + 1
        return y, y

    jaxpr = trace(lambda x: lax.mul(*jax.jit(fn)(x)), X)
    mul = find(checked(NAME, jaxpr), "mul")
    assert mul.invars[0] is mul.invars[1]
