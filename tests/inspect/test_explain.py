"""What `explain` says of a function, and how it shows it."""

import json
import re
import sys
import xml.etree.ElementTree as ET

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import statefun as sf


class Norm(eqx.Module):
    mean: sf.State

    def __call__(self, x):
        self.mean.value = 0.9 * self.mean.value + 0.1 * x
        return x - self.mean.value


class Model(eqx.Module):
    norm: Norm
    weight: jax.Array

    def __call__(self, x):
        return self.norm(self.weight * x)

    @sf.filter_jit
    def step(self, x):
        return self(x)


def make_model():
    return Model(Norm(sf.State(jnp.zeros(3), name="mean")), jnp.ones(3))


def by_path(leaves):
    return {leaf.path: leaf for leaf in leaves}


# -- what is said -------------------------------------------------------------------


def test_each_state_is_told_with_its_use():
    weights = sf.Param(jnp.ones((3, 4)), name="w")
    count = sf.State(jnp.array(0, jnp.int32))
    seen = sf.State(jnp.zeros(3, jnp.bfloat16))

    @sf.filter_jit(donate_states=True)
    def fn(x):
        count.value += 1
        seen.value = jnp.ones(3, jnp.bfloat16)
        return weights.value @ x

    report = sf.explain(fn, jnp.ones(4))
    assert report.name == "fn"
    assert [
        (
            s.path,
            s.kind,
            s.name,
            s.shape,
            s.dtype,
            s.bytes,
            s.read,
            s.written,
            s.donated,
        )
        for s in report.states
    ] == [
        ("count", "State", None, (), "int32", 4, True, True, True),
        ("seen", "State", None, (3,), "bfloat16", 6, False, True, False),
        ("weights", "Param", "w", (3, 4), "float32", 48, True, False, False),
    ]
    assert all("test_explain.py:" in s.created_at for s in report.states)
    assert all(s.becomes is None for s in report.states)


def test_nothing_is_donated_that_the_function_does_not_donate():
    count = sf.State(jnp.array(0))

    def fn():
        count.value += 1

    def checked():
        count.value = eqx.error_if(count.value, count.value > 3, "too many")

    assert not sf.explain(sf.filter_jit(fn)).states[0].donated
    donating = sf.filter_jit(checked, donate_states=True)
    assert not sf.explain(donating).states[0].donated
    assert sf.explain(sf.filter_jit(fn, donate_states=True)).states[0].donated


def test_a_state_that_holds_a_module_is_told_array_by_array():
    net = sf.Param(eqx.nn.Linear(2, 3, key=jax.random.key(0)))
    use = sf.explain(lambda x: net.value(x), jnp.ones(2)).states[0]
    assert (use.shape, use.dtype, use.bytes) == (None, "float32", 36)
    assert use.type == "2 arrays of float32"
    assert [(a.path, a.shape, a.bytes) for a in use.arrays] == [
        (".weight", (3, 2), 24),
        (".bias", (3,), 12),
    ]


def test_a_state_that_changes_type_is_told_with_both():
    total = sf.State(jnp.zeros(3))

    def fn():
        total.value = jnp.concatenate([total.value, jnp.ones(1)])

    use = sf.explain(fn).states[0]
    assert (use.type, use.becomes) == ("float32[3]", "float32[4]")


def test_states_are_named_by_their_path_in_the_model():
    model = make_model()
    closure = sf.explain(lambda x: model(x), jnp.ones(3))
    argument = sf.explain(lambda net, x: net(x), model, jnp.ones(3))
    method = sf.explain(model.step, jnp.ones(3))
    jitted = sf.explain(Model.step, model, jnp.ones(3))
    itself = sf.explain(model, jnp.ones(3))
    assert [r.states[0].path for r in (closure, argument, method, jitted, itself)] == [
        "model.norm.mean",
        "net.norm.mean",
        "self.norm.mean",
        "self.norm.mean",
        "self.norm.mean",
    ]


