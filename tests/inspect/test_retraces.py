"""Why functions are traced: kept, listed, logged and limited."""

import dataclasses
import gc
import logging
import subprocess
import sys
import threading
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import statefun as sf


def causes(fn):
    return [retrace.cause for retrace in fn.retraces()]


def last(fn):
    return fn.retraces()[-1].cause


class Norm(eqx.Module):
    mean: sf.State
    eps: float = eqx.field(static=True, default=1e-5)


class Model(eqx.Module):
    norm: Norm
    w: jax.Array


def make_model(size=3, eps=1e-5):
    return Model(Norm(sf.State(jnp.zeros(size)), eps), jnp.ones(size))


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int = 1
    name: str = "net"


# -- the causes ---------------------------------------------------------------------


def test_the_first_call_is_a_cause_and_a_hit_is_none():
    fn = sf.filter_jit(lambda x: x, name="same")
    assert fn.retraces() == []
    fn(jnp.ones(3))
    fn(jnp.zeros(3))
    (retrace,) = fn.retraces()
    assert str(retrace) == "same, trace 1: first call"
    assert (retrace.function, retrace.number) == ("same", 1)
    assert [cause.kind for cause in retrace.causes] == ["first call"]


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        (
            jnp.ones(3),
            jnp.ones((3, 1)),
            "other shape of argument `x` (float32[3] → float32[3,1])",
        ),
        (
            jnp.ones(3),
            jnp.ones(3, jnp.int32),
            "other dtype of argument `x` (float32[3] → int32[3])",
        ),
        (
            jnp.ones(3),
            jnp.ones(4, jnp.int32),
            "other shape and dtype of argument `x` (float32[3] → int32[4])",
        ),
        (
            jnp.float32(1),
            jnp.asarray(1.0),
            "other weak type of argument `x` (strong float32[] → weak float32[])",
        ),
        (
            {"a": jnp.ones(3)},
            {"a": jnp.ones(4)},
            "other shape of argument `x['a']` (float32[3] → float32[4])",
        ),
        (1, 2, "other static value at `x` (1 → 2)"),
        (1, True, "other static value at `x` (1 → True)"),
        (1, 1.0, "other static value at `x` (1 → 1.0)"),
        ("a", "b", "other static value at `x` ('a' → 'b')"),
        (1, jnp.ones(3), "other structure of argument `x` (1 → an array)"),
        (None, jnp.ones(3), "other structure of argument `x` (None → an array)"),
        ((1,), (1, 2), "other structure of argument `x` (tuple of 1 → tuple of 2)"),
        ((1,), [1], "other structure of argument `x` (tuple → list)"),
        (
            {"a": 1},
            {"b": 1},
            "other structure of argument `x` (['a'] → ['b'])",
        ),
        (Config(1), Config(2), "other static value at `x.layers` (1 → 2)"),
        (
            eqx.nn.Dropout(0.5),
            eqx.nn.Dropout(0.25),
            "other static value at `x.p` (0.5 → 0.25)",
        ),
    ],
)
def test_what_is_different_about_an_argument_is_named(old, new, cause):
    fn = sf.filter_jit(lambda x: None)
    fn(old)
    fn(new)
    assert causes(fn) == ["first call", cause]


def test_a_static_argument_is_looked_into():
    fn = sf.filter_jit(lambda x, config: x * config["net"].layers, static_argnums=1)

    class Hashable(dict):
        def __hash__(self):
            return hash(tuple(self.items()))

    fn(1.0, Hashable(net=Config(1)))
    fn(1.0, Hashable(net=Config(2)))
    # A subclass of dict is a leaf to JAX: it is shown whole.
    assert last(fn).startswith(
        "other static value at `config` ({'net': Config(layers=1"
    )

    fn = sf.filter_jit(lambda x, config: x * config.layers, static_argnames="config")
    fn(1.0, config=Config(1))
    fn(1.0, config=Config(2))
    assert last(fn) == "other static value at `config.layers` (1 → 2)"
    fn = sf.filter_jit(lambda x, config: x * config[0].layers, static_argnums=1)
    fn(1.0, (Config(1),))
    fn(1.0, (Config(2),))
    assert last(fn) == "other static value at `config[0].layers` (1 → 2)"


