"""How a comparison is measured: contenders take turns, and what counts is the ratio.

A `Row` is one line of work, done by several contenders, one of them statefun. It says
how far statefun's cost may be from each of the others:

    Row("call, 1 State", calls(build), {"jax.jit": 1.25})

`calls(build)` times calls that are made again and again; `build()` sets up the
contenders, so that nothing of a row is alive while another one is measured.
`first_calls(build)` times the first call of functions that are made anew each time, and
`process_figures(commands)` takes a figure from new processes. What is not a time can be
given as a function of its own from `Effort` to samples, with the unit beside it.

The machine is never quiet, so a single time says little: each round measures all
contenders one right after the other, in an order that is turned round every time, and
gives one ratio for each pair. The row reports the median of these ratios. In the same
rounds the garbage collector is off, since it would strike whoever comes along, and every
contender is waited for in the same way at the end of its block.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

OURS = "statefun"

Samples = dict[str, list[float]]  # contender -> one figure a round, lower is better


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int = 31
    block: float = 0.05  # seconds that a block of calls should take
    slow_rounds: int = 7  # for what takes a second or so: compiling, starting Python
    peers: bool = True


QUICK = Effort(rounds=15, block=0.01, slow_rounds=3)


class Contender(NamedTuple):
    """Somebody's way to do the work of a row.

    **Fields:**

    - `call`: does it once, from where the last call has left off.
    - `ready`: an array of the last call's results, to wait for. One, since they become
        ready together, and to collect them all would be timed as well.
    """

    call: Callable[[], Any]
    ready: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of work and who does it.

    **Arguments:**

    - `name`: what is done.
    - `samples`: measures all contenders.
    - `budgets`: for those that there is a promise about, at most how many times their
        cost may be ours. The others are there for comparison.
    - `unit`: of the samples.
    """

    name: str
    samples: Callable[[Effort], Samples]
    budgets: Mapping[str, float]
    unit: str = "µs"


class Result(NamedTuple):
    """statefun beside one other contender of a row."""

    row: Row
    against: str
    ours: float
    theirs: float
    ratio: float
    budget: float | None

    @property
    def over(self) -> bool:
        return self.budget is not None and self.ratio > self.budget


def measure(row: Row, effort: Effort) -> list[Result]:
    """Compares statefun with every other contender of a row."""
    samples = row.samples(effort)
    missing = [name for name in (OURS, *row.budgets) if name not in samples]
    if missing:
        raise ValueError(f"{row.name}: no samples of {', '.join(missing)}")
    ours = samples.pop(OURS)
    return [
        Result(
            row,
            name,
            statistics.median(ours),
            statistics.median(theirs),
            statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
            row.budgets.get(name),
        )
        for name, theirs in samples.items()
    ]


# -- ways to measure ----------------------------------------------------------------


def calls(
    build: Callable[[bool], Mapping[str, Contender]],
) -> Callable[[Effort], Samples]:
    """Microseconds of a call that has been made before.

    **Arguments:**

    - `build`: sets up the contenders; is told whether peers without a budget are wanted.
    """

    def samples(effort: Effort) -> Samples:
        contenders = build(effort.peers)
        repeats = {n: _repeats(c, effort.block) for n, c in contenders.items()}

        def block(name: str) -> float:
            contender, n = contenders[name], repeats[name]
            return 1e6 * _seconds(contender, n) / n

        return take_turns(block, list(contenders), effort.rounds)

    return samples


def first_calls(
    build: Callable[[], Mapping[str, Callable[[], Any]]],
) -> Callable[[Effort], Samples]:
    """Microseconds of the first call of a function: trace, compile, run.

    **Arguments:**

    - `build`: makes the functions anew, so that no cache knows them. What a call
        returns is waited for.
    """

    def samples(effort: Effort) -> Samples:
        def block(name: str) -> float:
            call = build()[name]
            start = time.perf_counter()
            jax.block_until_ready(call())
            return 1e6 * (time.perf_counter() - start)

        return take_turns(block, list(build()), effort.slow_rounds)

    return samples


def process_figures(
    commands: Mapping[str, Sequence[str]],
) -> Callable[[Effort], Samples]:
    """The figure that a process prints. Each sample is a process of its own."""

    def samples(effort: Effort) -> Samples:
        def block(name: str) -> float:
            done = subprocess.run(
                commands[name], check=True, capture_output=True, text=True
            )
            return float(done.stdout)

        return take_turns(block, list(commands), 2 * effort.slow_rounds)

    return samples


def take_turns(
    block: Callable[[str], float], names: Sequence[str], rounds: int
) -> Samples:
    """One sample of each contender a round, the order turned round every time."""
    samples: Samples = {name: [] for name in names}
    for name in names:  # the first round pays for what is set up late
        block(name)
    with _no_collection():
        for i in range(rounds):
            for name in names if i % 2 == 0 else reversed(names):
                samples[name].append(block(name))
    return samples


def _seconds(contender: Contender, n: int) -> float:
    call = contender.call
    jax.block_until_ready(contender.ready())
    start = time.perf_counter()
    for _ in range(n):
        call()
    jax.block_until_ready(contender.ready())
    return time.perf_counter() - start


def _repeats(contender: Contender, seconds: float) -> int:
    """How many calls fill a block."""
    for _ in range(3):  # compile
        contender.call()
    n = 1
    while (taken := _seconds(contender, n)) < seconds / 4:
        n *= 2
    return max(1, round(n * seconds / taken))


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