def test_a_state_is_named_through_other_states_and_objects():
    inner = sf.State(jnp.zeros(3))
    outer = sf.State({"inner": inner})

    class Trainer:
        def __init__(self):
            self.state = sf.State(jnp.zeros(3))

    trainer = Trainer()

    def helper():
        return outer.value["inner"].value + trainer.state.value

    paths = [s.path for s in sf.explain(lambda: helper()).states]
    assert paths == ["outer", "outer.value['inner']", "trainer.state"]


def test_a_state_without_a_path_is_told_all_the_same():
    hidden = sf.State(jnp.zeros(3), name="hidden")
    table = {id(hidden): hidden}.get
    key = id(hidden)
    report = sf.explain(lambda: table(key).value)
    assert [(s.path, s.name) for s in report.states] == [(None, "hidden")]
    assert "hidden" in str(report)
    assert report.states[0].label == "hidden"


def test_a_path_that_the_user_has_asked_for_is_used_where_none_is_found():
    model = {"hidden": sf.State(jnp.zeros(3))}
    sf.states(model)
    table = model.get
    report = sf.explain(lambda: table("hidden").value)
    assert [s.path for s in report.states] == ["['hidden']"]


def test_arguments_and_results_are_told_with_paths_and_bytes():
    @sf.filter_jit(donate="all-except-first")
    def fn(x, batch, *, scale, mode="train"):
        return {"y": x * scale, "mode": mode}, batch[0]

    key = jax.random.key(0)
    x = jnp.ones((2, 3))
    report = sf.explain(fn, x, (x, key), scale=jnp.float16(1).astype(jnp.float32))
    arguments = by_path(report.arguments)
    assert list(arguments) == ["x", "batch[0]", "batch[1]", "scale"]
    assert (arguments["x"].shape, arguments["x"].bytes) == ((2, 3), 24)
    assert arguments["batch[1]"].dtype == "key<fry>"
    assert arguments["batch[1]"].bytes == key.nbytes
    assert [leaf.donated for leaf in report.arguments] == [False, True, True, True]
    results = by_path(report.outputs)
    assert results["result[0]['y']"].type == "float32[2,3]"
    assert results["result[0]['mode']"].static == "'train'"
    assert results["result[1]"].bytes == 24


def test_static_arguments_are_told_as_values():
    fn = sf.filter_jit(lambda x, n, config: x * n, static_argnames="config")
    report = sf.explain(fn, jnp.ones(3), 2, config=("a", 1))
    assert [(a.path, a.static) for a in report.arguments[1:]] == [
        ("n", "2"),
        ("config", "('a', 1)"),
    ]
    assert all(a.bytes == 0 for a in report.arguments[1:])


def test_a_result_that_is_a_module_with_states_is_told():
    report = sf.explain(lambda: make_model())
    types = sorted(leaf.type for leaf in report.outputs)
    assert types == ["float32[3]", "float32[3]"]
    assert report.states == ()
    shared = make_model()
    kept = sf.explain(lambda: shared).outputs
    assert any(leaf.static == "State shared.norm.mean" for leaf in kept)


def test_constants_are_told_by_name_and_bytes():
    table = jnp.ones((100, 10))
    config = {"scale": jnp.ones(7)}

    def fn(x):
        def body(carry, _):
            return carry + table.sum() + config["scale"].sum(), None

        return jax.lax.scan(body, x, None, length=2)[0]

    constants = by_path(sf.explain(fn, 1.0 * jnp.ones(())).constants)
    assert {k: v.bytes for k, v in constants.items()} == {
        "table": 4000,
        "config['scale']": 28,
    }


def test_equations_are_counted_in_all_depths_before_and_after():
    def fn(x):
        y = jnp.sin(x) + jnp.sin(x)
        return jax.lax.scan(lambda c, _: (c * jnp.cos(c), None), y, None, length=3)[0]

    report = sf.explain(fn, 1.0 * jnp.ones(()))
    assert report.equations["sin"] == 2
    assert report.optimized["sin"] == 1
    assert report.equations["cos"] == report.equations["scan"] == 1
    assert report.optimizations == sf.ir.OPTIMIZATIONS
    counts = list(report.equations.values())
    assert counts == sorted(counts, reverse=True)
    only = sf.explain(sf.filter_jit(fn, ir_optimizations="dce"), 1.0 * jnp.ones(()))
    assert only.optimizations == ("dce",)
    assert only.optimized["sin"] == 2