def test_a_static_field_of_a_module_is_named_by_its_path():
    fn = sf.filter_jit(lambda model: model.w * model.norm.eps)
    fn(make_model())
    fn(make_model(eps=0.5))
    assert last(fn) == "other static value at `model.norm.eps` (1e-05 → 0.5)"


def test_a_function_made_anew_for_each_call_is_told_from_another_one():
    fn = sf.filter_jit(lambda f, x: f(x))

    def make():
        return lambda x: x

    fn(make(), 1.0)
    fn(make(), 1.0)
    assert last(fn).startswith("other static value at `f` (")
    assert last(fn).endswith("make.<locals>.<lambda>, which is gone → another one)")


def test_a_function_that_looks_like_the_one_before_is_told_from_it():
    fn = sf.filter_jit(lambda f, x: f(x))
    first, second = [lambda x: x for _ in range(2)]
    fn(first, 1.0)
    fn(second, 1.0)
    assert "another function that looks the same" in last(fn)


def test_a_call_with_other_arguments_says_which():
    def fun(x, y=None, *rest, **options):
        return x

    fn = sf.filter_jit(fun)
    x = jnp.ones(3)
    fn(x)
    fn(x, x)
    assert last(fn) == "other structure of arguments (x → x, y)"
    fn(x, x, x)
    assert last(fn) == "other structure of arguments (x, y → x, y, rest[0])"
    fn(x, y=x)
    assert last(fn).startswith("other structure of arguments (")
    fn(x, scale=x)
    assert last(fn) == "other structure of arguments (x, y → x, scale)"


def test_arguments_beyond_the_named_ones_have_a_name():
    fn = sf.filter_jit(lambda *xs: xs[0])
    fn(jnp.ones(3), jnp.ones(3))
    fn(jnp.ones(3), jnp.ones(4))
    assert last(fn) == "other shape of argument `xs[1]` (float32[3] → float32[4])"


def test_several_causes_are_all_kept_and_the_line_stays_short():
    fn = sf.filter_jit(lambda *xs: xs[0])
    fn(*[jnp.ones(3)] * 5)
    fn(*[jnp.ones(4)] * 5)
    retrace = fn.retraces()[-1]
    assert len(retrace.causes) == 5
    assert {cause.what for cause in retrace.causes} == {"shape"}
    assert retrace.cause.count(";") == 3
    assert retrace.cause.endswith("; and 2 more")


def test_the_most_similar_trace_is_the_one_compared_with():
    fn = sf.filter_jit(lambda x, n: x)
    fn(jnp.ones(3), 1)
    fn(jnp.ones(4), 2)
    fn(jnp.ones(5), 1)
    assert last(fn) == "other shape of argument `x` (float32[3] → float32[5])"


def test_a_state_of_the_closure_is_named_with_its_change():
    model = make_model()

    @sf.filter_jit
    def fn():
        return model.norm.mean.value

    fn()
    model.norm.mean.value = jnp.zeros(3, jnp.bfloat16)
    fn()
    name = "State `model.norm.mean` changed"
    assert last(fn) == f"{name} dtype (float32[3] → bfloat16[3])"
    model.norm.mean.value = jnp.zeros(4, jnp.bfloat16)
    fn()
    assert last(fn) == f"{name} shape (bfloat16[3] → bfloat16[4])"
    model.norm.mean.value = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    fn()
    assert last(fn).startswith(f"{name} structure (")
    model.norm.mean.value = {"a": jnp.zeros(3), "b": jnp.zeros(5)}
    fn()
    assert last(fn) == f"{name} shape at `['b']` (float32[3] → float32[5])"
    assert [r.causes[0].kind for r in fn.retraces()[1:]] == ["state"] * 4


