"""How modules come apart, and what is remembered about them."""

import copy
import gc
import sys
import threading
import weakref
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefun as sf
from statefun._call import args, modules
from statefun._trace.names import Parameters


class Leaf(eqx.Module):
    w: Any
    tag: Any = eqx.field(static=True, default=None)


class Two(eqx.Module):
    a: Any
    b: Any


class Named(NamedTuple):
    x: Any
    y: Any


@jax.tree_util.register_pytree_node_class
class Custom:
    def __init__(self, x):
        self.x = x

    def tree_flatten(self):
        return (self.x,), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


@jax.tree_util.register_static
class Held:
    def __init__(self, x):
        self.x = x


def ones(n=1):
    return jnp.ones(n)


def split(*arguments, **kwargs):
    return args.split(arguments, kwargs, Parameters(None))


def known(module):
    """Has `split` remember a module; the key has to be held for it."""
    keys = [split(module)[-1] for _ in range(3)]
    return keys[0], modules._entries[id(module)].memory is not None


def check(module):
    """What is remembered is what a module comes apart to now."""
    dynamic, states, key = split(module)
    leaves, _, _ = args.flatten((module,), {})
    assert all(
        x is y for x, y in zip(dynamic, filter(eqx.is_array, leaves), strict=True)
    )
    form, _, held = modules.flatten_anew(module)
    assert key == (form,)
    assert [id(s) for s in states] == [id(s) for s in held]


MUTABLE = {
    "list": (lambda: Leaf([ones(), ones()]), lambda m: m.w.append(ones())),
    "item": (lambda: Leaf([ones(), ones()]), lambda m: m.w.__setitem__(0, ones())),
    "shorter": (lambda: Leaf([ones(), ones()]), lambda m: m.w.pop()),
    "order": (lambda: Leaf([ones(), ones()]), lambda m: m.w.reverse()),
    "static item": (lambda: Leaf([1, ones()]), lambda m: m.w.__setitem__(0, True)),
    "dict": (lambda: Leaf({"k": ones()}), lambda m: m.w.__setitem__("k", ones())),
    "name": (lambda: Leaf({"k": ones()}), lambda m: m.w.__setitem__("l", m.w.pop("k"))),
    "name's type": (
        lambda: Leaf({1: 1.5}),
        lambda m: m.w.__setitem__(True, m.w.pop(1)),
    ),
    "deep": (
        lambda: Leaf((Two({"k": [ones()]}, 1),)),
        lambda m: m.w[0].a["k"].__setitem__(0, ones()),
    ),
    "tuple": (
        lambda: Leaf([(ones(), ones())]),
        lambda m: m.w.__setitem__(0, (ones(), ones())),
    ),
    "tuple's kind": (
        lambda: Leaf([(ones(), ones())]),
        lambda m: m.w.__setitem__(0, Named(*m.w[0])),
    ),
    "list in a list": (lambda: Leaf([[ones()]]), lambda m: m.w[0].append(1)),
    "list for a list": (
        lambda: Leaf([[ones()]]),
        lambda m: m.w.__setitem__(0, [ones()]),
    ),
    "module": (
        lambda: Leaf([Leaf(ones())]),
        lambda m: m.w.__setitem__(0, Leaf(ones())),
    ),
    "State": (
        lambda: Leaf([sf.State(ones())]),
        lambda m: m.w.__setitem__(0, sf.State(ones())),
    ),
    "in a named tuple": (lambda: Leaf(Named([ones()], 1)), lambda m: m.w.x.append(2)),
    "list in a named tuple in a list": (
        lambda: Leaf([Named([ones()], 1)]),
        lambda m: m.w[0].x.__setitem__(0, ones()),
    ),
    "None": (lambda: Leaf([ones(), ones()]), lambda m: m.w.__setitem__(0, None)),
    "NumPy scalar": (
        lambda: Leaf([np.float32(1)]),
        lambda m: m.w.__setitem__(0, np.float32(2)),
    ),
    "open copy": (
        lambda: copy.copy(Leaf(ones(), "tag")),
        lambda m: setattr(m, "w", ones()),
    ),
    "static of an open copy": (
        lambda: copy.copy(Leaf(ones(), (1,))),
        lambda m: setattr(m, "tag", (True,)),
    ),
    "open inside": (
        lambda: Two(copy.deepcopy(Leaf(ones())), 1),
        lambda m: setattr(m.a, "w", ones()),
    ),
    "deleted field": (lambda: Leaf([ones()]), lambda m: delattr(m, "w")),
}