def test_effects_are_told():
    def fn(x):
        jax.debug.print("{}", x)

    assert sf.explain(lambda x: x, 1).effects == ()
    assert len(sf.explain(fn, jnp.ones(3)).effects) == 1
    assert "Effects" in str(sf.explain(fn, jnp.ones(3)))


def test_the_cost_comes_from_the_compiled_function():
    weights = sf.State(jnp.ones((64, 64)))

    @sf.filter_jit
    def fn(x):
        weights.value = weights.value @ x
        return x.sum()

    x = jnp.ones((64, 64))
    assert sf.explain(fn, x).cost is None
    cost = sf.explain(fn, x, compile=True).cost
    assert cost is not None
    compiled = fn.lower(x).compile()
    assert cost.flops == compiled.cost_analysis()["flops"] >= 2 * 64**3
    assert cost.bytes_accessed == compiled.cost_analysis()["bytes accessed"]
    memory = compiled.memory_analysis()
    assert cost.argument_bytes == memory.argument_size_in_bytes == 2 * 4 * 64**2
    assert cost.output_bytes == memory.output_size_in_bytes
    assert cost.temporary_bytes == memory.temp_size_in_bytes
    assert cost.peak_bytes == memory.peak_memory_in_bytes > 0
    assert cost.aliased_bytes == 0
    donating = sf.filter_jit(fn.__wrapped__, donate_states=True)
    aliased = sf.explain(donating, x, compile=True).cost
    assert aliased is not None and aliased.aliased_bytes == 4 * 64**2


def test_what_is_compiled_is_what_the_function_would_compile():
    def fn(x):
        return x * 1 + 0

    fast = sf.filter_jit(fn, ir_optimizations=("algebraic_simplification", "dce"))
    report = sf.explain(fast, jnp.arange(3), compile=True)
    assert sum(report.optimized.values()) == 0 < sum(report.equations.values())
    assert report.cost is not None
    assert report.to_dict()["cost"]["argument_bytes"] == 12


# -- of what ------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda f: f, sf.filter_jit, sf.StatefulFunction])
def test_a_function_a_twin_and_a_stateful_function_are_told_alike(wrap):
    count = sf.State(jnp.array(0))

    def fn(x):
        count.value += 1
        return x * count.value

    report = sf.explain(wrap(fn), jnp.arange(3), compile=True)
    assert report.name == "fn"
    assert [s.path for s in report.states] == ["count"]
    assert [a.path for a in report.arguments] == ["x"]
    assert report.cost is not None


def test_the_other_twins_are_told():
    weight = sf.Param(jnp.ones(3))

    def loss(x):
        return (weight.value * x).sum()

    report = sf.explain(sf.filter_value_and_grad(loss, wrt=weight), jnp.ones(3))
    assert [s.path for s in report.states] == ["weight"]

    def body(carry, x):
        weight.value *= 2
        return carry + x, None

    report = sf.explain(sf.scan, body, jnp.array(0.0), jnp.ones(3))
    assert [(s.path, s.written) for s in report.states] == [("weight", True)]
    assert [box.label for box in report.box.inside] == ["scan of 3"]
    assert [a.path for a in report.arguments] == ["f", "init", "xs"]


def test_something_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match="takes a function and its arguments, not 3"):
        sf.explain(3)
    state = sf.State(0)
    with pytest.raises(TypeError, match="was passed as argument 0"):
        sf.explain(lambda s: s, state)


# -- without changing anything ------------------------------------------------------


def test_nothing_runs_and_nothing_changes():
    ran = []
    count = sf.State(jnp.array(0), name="count")

    @sf.filter_jit
    def fn(x):
        count.value += 1
        jax.debug.callback(lambda: ran.append(1))
        return x

    before = count.value
    report = sf.explain(fn, jnp.ones(3), compile=True)
    str(report), report.to_dict(), report.diagram(), report._repr_html_()
    jax.effects_barrier()
    assert ran == []
    assert count.value is before
    assert fn.retraces() == []
    stats = fn.stateful_function.get_cache_stats()["compilation_cache"]
    assert (stats["size"], stats["hits"], stats["misses"]) == (0, 0, 0)
    fn(jnp.ones(3))
    sf.explain(fn, jnp.ones(4))
    assert [r.cause for r in fn.retraces()] == ["first call"]
    assert fn.stateful_function.get_cache_stats()["compilation_cache"]["size"] == 1