def test_a_state_of_an_argument_is_named_by_its_path():
    @sf.filter_jit
    def fn(model):
        model.norm.mean.value += 1

    fn(make_model())
    fn(make_model())
    assert len(fn.retraces()) == 1
    model = make_model()
    model.norm.mean.value = jnp.zeros(5)
    fn(model)
    text = "State `model.norm.mean` changed shape (float32[3] → float32[5])"
    assert last(fn) == text


class Tagged(sf.State):
    def __init__(self, value, name=None, **attributes):
        super().__init__(value, name=name)
        vars(self).update(attributes)


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ({"name": "a"}, {"name": "b"}, "name ('a' → 'b')"),
        ({}, {"name": "b"}, "name (None → 'b')"),
        ({"rate": 1}, {"rate": 2}, "attribute `rate` (1 → 2)"),
        ({"rate": [1]}, {"rate": [1.0]}, "attribute `rate` ([1] → [1.0])"),
        ({}, {"rate": 2}, "attribute `rate` (none → 2)"),
        ({"rate": 1}, {}, "attribute `rate` (1 → none)"),
    ],
)
def test_a_name_or_an_attribute_of_a_state_is_a_cause(old, new, cause):
    fn = sf.filter_jit(lambda m: m.mean.value)
    for given in (old, new, old):
        fn(Norm(Tagged(jnp.ones(2), **given)))
    assert causes(fn) == ["first call", f"State `m.mean` changed {cause}"]


def test_a_name_and_an_attribute_that_changed_are_two_causes():
    fn = sf.filter_jit(lambda m: m.mean.value)
    fn(Norm(Tagged(jnp.ones(2), "a", rate=jnp.zeros(1))))
    fn(Norm(Tagged(jnp.ones(2), "b", rate=jnp.ones(1))))
    assert [(c.kind, c.what) for c in fn.retraces()[-1].causes] == [
        ("state", "name"),
        ("state", "attribute `rate`"),
    ]


def test_a_state_in_a_helper_and_in_another_state_has_a_name():
    inner = sf.State(jnp.zeros(3))
    net = sf.State({"inner": inner})

    def helper():
        return net.value["inner"].value

    fn = sf.filter_jit(lambda: helper())
    fn()
    inner.value = jnp.zeros(4)
    fn()
    assert last(fn).startswith("State `net.value['inner']` changed shape")


def test_a_state_with_no_path_is_called_by_its_name():
    box = [sf.State(jnp.zeros(3), name="hidden")]
    fn = sf.filter_jit(next(iter([lambda: box.__iter__().__next__().value])))
    fn()
    box[0].value = jnp.zeros(4)
    fn()
    assert last(fn).startswith("State `box[0]` changed shape")
    counter = sf.State(jnp.zeros(3), name="hidden")
    table = {id(counter): counter}.get
    key = id(counter)
    fn = sf.filter_jit(lambda: table(key).value)
    fn()
    counter.value = jnp.zeros(4)
    fn()
    assert last(fn).startswith("State `hidden` changed shape")


def test_a_method_is_told_about_as_its_function():
    class Counter(eqx.Module):
        count: sf.State

        @sf.filter_jit
        def __call__(self, x):
            self.count.value += 1
            return x

        @sf.filter_jit
        def step(self, x):
            return x

    counter = Counter(sf.State(jnp.array(0)))
    counter.step(jnp.ones(3))
    counter.step(jnp.ones(4))
    assert last(Counter.step) == (
        "other shape of argument `x` (float32[3] → float32[4])"
    )

    class Plain:
        @sf.filter_jit
        def step(self, x):
            return x

        def __hash__(self):
            return 0

        def __eq__(self, other):
            return True

    plain = Plain()
    plain.step(jnp.ones(3))
    assert [str(r) for r in plain.step.retraces()] == ["step, trace 1: first call"]


def test_another_configuration_of_jax_is_named():
    fn = sf.filter_jit(lambda x: x @ x)
    x = jnp.ones((3, 3))
    fn(x)
    with jax.default_matmul_precision("highest"):
        fn(x)
    assert last(fn) == (
        "other jax configuration: jax_default_matmul_precision (None → 'highest')"
    )
    fn(x)
    assert len(fn.retraces()) == 2


