"""JAX's tracer errors speak of the user's function and of its arguments."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import statefun as sf

ONE, ONES = jnp.ones(()), jnp.ones(3)


class Norm(eqx.Module):
    scale: jax.Array


class Net(eqx.Module):
    norm: Norm


def my_step(x):
    return x if x > 0 else -x


def my_net(net, x):
    return x if net.norm.scale > 0 else -x


def my_body(carry, row):
    return (carry, row) if row > 0 else (carry + 1, row)


def my_fori(i, val):
    return val if i > 0 else -val


def shard(fun):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))
    return sf.filter_jit(sf.shard_map(fun, mesh=mesh, in_specs=P(), out_specs=P()))


CALLS = {
    "filter_jit": (lambda: sf.filter_jit(my_net)(Net(Norm(ONE)), ONE), "my_net"),
    "by name": (lambda: sf.filter_jit(my_net)(net=Net(Norm(ONE)), x=ONE), "my_net"),
    "grad": (lambda: sf.filter_jit(sf.filter_grad(my_step))(ONE), "my_step"),
    "scan": (lambda: sf.scan(my_body, ONE, ONES), "my_body"),
    "map": (lambda: sf.map(my_step, ONES), "my_step"),
    "fori_loop": (lambda: sf.fori_loop(0, 3, my_fori, ONE), "my_fori"),
    "while_loop": (lambda: sf.while_loop(lambda x: x > 0, my_step, ONE), "my_step"),
    "condition": (lambda: sf.while_loop(my_step, lambda x: x, ONE), "my_step"),
    "cond": (lambda: sf.cond(ONE > 0, my_step, my_step, ONE), "my_step"),
    "switch": (lambda: sf.switch(0, [my_step, my_step], ONE), "my_step"),
    "checkpoint": (lambda: sf.filter_checkpoint(my_step)(ONE), "my_step"),
    "convert": (lambda: sf.filter_closure_convert(my_step, ONE), "my_step"),
    "checkify": (lambda: sf.checkify(my_step)(ONE), "my_step"),
    "shard_map": (lambda: shard(my_step)(ONE), "my_step"),
}
ARGUMENT = {
    "my_net": "net.norm.scale",
    "my_step": "x",
    "my_body": "row",
    "my_fori": "i",
}


@pytest.mark.parametrize(("call", "fun"), CALLS.values(), ids=CALLS)
def test_a_tracer_error_names_the_function_and_the_argument(call, fun):
    with pytest.raises(jax.errors.TracerBoolConversionError) as error:
        call()
    assert f"tracing the function {fun} at {__file__}" in str(error.value)
    assert f"of the argument {ARGUMENT[fun]}." in str(error.value)


def test_arguments_of_one_name_are_told_apart():
    def f(x, /, **rest):
        return x if rest["x"] > 0 else -x

    with pytest.raises(jax.errors.TracerBoolConversionError, match=r"x \(array 1\)"):
        sf.filter_jit(f)(ONE, x=ONE)