def test_no_limit_is_used_up_and_nothing_is_logged(caplog):
    fn = sf.max_traces(0)(sf.filter_jit(lambda x: x))
    with sf.log_retraces(), sf.max_traces(0):
        sf.explain(fn, jnp.ones(3), compile=True)
    assert caplog.records == []


def test_a_function_that_raises_leaves_everything_as_it_was():
    count = sf.State(jnp.array(0))

    def fn():
        count.value += 1
        raise KeyError("no")

    with pytest.raises(KeyError):
        sf.explain(fn)
    assert count.value == 0


def test_it_says_the_same_under_disable_jit():
    count = sf.State(jnp.array(0))

    def fn(x):
        count.value += 1
        return jax.lax.scan(lambda c, v: (c + v, None), 0.0, x)[0]

    said = sf.explain(fn, jnp.ones(3), compile=True)
    with jax.disable_jit():
        again = sf.explain(fn, jnp.ones(3), compile=True)
    assert again.equations == said.equations
    assert count.value == 0


def test_a_report_leaves_no_tracer_behind(checking_leaks):
    model = make_model()
    sf.explain(sf.filter_grad(lambda x: model(x).sum()), jnp.ones(3))


# -- how it is shown ----------------------------------------------------------------


def many(n=40, name="counter"):
    """A function that touches n States, and has transforms in transforms."""
    counters = {
        f"{name}_{i}": sf.State(np.zeros((i, 2), np.float32)) for i in range(n - 1)
    }
    net = sf.Param(eqx.nn.MLP(3, 1, 8, 2, key=jax.random.key(0)))

    @sf.filter_jit(donate_states=True)
    def train(x):
        def loss(x):
            def body(carry, row):
                for state in list(counters.values())[::2]:
                    state.value += 1
                return carry + net.value(row)[0], None

            return sf.scan(body, jnp.array(0.0), x)[0]

        for state in list(counters.values())[1::2]:
            state.value *= 2
        loss, grads = sf.filter_value_and_grad(loss, wrt=net)(x)
        net.value = eqx.apply_updates(net.value, jax.tree.map(lambda g: -g, grads))
        return loss, sf.cond(loss > 0, jnp.sin, jnp.cos, loss)

    return sf.explain(train, jnp.ones((4, 3)), compile=True)


@pytest.fixture(scope="module")
def forty():
    return many()


@pytest.fixture(scope="module")
def long_names():
    return many(name="a_name_that_is_so_long_that_it_alone_would_fill_a_line_of_" * 3)