def test_x64_is_named():
    fn = sf.filter_jit(lambda: jnp.zeros(3))
    fn()
    with jax.enable_x64(True):
        fn()
    assert last(fn) == "other jax configuration: jax_enable_x64 (False → True)"


def test_a_cause_in_jax_that_has_no_name_is_admitted():
    fn = sf.filter_jit(lambda x: x)
    fn(jnp.ones(3))
    jax.clear_caches()
    fn(jnp.ones(3))
    if len(fn.retraces()) == 2:
        assert last(fn).startswith("other jax configuration: a user context")
        assert fn.retraces()[-1].causes[0].kind == "configuration"


def test_a_trace_that_had_to_go_is_told_apart_from_a_new_one():
    fn = sf.filter_jit(lambda x, n: x)
    x = jnp.ones(3)
    for n in range(130):
        fn(x, n)
    fn(x, 0)
    assert last(fn) == "cache full: this trace was dropped for newer ones"
    fn(x, 131)
    assert last(fn).startswith("other static value at `n` (")
    assert fn.retraces()[-1].number == 132


def test_a_full_cache_is_seen_for_states_of_arguments_too():
    fn = sf.StatefulFunction(lambda model, n: model.norm.mean.value * n)
    model = make_model()
    for n in range(129):
        fn.make_jaxpr(model, n)
    fn.make_jaxpr(make_model(), 0)
    assert last(fn) == "cache full: this trace was dropped for newer ones"


def test_a_cleared_cache_is_a_cause():
    fn = sf.filter_jit(lambda x: x)
    fn(jnp.ones(3))
    fn(jnp.ones(4))
    fn.clear_cache()
    fn(jnp.ones(3))
    assert last(fn) == "the cache was cleared"
    fn(jnp.ones(4))
    assert last(fn) == "the cache was cleared"
    fn(jnp.ones(5))
    assert last(fn).startswith("other shape of argument `x` (")
    fn.clear_cache()
    fn(jnp.ones(6))
    assert last(fn) == "the cache was cleared"


def test_a_state_that_is_gone_is_a_cause():
    holder = {"state": sf.State(jnp.zeros(3), name="weights")}
    fn = sf.filter_jit(lambda: holder["state"].value)
    fn()
    holder["state"] = sf.State(jnp.zeros(3), name="weights")
    gc.collect()
    fn()
    assert last(fn) == "State `weights` is gone, which the function used"


def test_a_trace_that_raised_is_a_cause_of_the_next():
    broken = [True]

    @sf.filter_jit
    def fn(x):
        if broken:
            raise KeyError("not yet")
        return x

    with pytest.raises(KeyError):
        fn(jnp.ones(3))
    broken.clear()
    fn(jnp.ones(3))
    assert causes(fn) == ["first call", "the trace before it raised"]


def test_a_function_that_closes_over_a_tracer_says_so():
    inner = []

    @sf.filter_jit
    def outer(x):
        @sf.filter_jit
        def fn(y):
            return x + y

        inner.append(fn)
        return fn(x) + fn(x)

    outer(jnp.ones(3))
    assert len(inner) == 1
    found = causes(inner[0])
    assert found[0] == "first call"
    assert set(found[1:]) <= {"the function closes over a value of the trace around it"}


def test_states_shared_in_another_way_are_a_cause():
    class Pair(eqx.Module):
        a: sf.State
        b: sf.State

    fn = sf.filter_jit(lambda pair: pair.a.value + pair.b.value)
    one, two = sf.State(jnp.zeros(3)), sf.State(jnp.zeros(3))
    fn(Pair(one, two))
    fn(Pair(one, one))
    assert last(fn).startswith("States are shared in another way")