@pytest.mark.parametrize("kind", MUTABLE)
def test_every_change_inside_a_module_is_noticed(kind):
    make, change = MUTABLE[kind]
    module = make()
    key, remembered = known(module)
    assert remembered
    check(module)
    change(module)
    check(module)
    later = split(module)[-1], known(module)[0]
    check(module)
    assert later[0] == later[1]
    assert key is not None


def test_a_frozen_module_is_taken_apart_twice_and_no_more(monkeypatch):
    module, counts = Two(Leaf(ones()), (Leaf(ones()), sf.State(ones()))), []
    apart = modules.flatten_anew
    monkeypatch.setattr(
        modules, "flatten_anew", lambda *a: [counts.append(1), apart(*a)][1]
    )
    results = [split(module) for _ in range(5)]
    assert len(counts) == 2
    assert all(x[-1] == results[0][-1] for x in results)


def test_looking_at_a_module_in_its_init_sets_nothing():
    module = Two.__new__(Two)
    module.a = ones()
    known(module)
    assert list(vars(module)) == ["a"]
    module.b = ones()
    check(module)


def readable():
    return Two(
        [Leaf(ones(), 1), {"k": ones(), "f": jax.nn.relu}], Named((ones(), None), 1)
    )


OTHERS = {
    "static field": lambda: Two(
        [Leaf(ones(), True), {"k": ones(), "f": jax.nn.relu}], Named((ones(), None), 1)
    ),
    "static leaf": lambda: eqx.tree_at(lambda m: m.b.y, readable(), True),
    "function": lambda: eqx.tree_at(lambda m: m.a[1]["f"], readable(), jax.nn.tanh),
    "array for a static leaf": lambda: eqx.tree_at(lambda m: m.b.y, readable(), ones()),
    "static leaf for an array": lambda: eqx.tree_at(lambda m: m.b.x[0], readable(), 1),
    "State for an array": lambda: eqx.tree_at(
        lambda m: m.b.x[0], readable(), sf.State(ones())
    ),
    "None for an array": lambda: eqx.tree_at(lambda m: m.b.x[0], readable(), None),
    "array for None": lambda: eqx.tree_at(
        lambda m: m.b.x, readable(), (ones(), ones())
    ),
    "longer list": lambda: eqx.tree_at(
        lambda m: m.a, readable(), [*readable().a, ones()]
    ),
    "tuple for a list": lambda: eqx.tree_at(
        lambda m: m.a, readable(), tuple(readable().a)
    ),
    "tuple for a named one": lambda: eqx.tree_at(
        lambda m: m.b, readable(), tuple(readable().b)
    ),
    "other keys": lambda: eqx.tree_at(
        lambda m: m.a[1], readable(), {"k": ones(), "g": jax.nn.relu}
    ),
    "other class": lambda: eqx.tree_at(lambda m: m.a[0], readable(), Two(ones(), 1)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_module_that_is_new_is_taken_for_no_other(kind, monkeypatch):
    keys = [split(readable())[-1] for _ in range(3)]
    form = keys[0][0]
    assert form.reader is not None
    other = OTHERS[kind]()
    assert split(other)[-1] != keys[0]
    check(OTHERS[kind]())
    monkeypatch.setattr(modules, "flatten_anew", None)
    assert split(readable())[-1] == keys[0]


def test_arrays_of_a_new_module_come_in_the_order_of_jax():
    for _ in range(4):
        module = readable()
        arrays = filter(eqx.is_array, jax.tree.leaves(module))
        assert all(x is y for x, y in zip(split(module)[0], arrays, strict=True))


def test_a_static_list_changed_in_place_is_seen_in_new_modules():
    tags, fn = [1], sf.filter_jit(lambda m: m.w * m.tag[0])
    for n in (1, 1, 1, 2, 2, 3):
        tags[0] = n
        assert float(fn(Leaf(ones(), tags))[0]) == n


def test_nothing_is_remembered_of_modules_in_a_trace():
    module = Leaf(ones())

    def f(x):
        inner = sf.filter_jit(lambda m: m.w + 1)
        made = Leaf(x)
        out = [inner(m) for m in (made, module) for _ in range(3)]
        assert id(made) not in modules._entries
        assert id(module) not in modules._entries
        return out

    with jax.checking_leaks():
        jax.jit(f)(ones())
        sf.filter_jit(f)(ones())


def test_a_state_with_attributes_that_change_makes_another_key():
    class Scaled(sf.State):
        def __init__(self, value, scale):
            super().__init__(value)
            self.scale = scale

    module = Leaf(Scaled(ones(), 1))
    key, remembered = known(module)
    assert remembered
    module.w.scale = 2
    assert split(module)[-1] != key
    check(module)


def test_states_in_named_tuples_are_states_of_the_arguments():
    fn = sf.filter_jit(lambda t: t.x.value + t.y.w.value)
    s, t = sf.State(ones()), sf.State(ones())
    for expected in (2, 3, 4):
        assert float(fn(Named(s, Leaf(t)))[0]) == expected
        assert float(fn(Named(s, Leaf(s)))[0]) == 2 * s.value[0]
        s.value += 1


def test_nodes_of_other_kinds_are_taken_apart_each_time():
    module = Leaf(Custom(ones()))
    _, remembered = known(module)
    assert not remembered
    module.w.x = ones()
    check(module)


class Config:
    """Equal by value, and mutable: a bad idea, but possible."""

    def __init__(self, n):
        self.n = n

    def __hash__(self):
        return hash(self.n)

    def __eq__(self, other):
        return isinstance(other, Config) and self.n == other.n


def test_a_module_with_a_static_value_that_may_change_is_not_remembered():
    assert not known(Leaf(ones(), Config(1)))[1]
    assert not known(Two(ones(), Config(1)))[1]
    assert known(Two(ones(), jax.nn.relu))[1]


def test_a_module_in_its_init_is_seen_as_it_stands():
    fn = sf.filter_jit(lambda m: m.a + 1)
    seen = []

    class Early(eqx.Module):
        a: jax.Array
        b: Any = None

        def __init__(self):
            for i in range(5):
                self.a = jnp.array(float(i))
                seen.extend(fn(self) for _ in range(3))
            self.b = 1

    module = Early()
    assert [float(x) for x in seen] == [1.0 + i for i in range(5) for _ in range(3)]
    check(module)


def test_numpy_leaves_changed_in_place_are_seen():
    module, fn = Leaf(np.zeros(2, np.float32)), sf.filter_jit(lambda m: m.w * 2)
    for i in range(4):
        module.w[:] = i
        np.testing.assert_array_equal(fn(module), [2 * i, 2 * i])


def test_modules_of_one_structure_have_one_key_and_others_have_others():
    same = [Two(Leaf(ones(), "t"), [1]), Two(Leaf(ones(3), "t"), [1])]
    assert split(same[0])[-1] == split(same[1])[-1] == known(same[0])[0]
    for other in (Two(Leaf(ones(), "u"), [1]), Two(Leaf(ones(), "t"), [True])):
        assert split(other)[-1] != known(same[0])[0]
    assert split(1)[-1] != split(True)[-1] != split(1.0)[-1]
    assert split((ones(),))[-1] != split([ones()])[-1] != split(ones())[-1]
    assert split({1: ones()})[-1] != split({True: ones()})[-1]
    assert split(a=ones())[-1] != split(b=ones())[-1] != split(ones())[-1]


def test_arrays_come_in_the_order_of_jax():
    a, b, c, d, e = (ones() for _ in range(5))
    tree = {"z": a, "b": (Leaf(b), [Named(c, None)])}
    given = split(tree, y=d, x=Leaf(e))[0]
    leaves = jax.tree.leaves(((tree,), {"y": d, "x": Leaf(e)}))
    assert all(x is y for x, y in zip(given, leaves, strict=True))


def test_states_shared_between_arguments_are_part_of_the_key():
    s, t = sf.State(ones()), sf.State(ones())
    one, two, tied = Leaf(s), Leaf(t), Leaf(s)
    for _ in range(4):
        _, states, apart = split(one, two)
        assert [id(x) for x in states] == [id(s), id(t)]
        _, states, shared = split(one, tied)
        assert [id(x) for x in states] == [id(s)]
        assert apart != shared
        assert shared == split(two, two)[-1]


def test_arrays_of_all_kinds_have_one_key():
    keys = [split(x)[-1] for x in (ones(), np.ones(1), np.float32(1))]
    assert keys[0] == keys[1] == keys[2] == jax.jit(lambda x: Held(split(x)[-1]))(1).x


def test_a_bound_method_made_anew_is_its_module():
    class Net(eqx.Module):
        w: jax.Array

        def method(self):
            return self.w

    net = Net(ones())
    assert split(net.method)[-1] == split(net.method)[-1]
    assert split(net.method)[0][0] is net.w
    assert float(sf.filter_jit(lambda f: f())(net.method)[0]) == 1


def test_nothing_is_kept_alive():
    module = Two([ones(), Leaf(ones()), (ones(),), sf.State(ones())], Leaf(ones()))
    key, remembered = known(module)
    assert remembered
    items = [module.a[0], module.a[1], module.a[1].w, module.a[2][0], module.a[3]]
    refs = list(map(weakref.ref, items))
    del items
    module.a.clear()
    assert [ref() for ref in refs] == [None] * len(refs)
    refs = [weakref.ref(module), weakref.ref(module.b.w)]
    number = id(module)
    del module
    assert [ref() for ref in refs] == [None, None]
    assert number not in modules._entries
    assert key is not None


def test_what_goes_after_the_names_of_this_library_says_nothing(monkeypatch):
    module, errors = Leaf([Leaf(ones())]), []
    assert known(module)[1]
    monkeypatch.setattr(sys, "unraisablehook", errors.append)
    with monkeypatch.context() as at_exit:  # the interpreter sets globals to None
        at_exit.setattr(modules, "_entries", None)
        module.w.clear()
        del module
        gc.collect()
    assert not errors


def test_what_refers_back_to_a_module_goes_with_it():
    class Loop(eqx.Module):
        items: list
        state: sf.State
        call: Any

        def __init__(self):
            self.call = lambda: self
            self.items = [lambda: self, ones()]
            self.state = sf.State(ones())

    module = Loop()
    assert known(module)[1]
    ref = weakref.ref(module)
    del module
    gc.collect()
    assert ref() is None


def test_a_form_goes_with_the_last_key_of_it():
    module = Leaf(ones(), "only here")
    key, _ = known(module)
    form = weakref.ref(key[0])
    del key
    gc.collect()
    assert form() is None
    check(module)


def test_threads_see_what_they_pass():
    fn = sf.filter_jit(lambda m: m.a[0].w + m.b)
    errors = []

    def work(i):
        module = Two([Leaf(jnp.array(float(i)))], jnp.array(float(i)))
        for k in range(50):
            module.a[0] = Leaf(jnp.array(float(k)))
            if float(fn(module)) != i + k:
                errors.append((i, k))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# -- hot calls ----------------------------------------------------------------------


def warm(fn, *args, **kwargs):
    """Calls `fn` until only the hot path is left, and forbids any other."""
    for _ in range(4):
        out = fn(*args, **kwargs)
    return out


def hot(fn, monkeypatch):
    """Calls of `fn` from now on, as a list that has an entry for each that is not hot."""
    slow, run = [], fn._calls.run
    monkeypatch.setattr(
        fn._calls, "run", lambda *args, **kw: [slow.append(1), run(*args, **kw)][1]
    )
    return slow


def test_modules_arrays_and_static_values_make_hot_calls(monkeypatch):
    net = Two([Leaf(ones(), 1), np.ones(1, np.float32)], sf.State(ones()))

    @sf.filter_jit
    def fn(net, x, *, add=True, key=None):
        net.b.value += 1
        return net.a[0].w + x[0] + x[1]["k"] + (1 if add else 0)

    x = (ones(), {"k": np.ones(1, np.float32)})
    for kwargs in 2 * ({}, {"add": False}, {"key": ones()}):
        warm(fn, net, x, **kwargs)
    slow = hot(fn, monkeypatch)
    before = float(net.b.value[0])
    assert float(fn(net, x)[0]) == 4
    assert float(fn(net, x, add=False)[0]) == 3
    assert float(fn(net, x, key=ones())[0]) == 4
    assert float(net.b.value[0]) == before + 3
    assert not slow


def test_a_decorated_call_is_hot(monkeypatch):
    class Net(eqx.Module):
        count: sf.State
        w: jax.Array

        @sf.filter_jit
        def __call__(self, x):
            self.count.value += 1
            return self.w * x

    nets = [Net(sf.State(jnp.array(0)), ones() * i) for i in range(3)]
    for net in nets:
        warm(net, ones())
    slow = hot(Net.__call__, monkeypatch)
    for i, net in enumerate(nets):
        assert float(net(ones())[0]) == i
    assert [int(net.count.value) for net in nets] == [5, 5, 5]
    assert not slow


def test_a_hot_call_sees_that_a_state_has_another_structure():
    net = Leaf(sf.State((ones(), "a")))
    fn = sf.filter_jit(lambda m: m.w.value[0] + (1.0 if m.w.value[1] == "b" else 0.0))
    assert float(warm(fn, net)[0]) == 1
    net.w.value = (ones(), "b")
    assert float(fn(net)[0]) == 2
    net.w.value = (ones(), "a")
    assert float(fn(net)[0]) == 1


def test_a_hot_call_sees_that_what_a_state_gave_out_was_changed():
    net = Leaf(sf.State([ones()]))
    fn = sf.filter_jit(lambda m: m.w.value[0] * 2)
    warm(fn, net)
    given = net.w.value
    for i in range(3):
        given[0] = ones() * i
        assert float(fn(net)[0]) == 2 * i


def test_a_hot_call_sees_that_a_state_is_reached_otherwise_too():
    shared, other = sf.State(ones()), sf.State(ones())

    @sf.filter_jit
    def fn(m, x):
        m.w.value = m.w.value + x
        shared.value = shared.value * 2
        return m.w.value

    warm(fn, Leaf(other), ones())
    warm(fn, net := Leaf(other), ones())
    shared.value = ones()
    assert float(fn(Leaf(shared), ones())[0]) == 4
    one = Leaf(shared)
    shared.value = ones()
    assert [float(fn(one, ones())[0]) for _ in range(4)] == [4, 10, 22, 46]
    assert float(fn(net, ones())[0]) == float(other.value[0])


def test_a_hot_call_sees_that_two_arguments_share_a_state():
    s, t = sf.State(ones()), sf.State(ones())
    a, b, c = Leaf(s), Leaf(t), Leaf(s)

    @sf.filter_jit
    def fn(x, y):
        x.w.value = x.w.value + 1
        return y.w.value

    assert float(warm(fn, a, b)[0]) == 1
    before = float(s.value[0])
    for i in range(1, 5):
        assert float(fn(a, c)[0]) == before + i
        assert float(fn(a, a)[0]) == float(s.value[0])
        s.value = s.value - 1


def test_a_hot_call_sees_that_a_state_holds_states():
    inner = sf.State(ones())
    net = Leaf(sf.State((ones(), ones())))

    @sf.filter_jit
    def fn(m):
        item = m.w.value[1]
        if isinstance(item, sf.State):
            item.value = item.value + 1
            item = item.value
        return item

    warm(fn, net)
    net.w.value = (ones(), inner)
    assert [float(fn(net)[0]) for _ in range(4)] == [2, 3, 4, 5]
    assert float(inner.value[0]) == 5


def test_a_hot_call_sees_the_attributes_of_a_state():
    class Scaled(sf.State):
        def __init__(self, value, scale):
            super().__init__(value)
            self.scale = scale

    net = Leaf(Scaled(ones(), 1))
    fn = sf.filter_jit(lambda m: m.w.value * m.w.scale)
    warm(fn, net)
    net.w.scale = 3
    assert float(fn(net)[0]) == 3


def test_a_hot_call_may_return_its_argument_and_make_states(monkeypatch):
    net = Leaf(sf.State(ones()))
    fn = sf.filter_jit(lambda m: (m, Leaf(sf.State(m.w.value * 2))))
    warm(fn, net)
    slow = hot(fn, monkeypatch)
    (same, new), (_, newer) = fn(net), fn(net)
    assert same.w is net.w
    assert new.w is not newer.w
    assert float(new.w.value[0]) == 2
    assert not slow


def test_none_for_a_keyword_is_not_the_default():
    fn = sf.filter_jit(lambda x, k=1: x + (100 if k is None else k))
    x = ones()
    assert [float(fn(x, k=None)[0]) for _ in range(3)] == [101] * 3
    assert [float(fn(x)[0]) for _ in range(3)] == [2] * 3
    assert float(fn(x, k=None)[0]) == 101


def test_a_module_that_is_gone_leaves_nothing_to_a_hot_call():
    fn = sf.filter_jit(lambda m: m.w.value + m.tag)
    net = Leaf(sf.State(ones()), 1)
    warm(fn, net)
    refs = weakref.ref(net), weakref.ref(net.w), weakref.ref(net.w.value)
    del net
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3


def test_modules_of_a_result_are_known_as_arguments():
    model = Two([Leaf(ones(), 1), Leaf(ones())], (ones(), None))
    key = split({"m": model})[-1]
    new = jax.tree.map(lambda x: x + 1, ({"m": model}, ones()))
    arrays = jax.tree.leaves(new)
    modules.adopt(new, modules.adoptions(new), arrays)
    assert modules._entries[id(new[0]["m"])].memory is not None
    dynamic, _, again = split(new[0])
    assert again == key
    assert all(x is y for x, y in zip(dynamic, arrays, strict=False))
    new[0]["m"].a.reverse()
    check(new[0]["m"])


def test_errors_name_the_parameter():
    fn = sf.StatefulFunction(lambda net: 0)
    with pytest.raises(TypeError, match=r"^the argument `net\.w\[0\]` can't be hashed"):
        fn(Leaf([bytearray(b"x")]))
    fn = sf.StatefulFunction(lambda *nets: 0)
    with pytest.raises(
        TypeError, match=r"^the argument `nets\[0\]\.w` can't be hashed"
    ):
        fn(Leaf(bytearray(b"x")))
