"""The benchmarks' arithmetic: which figure is compared with which budget."""

import jax.numpy as jnp
import pytest

from . import __main__ as command
from ._harness import OURS, Contender, Effort, Row, calls, measure, take_turns

SHORT = Effort(rounds=4, block=1e-4, slow_rounds=2)


def row(samples, budgets):
    return Row("work", lambda effort: dict(samples), budgets, unit="MB")


def test_the_ratio_is_the_median_of_those_of_the_rounds():
    # A slow second round slows both, and must not count.
    samples = {OURS: [1.0, 30.0, 1.0], "jax": [2.0, 60.0, 0.5]}
    (result,) = measure(row(samples, {"jax": 0.6}), SHORT)
    assert (result.ours, result.theirs, result.ratio) == (1.0, 2.0, 0.5)
    assert not result.over


def test_over_is_what_costs_more_than_its_budget():
    samples = {OURS: [3.0], "jax": [2.0], "peer": [1.0]}
    results = {r.against: r for r in measure(row(samples, {"jax": 1.4}), SHORT)}
    assert results["jax"].over
    assert results["peer"].budget is None and not results["peer"].over


def test_a_budget_without_its_contender_is_an_error():
    with pytest.raises(ValueError, match="no samples of jax"):
        measure(row({OURS: [1.0]}, {"jax": 1.0}), SHORT)


def test_the_order_of_the_contenders_is_turned_round_every_time():
    asked = []

    def block(name):
        asked.append(name)
        return float(len(asked))

    samples = take_turns(block, ["a", "b"], rounds=2)
    assert asked == ["a", "b", "a", "b", "b", "a"]  # the first pair warms up
    assert samples == {"a": [3.0, 6.0], "b": [4.0, 5.0]}


def test_calls_go_on_from_where_the_last_one_left_off():
    counts = {OURS: 0, "jax": 0}

    def build(peers):
        def contender(name):
            def call():
                counts[name] += 1

            return Contender(call, lambda: jnp.array(counts[name]))

        return {name: contender(name) for name in counts}

    samples = calls(build)(SHORT)
    assert {name: len(times) for name, times in samples.items()} == {OURS: 4, "jax": 4}
    assert min(counts.values()) >= 3 + 5  # compiled, then a call at least each round


def test_the_table_shows_every_row_and_what_is_over(monkeypatch, capsys):
    rows = [
        row({OURS: [3.0], "jax": [2.0]}, {"jax": 1.4}),
        row({OURS: [1.0], "eqx": [2.0]}, {"eqx": 1.4}),
    ]
    monkeypatch.setattr(command, "_rows", lambda: rows)
    assert command.main(["--quick", "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert "| work | MB | 3.00 | jax | 2.00 | 1.50 | 1.40 | over |" in printed
    assert "| work | MB | 1.00 | eqx | 2.00 | 0.50 | 1.40 | ok |" in printed
    assert "1 over budget" in printed
    assert command.main(["--quick", "--strict"]) == 1
    assert command.main(["--strict", "--only", "nothing of this name"]) == 0