def test_a_repr_that_raises_does_no_harm():
    class Rude:
        def __repr__(self):
            raise RuntimeError("no")

    fn = sf.filter_jit(lambda x, y: x)
    first, second = Rude(), Rude()
    fn(1.0, first)
    fn(1.0, second)
    assert last(fn).startswith("other static value at `y` (<Rude> → ")


def test_a_long_value_is_cut_and_stays_on_one_line():
    fn = sf.filter_jit(lambda x: None)
    fn("a\n" * 500)
    fn("b\n" * 500)
    assert "\n" not in last(fn)
    assert len(last(fn)) < 200


# -- who keeps them -----------------------------------------------------------------


def test_every_twin_that_compiles_keeps_them():
    total = sf.State(jnp.array(0.0))

    def add(carry, x):
        total.value += x
        return carry, None

    before = len(sf.scan.retraces())
    sf.scan(add, jnp.array(0.0), jnp.ones(3))
    sf.scan(add, jnp.array(0.0), jnp.ones(3))
    sf.scan(add, jnp.array(0.0), jnp.ones(4))
    assert len(sf.scan.retraces()) == before + 2
    assert str(sf.scan.retraces()[-1]).startswith("scan, trace ")
    assert last(sf.scan) == "other shape of argument `xs` (float32[3] → float32[4])"
    total.value = jnp.zeros(1)
    sf.scan(lambda c, x: (c, total.value), jnp.array(0.0), jnp.ones(4))

    for twin, call in {
        sf.cond: lambda x: sf.cond(True, lambda y: y, lambda y: 2 * y, x),
        sf.switch: lambda x: sf.switch(0, [lambda y: y, lambda y: 2 * y], x),
        sf.fori_loop: lambda x: sf.fori_loop(0, 2, lambda i, y: y, x),
        sf.while_loop: lambda x: sf.while_loop(lambda y: False, lambda y: y, x),
    }.items():
        call(jnp.ones(17))
        call(jnp.ones(18))
        assert twin.retraces()[-1].function == twin.__name__

    stateful = sf.StatefulFunction(lambda x: x)
    stateful.make_jaxpr(jnp.ones(3))
    assert causes(stateful) == ["first call"]


def test_a_body_passed_to_a_twin_is_searched_for_names():
    weights = sf.State(jnp.zeros(3))

    def body(carry, x):
        return carry + weights.value.sum() * x, None

    sf.scan(body, jnp.array(0.0), jnp.ones(3))
    weights.value = jnp.zeros(4)
    sf.scan(body, jnp.array(0.0), jnp.ones(3))
    text = "State `weights` changed shape (float32[3] → float32[4])"
    assert last(sf.scan) == text


def test_a_trace_inside_another_one_is_kept_by_the_inner_function():
    inner = sf.filter_jit(lambda x: x, name="inner")
    outer = sf.filter_jit(lambda x: inner(x), name="outer")
    outer(jnp.ones(3))
    outer(jnp.ones(4))
    inner(jnp.ones(4))
    shape = "other shape of argument `x` (float32[3] → float32[4])"
    assert causes(inner) == causes(outer) == ["first call", shape]


def test_the_newest_hundred_are_kept():
    fn = sf.StatefulFunction(lambda n: None)
    for n in range(105):
        fn.make_jaxpr(n)
    assert [r.number for r in fn.retraces()] == list(range(6, 106))
    fn.retraces().clear()
    assert len(fn.retraces()) == 100


def test_the_list_survives_clear_cache():
    fn = sf.filter_jit(lambda x: x)
    fn(1)
    fn.clear_cache()
    assert causes(fn) == ["first call"]


def test_nothing_is_kept_alive_by_the_history():
    class Static:
        pass

    fn = sf.filter_jit(lambda x: None)
    static = Static()
    gone = weakref.ref(static)
    fn(static)
    fn(1)
    del static
    fn.clear_cache()
    fn(2)
    jax.clear_caches()  # which has it too
    gc.collect()
    assert gone() is None

    state = sf.State(jnp.zeros(3))
    fn = sf.filter_jit(lambda model: model["a"].norm.mean.value)
    model = make_model()
    gone = weakref.ref(model.norm.mean)
    fn({"a": model})
    fn.clear_cache()
    fn({"a": make_model(4)})
    del model, state
    jax.clear_caches()
    gc.collect()
    assert gone() is None


