"""`shard_map`: JAX's, with States that are replicated or held in pieces."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import statefun as sf

X = jnp.arange(8.0)
elsewhere = sf.State(jnp.zeros(8), name="elsewhere")  # reached as a global


@pytest.fixture
def mesh():
    return jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))


@pytest.fixture
def square():
    return jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture
def total():
    return sf.State(jnp.array(0.0), name="total")


@pytest.fixture
def pieces():
    return sf.State(jnp.zeros(8), name="pieces")


JIT = pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])


def jit_if(jitted, fun):
    return sf.filter_jit(fun) if jitted else fun


# -- as in JAX ----------------------------------------------------------------------


def test_the_signature_is_that_of_jax_with_our_keyword_after():
    ours = inspect.signature(sf.shard_map).parameters
    theirs = inspect.signature(jax.shard_map).parameters
    assert list(ours) == [*theirs, "state_specs"]
    for p in theirs:
        assert ours[p].kind == theirs[p].kind
        assert ours[p].default is theirs[p].default or (
            ours[p].default == theirs[p].default
        )
    assert ours["state_specs"].default is None
    assert not hasattr(sf, "pmap")


PURE = {
    "elementwise": (lambda x: x * 2, {"in_specs": P("d"), "out_specs": P("d")}, (X,)),
    "psum": (
        lambda x: jax.lax.psum(x, "d"),
        {"in_specs": P("d"), "out_specs": P()},
        (X,),
    ),
    "two arguments": (
        lambda x, y: (x + y[0], {"sum": jax.lax.psum(x.sum(), "d")}),
        {"in_specs": (P("d"), P(None)), "out_specs": (P("d"), P())},
        (X, X),
    ),
    "trees with a prefix of specs": (
        lambda t: jax.tree.map(lambda x: x * 2, t),
        {"in_specs": (P("d"),), "out_specs": P("d")},
        ({"a": X, "b": [X]},),
    ),
    "trees of specs": (
        lambda t: t["a"] * t["b"],
        {"in_specs": ({"a": P("d"), "b": P()},), "out_specs": P("d")},
        ({"a": X, "b": jnp.array(3.0)},),
    ),
    "axis_index": (
        lambda x: x + jax.lax.axis_index("d").astype(x.dtype),
        {"in_specs": P("d"), "out_specs": P("d")},
        (X,),
    ),
    "no check": (
        lambda x: x[:1] * 0 + 1,
        {"in_specs": P("d"), "out_specs": P(), "check_vma": False},
        (X,),
    ),
    "axis_names": (
        lambda x: jax.lax.psum(x, "d"),
        {"in_specs": P("d"), "out_specs": P(), "axis_names": {"d"}},
        (X,),
    ),
}


@JIT
@pytest.mark.parametrize("case", PURE)
def test_without_states_it_is_jax(case, jitted, mesh):
    fun, options, args = PURE[case]
    ours = sf.shard_map(fun, mesh=mesh, **options)
    theirs = jax.shard_map(fun, mesh=mesh, **options)
    got = jit_if(jitted, lambda *args: ours(*args))(*args)
    want = jax.jit(theirs)(*args) if jitted else theirs(*args)
    assert eqx.tree_equal(got, want, typematch=True)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_the_mesh_and_the_specs_may_come_from_the_context():
    explicit = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit):
        x = jax.device_put(X, NamedSharding(explicit, P("d")))
        ours = sf.shard_map(lambda x: x * 2, out_specs=P("d"))(x)
        theirs = jax.shard_map(lambda x: x * 2, out_specs=P("d"))(x)
        assert eqx.tree_equal(ours, theirs)


def test_it_is_a_decorator_and_keeps_the_functions_name(mesh):
    @sf.shard_map(mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    def double(x):
        """Twice."""
        return 2 * x

    assert (double.__name__, double.__doc__) == ("double", "Twice.")
    assert np.array_equal(double(X), 2 * X)


ERRORS = {
    "not divisible": (lambda x: x, {"in_specs": P("d"), "out_specs": P("d")}, (X[:6],)),
    "unknown axis": (lambda x: x, {"in_specs": P("z"), "out_specs": P("d")}, (X,)),
    "out_specs that promise too much": (
        lambda x: x,
        {"in_specs": P("d"), "out_specs": P()},
        (X,),
    ),
    "too long a spec": (
        lambda x: x,
        {"in_specs": P("d", None), "out_specs": P("d")},
        (X,),
    ),
    "wrong structure of in_specs": (
        lambda x: x,
        {"in_specs": (P("d"), P("d")), "out_specs": P("d")},
        (X,),
    ),
    "wrong structure of out_specs": (
        lambda x: x,
        {"in_specs": P("d"), "out_specs": (P("d"), P("d"))},
        (X,),
    ),
    "no mesh": (
        lambda x: x,
        {"in_specs": P("d"), "out_specs": P("d"), "mesh": None},
        (X,),
    ),
    "a scalar to be split": (
        lambda x: x.sum(),
        {"in_specs": P("d"), "out_specs": P("d")},
        (X,),
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_of_the_types_that_jax_raises(case, mesh):
    fun, options, args = ERRORS[case]
    options = {"mesh": mesh} | options
    with pytest.raises(Exception) as theirs:
        jax.shard_map(fun, **options)(*args)
    with pytest.raises(type(theirs.value)):
        sf.shard_map(fun, **options)(*args)


def test_arguments_and_results_may_hold_anything(mesh):
    def f(t):
        return {"y": t["f"](t["x"]), "label": t["label"]}

    run = sf.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    out = run({"x": X, "f": jnp.sin, "label": "a"})
    assert out["label"] == "a"
    np.testing.assert_allclose(out["y"], jnp.sin(X), rtol=1e-6)


# -- replicated States --------------------------------------------------------------


@JIT
def test_states_are_replicated_by_default(mesh, total, jitted):
    scale = sf.State(jnp.array(3.0), name="scale")

    def f(x):
        assert x.shape == (2,)
        total.value += jax.lax.psum(jnp.sum(x), "d")
        return x * scale.value

    run = jit_if(jitted, sf.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d")))
    for i in (1, 2):
        assert np.array_equal(run(X), 3 * X)
        assert total.value == 28.0 * i
    scale.value = 5.0
    assert np.array_equal(run(X), 5 * X)


@JIT
def test_a_value_that_differs_between_devices_is_refused_for_a_replicated_state(
    mesh, total, pieces, jitted
):
    def f(x):
        total.value += 1
        pieces.value = x
        return x

    run = jit_if(jitted, sf.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d")))
    with pytest.raises(
        sf.StateTraceError,
        match=r"^inside `shard_map` a value that differs between devices was written to "
        r"State 'pieces' \(created at",
    ) as caught:
        run(X)
    assert "state_specs" in str(caught.value)
    assert total.value == 0.0
    assert np.array_equal(pieces.value, jnp.zeros(8))


def test_a_mean_over_one_axis_still_differs_along_the_other(square, total):
    def one(x):
        total.value = jax.lax.psum(jnp.sum(x), "a")
        return x

    def both(x):
        total.value = jax.lax.psum(jnp.sum(x), ("a", "b"))
        return x

    options = {"mesh": square, "in_specs": P(("a", "b")), "out_specs": P(("a", "b"))}
    with pytest.raises(sf.StateTraceError, match="differs between devices"):
        sf.shard_map(one, **options)(X)
    sf.shard_map(both, **options)(X)
    assert total.value == 28.0


# -- States that are held in pieces -------------------------------------------------


@JIT
@pytest.mark.parametrize("by", ["state", "kind", "predicate", "all"])
def test_a_state_may_be_held_in_pieces(mesh, pieces, jitted, by):
    specs = {
        "state": [(pieces, P("d"))],
        "kind": [(sf.Param, P()), (sf.State, P("d"))],
        "predicate": [(lambda s: s.name == "pieces", P("d"))],
        "all": P("d"),
    }[by]

    def f(x):
        assert pieces.value.shape == (2,)
        pieces.value = pieces.value + x
        return 2 * pieces.value

    run = jit_if(
        jitted,
        sf.shard_map(
            f, mesh=mesh, in_specs=P("d"), out_specs=P("d"), state_specs=specs
        ),
    )
    for i in (1, 2):
        assert np.array_equal(run(X), 2 * i * X)
        assert np.array_equal(pieces.value, i * X)
    assert pieces.value.sharding.is_equivalent_to(NamedSharding(mesh, P("d")), 1)


@JIT
def test_replicated_and_split_states_side_by_side(square, total, pieces, jitted):
    rows = sf.State(jnp.zeros((2, 3)), name="rows")

    def f(x):
        total.value += jax.lax.psum(jnp.sum(x), ("a", "b"))
        pieces.value = pieces.value + x
        rows.value = rows.value + jax.lax.axis_index("a").astype(jnp.float32)
        return x

    specs = [(pieces, P(("a", "b"))), (rows, P("a"))]
    run = sf.shard_map(
        f,
        mesh=square,
        in_specs=P(("a", "b")),
        out_specs=P(("a", "b")),
        state_specs=specs,
    )
    jit_if(jitted, run)(X)
    assert total.value == 28.0
    assert np.array_equal(pieces.value, X)
    assert np.array_equal(rows.value, [[0.0] * 3, [1.0] * 3])


@JIT
def test_a_split_state_may_be_one_that_the_closure_does_not_show(mesh, jitted):
    elsewhere.value = jnp.ones(8)

    def f(x):
        elsewhere.value = elsewhere.value * x
        return x

    run = sf.shard_map(
        f, mesh=mesh, in_specs=P("d"), out_specs=P("d"), state_specs=P("d")
    )
    jit_if(jitted, run)(X)
    assert np.array_equal(elsewhere.value, X)


@JIT
def test_a_split_state_may_be_written_without_being_read(mesh, pieces, jitted):
    def f(x):
        pieces.value = x * x

    run = sf.shard_map(
        f, mesh=mesh, in_specs=P("d"), out_specs=P(), state_specs=[(pieces, P("d"))]
    )
    jit_if(jitted, run)(X)
    assert np.array_equal(pieces.value, X * X)


def test_a_state_that_holds_a_module_is_split_leaf_by_leaf(mesh, key):
    net = eqx.nn.Linear(3, 8, key=key)
    held = sf.Param(net, name="net")

    def f(x):
        y = held.value(x)
        held.value = jax.tree.map(lambda p: p * 2, held.value)
        return y

    run = sf.shard_map(
        f, mesh=mesh, in_specs=P(), out_specs=P("d"), state_specs=[(held, P("d"))]
    )
    x = jnp.ones(3)
    np.testing.assert_allclose(run(x), net(x), rtol=1e-6)
    assert np.array_equal(held.value.weight, 2 * net.weight)
    assert np.array_equal(held.value.bias, 2 * net.bias)
    pieces = held.value.weight.addressable_shards
    assert [piece.data.shape for piece in pieces] == [(2, 3)] * 4


# -- gradients, nests, failures -----------------------------------------------------


@JIT
def test_gradients_with_respect_to_states_go_through(mesh, pieces, jitted):
    w = sf.Param(jnp.array(3.0), name="w")
    pieces.value = X

    def f(x):
        return jax.lax.psum(jnp.sum(w.value**2 * pieces.value * x), "d")

    run = sf.shard_map(
        f, mesh=mesh, in_specs=P("d"), out_specs=P(), state_specs=[(pieces, P("d"))]
    )
    grads = jit_if(jitted, sf.filter_grad(lambda x: run(x), wrt=[w, pieces]))(
        jnp.ones(8)
    )
    assert grads[0] == 6 * 28.0
    assert np.array_equal(grads[1], jnp.full(8, 9.0))


@JIT
def test_twins_nest_inside_and_outside(mesh, total, jitted):
    def f(x):
        def body(c, y):
            total.value += jax.lax.psum(y, "d")
            return c + y, None

        out, _ = sf.scan(body, jnp.zeros_like(x[0]) + 0 * x[0], x)
        return sf.cond(total.value > 0, lambda y: y * 2, lambda y: y, out)[None]

    run = sf.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    out = jit_if(jitted, run)(X)
    assert np.array_equal(out, 2 * X.reshape(4, 2).sum(1))
    assert total.value == 28.0


@JIT
def test_a_function_that_raises_changes_no_state(mesh, total, pieces, jitted):
    def f(x):
        total.value += 1
        pieces.value = x
        raise RuntimeError("stop")

    run = sf.shard_map(
        f, mesh=mesh, in_specs=P("d"), out_specs=P("d"), state_specs=[(pieces, P("d"))]
    )
    with pytest.raises(RuntimeError, match="stop"):
        jit_if(jitted, run)(X)
    assert total.value == 0.0
    assert np.array_equal(pieces.value, jnp.zeros(8))


def test_no_state_changes_where_jax_refuses_the_output(mesh, total):
    def f(x):
        total.value += 1
        return x

    with pytest.raises(ValueError):
        sf.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P())(X)
    assert total.value == 0.0


def test_the_body_runs_once_in_a_trace_and_leaves_no_tracer(
    mesh, total, checking_leaks
):
    runs = []

    def f(x):
        runs.append(0)
        total.value += jax.lax.psum(jnp.sum(x), "d")
        return x

    sf.filter_jit(sf.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d")))(X)
    assert len(runs) == 1
    assert total.value == 28.0


def test_a_bare_state_is_no_result(mesh, total):
    run = sf.shard_map(lambda x: total, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    with pytest.raises(TypeError, match=r"^State 'total' .* was returned"):
        run(X)


def test_a_state_made_inside_and_returned_is_put_together_from_the_pieces(mesh):
    class Made(eqx.Module):
        s: sf.State

    run = sf.shard_map(
        lambda x: Made(sf.State(2 * x, name="made")),
        mesh=mesh,
        in_specs=P("d"),
        out_specs=P("d"),
    )
    assert np.array_equal(run(X).s.value, 2 * X)


def test_a_raw_shard_map_that_writes_a_state_raises(mesh, total):
    def f(x):
        total.value = jax.lax.psum(jnp.sum(x), "d")
        return x

    raw = jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    with pytest.raises(
        sf.StateTraceError, match=r"^State 'total' .* was written inside"
    ):
        raw(X)
    with pytest.raises(
        sf.StateTraceError, match=r"^State 'total' .* was written inside"
    ):
        sf.filter_jit(raw)(X)
    assert total.value == 0.0