def test_the_short_form_needs_no_library(forty, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert re.match(r"Report\(train: 40 States, \d+ equations\)$", repr(forty))


@pytest.mark.parametrize("which", ["forty", "long_names"])
def test_the_table_fits_100_columns(which, request, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    text = str(request.getfixturevalue(which))
    assert max(map(len, text.splitlines())) <= 100
    for title in ("States", "Arguments", "Result", "Equations", "XLA"):
        assert title in text.splitlines()


def test_the_table_has_a_line_for_each_state(forty):
    lines = str(forty).splitlines()
    for use in forty.states:
        (line,) = (x for x in lines if use.path is not None and f" {use.path} " in x)
        assert use.kind in line
        assert line.count("✓") == use.read + use.written + use.donated


def test_the_table_says_how_to_get_the_cost():
    assert "compile=True" in str(sf.explain(lambda: 1))
    assert "touches no State" in str(sf.explain(lambda: 1))


def test_a_long_list_is_cut_and_summed_up():
    xs = [jnp.ones(3)] * 60
    report = sf.explain(lambda xs: xs[0], xs)
    assert len(report.arguments) == 60
    assert "… 21 more" in str(report)
    assert "720 B" in str(report)


def test_brackets_in_a_path_are_no_markup():
    state = {"[red]": sf.State(jnp.zeros(3))}
    assert "state['[red]']" in str(sf.explain(lambda: state["[red]"].value))


def test_rich_prints_it():
    import io

    import rich.console

    console = rich.console.Console(file=io.StringIO(), width=70)
    count = sf.State(0)
    console.print(sf.explain(lambda: count.value))
    text = console.file.getvalue()
    assert "count" in text
    assert max(map(len, text.splitlines())) <= 70


def test_notebooks_get_html(forty):
    html = forty._repr_html_()
    tree = ET.fromstring(html)
    assert tree.tag == "pre"
    assert "counters['counter_3']" in "".join(tree.itertext())


@pytest.mark.parametrize("which", ["forty", "long_names"])
def test_to_dict_is_json(which, request):
    report = request.getfixturevalue(which)
    found = report.to_dict()
    assert json.loads(json.dumps(found)) == found
    assert len(found["states"]) == 40
    assert found["states"][1]["bytes"] == sum(
        leaf["bytes"] for leaf in found["states"][1]["arrays"]
    )
    assert found["transforms"]["equations"] == sum(found["equations"].values())
    assert found["cost"]["peak_bytes"] > 0


# -- pictures -----------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


def rectangles(svg, tag):
    """The rectangles of a picture, or the space that its texts take."""
    found = []
    for node in ET.fromstring(svg).iter(SVG + tag):
        x, y = float(node.get("x", 0)), float(node.get("y", 0))
        if tag == "rect":
            found.append((x, y, float(node.get("width")), float(node.get("height"))))
        else:
            # Wider than any monospaced face, and as high as its tallest letters.
            size = float(node.get("font-size"))
            text = node.text or ""
            found.append((x, y - size, 0.62 * size * len(text), 1.25 * size, text))
    return found


def overlap(a, b):
    return (
        a[0] < b[0] + b[2]
        and b[0] < a[0] + a[2]
        and a[1] < b[1] + b[3]
        and b[1] < a[1] + a[3]
    )


def inside(a, b):
    return (
        b[0] <= a[0]
        and a[0] + a[2] <= b[0] + b[2]
        and b[1] <= a[1]
        and a[1] + a[3] <= b[1] + b[3]
    )


@pytest.mark.parametrize("which", ["forty", "long_names"])
def test_no_labels_overlap_with_40_states(which, request):
    svg = request.getfixturevalue(which).diagram()
    texts, boxes = rectangles(svg, "text"), rectangles(svg, "rect")
    assert len(texts) > 120
    clashes = [(a, b) for i, a in enumerate(texts) for b in texts[:i] if overlap(a, b)]
    assert clashes == []
    page, *boxes = boxes
    assert all(inside(box, page) for box in boxes)
    for text in texts:
        assert any(inside(text, box) for box in boxes), text
    # Boxes lie apart or inside of each other.
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert not overlap(a, b) or inside(a, b) or inside(b, a)


def test_the_picture_shows_states_function_and_nested_transforms(forty):
    svg = forty.diagram()
    texts = [t[4] for t in rectangles(svg, "text")]
    read = sum(use.read for use in forty.states)
    written = sum(use.written for use in forty.states)
    assert sum(t.startswith("counters[") or t == "net" for t in texts) == read + written
    for label in ("train", "scan of 4", "grad, forward", "grad, backward"):
        assert label in texts
    assert any(t.startswith("cond of 2 branches") for t in texts)
    assert "result" in texts
    lines = list(ET.fromstring(svg).iter(SVG + "path"))
    lines += list(ET.fromstring(svg).iter(SVG + "line"))
    assert len(lines) >= read + written + 2


def test_a_label_that_was_cut_shows_whole_as_a_tool_tip(long_names):
    svg = long_names.diagram()
    titles = [node.text for node in ET.fromstring(svg).iter(SVG + "title")]
    assert long_names.states[0].path in titles


def test_a_picture_shows_in_notebooks(forty):
    picture = forty.diagram()
    assert picture._repr_svg_() == str(picture)
    assert picture == forty.diagram("svg")


def test_nested_transforms_are_boxes_in_boxes():
    def fn(x):
        def body(carry, row):
            y = sf.cond(row.sum() > 0, jnp.sin, jnp.cos, carry)
            return sf.while_loop(lambda v: v < 1, lambda v: v + 1, y), None

        return sf.scan(body, jnp.array(0.0), x)[0]

    (scan,) = sf.explain(fn, jnp.ones((3, 2))).box.inside
    assert scan.label == "scan of 3"
    labels = [box.label for box in scan.inside]
    assert "cond of 2 branches" in labels
    assert "while_loop" in labels
    assert scan.equations > sum(box.equations for box in scan.inside)


def test_grad_and_vmap_are_boxes():
    def fn(x):
        return sf.filter_grad(lambda v: sf.filter_vmap(jnp.sin)(v).sum())(x)

    boxes = sf.explain(fn, jnp.ones(3)).box.inside
    labels = [box.label for box in boxes]
    assert labels == ["grad, forward", "grad, backward"]
    assert "vmap" in [inner.label for box in boxes for inner in box.inside]


def test_boxes_that_are_alike_are_one():
    @jax.jit
    def layer(x):
        return jnp.sin(x)

    def fn(x):
        for _ in range(12):
            x = layer(x)
        return x

    (box,) = sf.explain(fn, jnp.ones(3)).box.inside
    assert (box.label, box.times, box.equations) == ("jit layer", 12, 1)
    report = sf.explain(fn, jnp.ones(3))
    assert "jit layer x 12" in report.diagram()
    assert "jit layer x 12" in report.diagram("mermaid")


def test_a_box_with_very_many_boxes_says_how_many_are_left_out():
    def fn(x):
        for i in range(40):
            x = jax.lax.fori_loop(0, i + 1, lambda _, v: v * 2, x)
        return x

    svg = sf.explain(fn, jnp.ones(3)).diagram()
    assert "16 more" in [t[4] for t in rectangles(svg, "text")]


def test_a_function_with_nothing_in_and_out_has_a_picture():
    report = sf.explain(lambda: None)
    assert len(rectangles(report.diagram(), "text")) == 2
    assert report.diagram("mermaid").startswith("flowchart LR\n")


def test_mermaid_needs_no_library(forty, monkeypatch):
    monkeypatch.setitem(sys.modules, "drawsvg", None)
    monkeypatch.setitem(sys.modules, "rich", None)
    text = forty.diagram("mermaid")
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == "flowchart LR"
    assert sum(line.startswith("subgraph") for line in lines) == lines.count("end")
    for use in forty.states:
        shown = [x for x in lines if f'["{use.path}<br/>' in x]
        assert len(shown) == use.read + use.written
    declared = {m[1] for m in map(re.compile(r"(\w+)[\[(]").match, lines) if m}
    declared |= {x.split("[")[0].split()[1] for x in lines if x.startswith("subgraph")}
    for line in lines:
        if "-->" in line:
            assert set(line.split(" --> ")) <= declared


def test_mermaid_labels_are_escaped():
    states = {'a"<b>#`': sf.State(jnp.zeros(3))}
    text = sf.explain(lambda: next(iter(states.values())).value).diagram("mermaid")
    assert "#quot;#lt;b#gt;#35;#96;" in text
    assert '"<b>' not in text


def test_an_unknown_format_is_refused(forty):
    with pytest.raises(ValueError, match="should be 'svg' or 'mermaid'"):
        forty.diagram("png")


@pytest.mark.parametrize(
    ("library", "show", "extra"),
    [
        ("rich", str, "display"),
        ("rich", lambda r: r._repr_html_(), "display"),
        ("rich", lambda r: r.__rich__(), "display"),
        ("drawsvg", lambda r: r.diagram(), "diagram"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(
    library, show, extra, forty, monkeypatch
):
    for name in [n for n in sys.modules if n.partition(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"^{library} is needed to ") as info:
        show(forty)
    assert f"'statefun[{extra}]'" in str(info.value)