def test_traces_of_threads_are_all_kept():
    fn = sf.filter_jit(lambda x, n: x)

    def call(start):
        for n in range(start, start + 10):
            fn(jnp.ones(3), n)

    threads = [threading.Thread(target=call, args=(10 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(r.number for r in fn.retraces()) == list(range(1, 41))


def test_a_recursive_function_keeps_each_of_its_traces():
    @sf.filter_jit
    def fn(x, n):
        return x if n == 0 else fn(x, n - 1)

    fn(jnp.ones(3), 2)
    assert len(fn.retraces()) == 3
    fn(jnp.ones(4), 0)
    assert last(fn) == "other shape of argument `x` (float32[3] → float32[4])"


def test_a_hit_tells_the_observer_nothing(monkeypatch):
    fn = sf.filter_jit(lambda x: x)
    fn(jnp.ones(3))

    class Forbidden:
        def __getattr__(self, name):
            raise AssertionError(f"{name} was called")

    monkeypatch.setattr("statefun._call.calls.Calls.observer", Forbidden())
    fn(jnp.ones(3))
    fn(x=1) if False else fn(jnp.zeros(3))


# -- log_retraces -------------------------------------------------------------------


def test_log_retraces_logs_one_line_for_each_trace(caplog):
    fn = sf.filter_jit(lambda x: x, name="same")
    fn(jnp.ones(2))
    with sf.log_retraces():
        fn(jnp.ones(2))
        fn(jnp.ones(3))
        with sf.log_retraces():
            fn(jnp.ones(4))
        fn(jnp.ones(5))
    fn(jnp.ones(6))
    assert {r.name for r in caplog.records} == {"statefun"}
    assert {r.levelno for r in caplog.records} == {logging.WARNING}
    shape = "other shape of argument `x`"
    assert [r.getMessage() for r in caplog.records] == [
        f"same, trace 2: {shape} (float32[2] → float32[3])",
        f"same, trace 3: {shape} (float32[3] → float32[4])",
        f"same, trace 4: {shape} (float32[4] → float32[5])",
    ]


def test_log_retraces_ends_with_an_exception(caplog):
    fn = sf.filter_jit(lambda x: x)
    with pytest.raises(KeyError), sf.log_retraces():
        raise KeyError
    fn(jnp.ones(3))
    assert caplog.records == []


def test_log_retraces_holds_in_other_threads(caplog):
    fn = sf.filter_jit(lambda x: x, name="elsewhere")
    with sf.log_retraces():
        thread = threading.Thread(target=fn, args=(jnp.ones(3),))
        thread.start()
        thread.join()
    assert [r.getMessage() for r in caplog.records] == [
        "elsewhere, trace 1: first call"
    ]


@pytest.mark.parametrize(("value", "lines"), [("1", 1), ("0", 0), ("", 0)])
def test_the_environment_variable_logs_as_well(value, lines, caplog, monkeypatch):
    monkeypatch.setenv("STATEFUN_LOG_RETRACES", value)
    sf.filter_jit(lambda x: x)(jnp.ones(3))
    assert len(caplog.records) == lines


def test_the_environment_variable_shows_without_any_set_up(monkeypatch):
    monkeypatch.setenv("STATEFUN_LOG_RETRACES", "1")
    code = "import statefun as sf\nsf.filter_jit(lambda x: x, name='f')(1)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stderr.splitlines()[-1] == "f, trace 1: first call"


# -- max_traces ---------------------------------------------------------------------


def test_max_traces_raises_beyond_n_and_names_the_cause():
    count = sf.State(jnp.array(0))
    ran = []

    @sf.max_traces(2)
    @sf.filter_jit
    def fn(x):
        ran.append(x.shape)
        count.value += 1
        return x

    fn(jnp.ones(3))
    fn(jnp.ones(4))
    message = (
        r"^fn would be traced more than 2 times: other shape of argument `x` "
        r"\(float32\[4\] → float32\[5\]\)"
    )
    with pytest.raises(sf.TraceLimitError, match=message) as info:
        fn(jnp.ones(5))
    assert info.value.retrace.number == 3
    assert ran == [(3,), (4,)]
    assert count.value == 2
    fn(jnp.ones(3))  # a hit
    assert count.value == 3
    assert len(fn.retraces()) == 2


def test_max_traces_keeps_the_twin_a_twin():
    fn = sf.filter_jit(lambda x: x)
    assert sf.max_traces(1)(fn) is fn
    stateful = sf.StatefulFunction(lambda x: x)
    assert sf.max_traces(1)(stateful) is stateful
    stateful.make_jaxpr(1)
    with pytest.raises(sf.TraceLimitError, match="would be traced more than 1 time:"):
        stateful.make_jaxpr(2)


def test_max_traces_counts_from_when_it_was_set():
    fn = sf.filter_jit(lambda x: x)
    fn(1)
    sf.max_traces(1)(fn)
    fn(2)
    with pytest.raises(sf.TraceLimitError):
        fn(3)


def test_max_traces_holds_in_other_threads_as_a_decorator():
    fn = sf.max_traces(0)(sf.filter_jit(lambda x: x))
    found = []

    def call():
        try:
            fn(1)
        except sf.TraceLimitError as error:
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert len(found) == 1


def test_max_traces_as_a_context_counts_each_function_by_itself():
    one = sf.filter_jit(lambda x: x, name="one")
    two = sf.filter_jit(lambda x: x, name="two")
    with sf.max_traces(1):
        one(1)
        two(1)
        one(1)
        with pytest.raises(sf.TraceLimitError, match=r"^two would be traced more"):
            two(2)
    two(2)
    with sf.max_traces(0):
        one(1)
        two(2)
        with pytest.raises(sf.TraceLimitError, match="more than 0 times: other static"):
            one(2)
    one(2)


def test_max_traces_may_be_nested_and_used_again():
    fn = sf.filter_jit(lambda x: x)
    limit = sf.max_traces(1)
    with sf.max_traces(3):
        with limit:
            fn(1)
        with limit:
            fn(2)
            with pytest.raises(sf.TraceLimitError, match="more than 1 time:"):
                fn(3)
        fn(3)
        with pytest.raises(sf.TraceLimitError, match="more than 3 times:"):
            fn(4)


def test_max_traces_around_a_plain_function_counts_each_of_its_calls():
    fn = sf.filter_jit(lambda x: x)

    @sf.max_traces(1)
    def loop(values):
        """Calls it."""
        return [fn(v) for v in values]

    assert loop.__doc__ == "Calls it."
    loop([1, 1])
    assert loop([2, 1, 2]) == [2, 1, 2]
    with pytest.raises(sf.TraceLimitError):
        loop([3, 4])


def test_max_traces_raises_through_twins_and_leaves_every_state_as_it_was():
    count = sf.State(jnp.array(0))
    inner = sf.max_traces(0)(sf.filter_jit(lambda x: x, name="inner"))

    @sf.filter_jit
    def outer(x):
        count.value += 1
        return sf.filter_vmap(inner)(x)

    with pytest.raises(sf.TraceLimitError, match=r"^inner would be traced"):
        outer(jnp.ones(3))
    assert count.value == 0


def test_max_traces_raises_for_a_function_with_a_runtime_check():
    @sf.max_traces(1)
    @sf.filter_jit
    def fn(x):
        return eqx.error_if(x, x > 5, "too large")

    fn(jnp.array(1.0))
    with pytest.raises(sf.TraceLimitError, match="other dtype of argument `x`"):
        fn(jnp.array(1))


@pytest.mark.parametrize("n", [-1, 1.0, True, None])
def test_max_traces_takes_a_number_from_0_on(n):
    with pytest.raises(ValueError, match="takes a number from 0 on"):
        sf.max_traces(n)
