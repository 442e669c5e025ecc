"""An exception at any bytecode of a call leaves States before or after, never between.

Ctrl-C may arrive anywhere. So every operation here is run again and again, and each time
`KeyboardInterrupt` is raised at another bytecode of statefun (by `sys.monitoring`, or
`sys.settrace`): the first, the second, and so on. After each:

- all States hold what they held before, or all hold what they would hold after;
- another thread reads and writes at once: no lock is held;
- an eager write is committed at once, and a hot call is as cheap as ever: no frame, count
  or version is left behind;
- the operation, done again, gives the right result, and nothing is traced again.

The operations and the means are here, the tests in `test_interrupts.py`: some places of
each operation, or all of them with `nox -s interrupts`, which takes half an hour. It also
runs `python -m tests.interrupts SEED SECONDS`, which does the same with real signals.
"""

import contextlib
import copy
import os
import pathlib
import queue
import subprocess
import sys
import textwrap
import threading

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import statefun as sf
from statefun import _compat
from statefun._call.compiled import present
from statefun._state import cell
from statefun._state.access import local

PACKAGE = str(pathlib.Path(sf.__file__).parent) + os.sep
# Context managers of statefun are left by way of this module.
WATCHED = (PACKAGE, contextlib.__file__)
LIMIT = 10  # seconds until what hangs counts as a deadlock
# At most so many places of each operation, spread evenly; 0 for all of them.
PLACES = int(os.environ.get("STATEFUN_INTERRUPTS", "25"))


# -- raising at the k-th bytecode ---------------------------------------------------


def raise_interrupt():
    raise KeyboardInterrupt


class Bytecodes:
    """Counts the bytecodes of statefun that run in a block, and may act at one."""

    def __init__(self, at=None, act=raise_interrupt):
        self.at = at
        self.act = act
        self.count = 0
        self.place = ""
        self.thread = threading.get_ident()

    def seen(self, code, line):
        if threading.get_ident() != self.thread:
            return
        self.count += 1
        if self.count - 1 == self.at:
            file = code.co_filename.removeprefix(PACKAGE)
            self.place = f"{file}:{line()} in {code.co_name}"
            self.act()

    if sys.version_info >= (3, 12):
        # There `sys.settrace` misses bytecodes of a frame that wasn't traced before.
        _tool = 4

        def __enter__(self):
            monitoring, event = sys.monitoring, sys.monitoring.events.INSTRUCTION
            if monitoring.get_tool(self._tool) is None:
                monitoring.use_tool_id(self._tool, "interrupts")

            def instruction(code, offset):
                if not code.co_filename.startswith(WATCHED):
                    return monitoring.DISABLE
                return self.seen(code, lambda: line_at(code, offset))

            monitoring.register_callback(self._tool, event, instruction)
            monitoring.set_events(self._tool, event)
            return self

        def __exit__(self, *_):
            sys.monitoring.set_events(self._tool, 0)

    else:

        def __enter__(self):
            self._before = sys.gettrace()
            sys.settrace(self._call)
            return self

        def __exit__(self, *_):
            sys.settrace(self._before)

        def _call(self, frame, event, arg):
            if not frame.f_code.co_filename.startswith(WATCHED):
                return None
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
            return self._bytecode

        def _bytecode(self, frame, event, arg):
            if event == "opcode":
                self.seen(frame.f_code, lambda: frame.f_lineno)
            return self._bytecode


def line_at(code, offset):
    return next(line for a, b, line in code.co_lines() if a <= offset < b)


def bytecodes(run):
    with Bytecodes() as counted:
        run()
    return counted.count


def interrupt(run, at, act=raise_interrupt):
    """Runs and interrupts; where, or "" if it had ended before that."""
    room = recursion_room()
    with Bytecodes(at, act) as bytecode:
        try:  # `contextlib` is watched
            run()
        except KeyboardInterrupt:
            pass
    if LOSES_ROOM:
        lost = room - recursion_room()
        sys.setrecursionlimit(sys.getrecursionlimit() + lost)
    return bytecode.place


# Python 3.11 takes some calls for being under way for ever after an exception that was
# raised while it was traced.
LOSES_ROOM = sys.version_info < (3, 12)


def recursion_room():
    if not LOSES_ROOM:
        return 0
    try:
        return recursion_room() + 1
    except RecursionError:
        return 0


# -- what is left behind ------------------------------------------------------------


class Elsewhere:
    """A thread that does what it is asked to."""

    def __init__(self):
        self._asked, self._answers = queue.SimpleQueue(), queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self):
        while True:
            function = self._asked.get()
            try:
                self._answers.put((function(), None))
            except BaseException as error:
                self._answers.put((None, error))

    def __call__(self, function):
        self._asked.put(function)
        try:
            answer, error = self._answers.get(timeout=LIMIT)
        except queue.Empty:
            raise AssertionError("another thread waits for ever") from None
        if error is not None:
            raise error
        return answer


def number(state):
    return int(np.ravel(jax.tree.leaves(state.value)[0])[0])


def restore():
    """Makes good what was left behind, lest one failure be the cause of the next."""
    local.frame = None
    present.states = None
    with contextlib.suppress(RuntimeError):
        while True:
            cell.lock.release()
    cell.shared.taken.clear()
    cell.shared.version += cell.shared.version & 1
    _compat.trace_generation(0).__enter__()
    _compat.return_to(_compat.TOP_LEVEL)


class Probe:
    """What has to work whatever was interrupted."""

    def __init__(self):
        self.elsewhere = Elsewhere()
        self.plain = sf.State(jnp.array(0), name="plain")
        self.count = sf.State(jnp.array(0), name="count")
        self.runs = 0

        @sf.filter_jit
        def hot():
            self.runs += 1
            self.count.value += 1

        self.hot = hot
        for _ in range(3):
            hot()
        self.cost = bytecodes(hot)

    def check(self):
        n = self.elsewhere(lambda: number(self.plain)) + 1
        self.plain.value = jnp.array(n)
        assert self.elsewhere(lambda: number(self.plain)) == n, "a frame is left"
        n = number(self.count)
        self.hot()  # which may tidy up
        assert bytecodes(self.hot) == self.cost, "a count or version is left"
        assert self.elsewhere(lambda: number(self.count)) == n + 2
        assert self.runs == 1, "hot calls are traced again"

        def write():
            self.plain.value = jnp.array(-n)

        self.elsewhere(write)
        assert number(self.plain) == -n


def places(total, most=PLACES):
    if not most or total <= most:
        return list(range(total))
    return sorted(set(np.linspace(0, total - 1, most).astype(int).tolist()))


def failures(operation, states, runs, probe, most=PLACES):
    """Interrupts the operation, which adds 1 to each State, at each place in turn.

    **Returns:** what went wrong, and where. Ends at the first that may spoil the rest.
    """
    for _ in range(3):
        operation()
    for _ in range(2):  # read as often as before an interrupt: the same bytecodes run
        assert len({number(s) for s in states}) == 1
    traced, missed = len(runs), 0
    chosen = places(bytecodes(operation), most)
    for at in chosen:
        (n,) = {number(s) for s in states}
        place = interrupt(operation, at)
        missed += not place
        try:
            there = probe.elsewhere(lambda: [number(s) for s in states])
            assert set(there) in ({n}, {n + 1}), f"{n} became {there}"
            probe.check()
            here = [number(s) for s in states]
            assert here == there, f"{there} elsewhere, {here} here"
            operation()
            after = [number(s) for s in states]
            assert after == [x + 1 for x in here], f"{here} became {after}"
            assert len(runs) == traced, "it is traced again"
        except Exception as error:
            return f"interrupted at {place}: {type(error).__name__}: {error}"
    assert 8 * missed <= len(chosen), "the operation does not run the same bytecodes"
    return ""


# -- the operations -----------------------------------------------------------------


class Counters(eqx.Module):
    a: sf.State
    b: dict
    scale: jax.Array

    def __init__(self):
        self.a = sf.State(jnp.array(0), name="a")
        self.b = {"b": sf.Param(jnp.zeros(2), name="b")}
        self.scale = jnp.array(1)

    @property
    def states(self):
        return [self.a, self.b["b"]]

    def add(self):
        self.a.value += self.scale
        self.b["b"].value += 1

    @sf.filter_jit
    def method(self, x):
        runs.append("method")
        self.add()
        return x


runs = []
OPERATIONS = {}


def operation(make):
    """Registers a function that makes an operation: `(states, run)`."""
    OPERATIONS[make.__name__] = make
    return make


def three():
    return [sf.State(jnp.array(0), name=name) for name in "abc"]


@operation
def an_eager_write():
    s = sf.State(jnp.array(0))

    def run():
        s.value = s.value + 1

    return [s], run


@operation
def an_eager_write_of_a_tree_with_a_number():
    s = sf.State({"a": jnp.array(0), "b": [jnp.array(0)]})

    def run():
        n = int(s.value["a"])
        s.value = {"a": n + 1, "b": [n + 1]}

    return [s], run


@operation
def an_eager_write_of_another_structure():
    s = sf.State((jnp.array(0), None))

    def run():
        n, _ = s.value
        s.value = (n + 1, {"b": n})
        s.value = (n + 1, None)

    return [s], run


@operation
def an_update():
    states = three()
    one = jnp.array(1)

    def run():
        sf.update(states, [s.value + one for s in states])

    return states, run


@operation
def a_call():
    states = three()

    @sf.filter_jit
    def run():
        runs.append("call")
        for s in states:
            s.value += 1

    return states, run


@operation
def a_call_with_arguments_and_a_result():
    states = three()

    @sf.filter_jit
    def f(x, y):
        runs.append("call")
        for s in states:
            s.value += x
        return {"y": y, "s": states[0].value}

    one = jnp.array(1)
    return states, lambda: f(one, y=np.ones(2))


@operation
def a_method():
    counters = Counters()
    x = jnp.ones(3)
    return counters.states, lambda: counters.method(x)


@operation
def a_call_with_two_module_arguments():
    modules = Counters(), Counters()

    @sf.filter_jit
    def f(one, two):
        runs.append("modules")
        one.add()
        two.add()
        return two

    return [s for m in modules for s in m.states], lambda: f(*modules)


@operation
def a_call_with_a_state_in_argument_and_closure():
    counters, other = Counters(), sf.State(jnp.array(0))

    @sf.filter_jit
    def f(module):
        runs.append("aliased")
        counters.a.value += 1
        module.b["b"].value += 1
        other.value += 1

    return [*counters.states, other], lambda: f(counters)


@operation
def a_call_that_donates():
    states = three()

    @sf.filter_jit(donate_states=True)
    def run():
        runs.append("donates")
        for s in states:
            s.value += 1

    return states, run


@operation
def a_call_with_a_runtime_check():
    states = three()

    @sf.filter_jit
    def run():
        runs.append("checked")
        for s in states:
            s.value = eqx.error_if(s.value + 1, s.value < 0, "below zero")

    return states, run


@operation
def a_call_with_a_static_argument_and_a_number():
    states = three()

    @sf.filter_jit
    def f(what, by):
        runs.append("static")
        for s in states:
            s.value += by.astype(int)

    return states, lambda: f("add", np.float32(1))


@operation
def a_call_with_jit_disabled():
    states = three()

    @sf.filter_jit
    def f():
        for s in states:
            s.value += 1

    def run():
        with jax.disable_jit():
            f()

    return states, run


@operation
def a_call_of_what_was_compiled_ahead_of_time():
    states = three()

    @sf.filter_jit
    def f():
        for s in states:
            s.value += 1

    return states, f.lower().compile()


@operation
def a_call_that_fails_and_is_caught():
    s = sf.State(jnp.array(0))

    @sf.filter_jit
    def f():
        s.value += 5
        raise KeyError

    def run():
        with contextlib.suppress(KeyError):
            f()
        s.value = s.value + 1

    return [s], run


@operation
def a_call_that_makes_a_module():
    s = sf.State(jnp.array(0))

    @sf.filter_jit
    def f():
        runs.append("makes")
        s.value += 1
        return Counters()

    return [s], f


@operation
def an_eager_gradient():
    w, count = sf.Param(jnp.zeros(2)), sf.State(jnp.array(0))

    def f(x):
        out = jnp.sum(w.value * x)
        w.value += 1
        count.value += 1
        return out

    gradient = sf.filter_grad(f, wrt=w)
    x = jnp.ones(2)
    return [w, count], lambda: gradient(x)


@operation
def an_eager_value_and_gradient_of_a_module():
    counters = Counters()

    def f(module, x):
        out = jnp.sum(module.b["b"].value * x)
        module.add()
        return out

    gradient = sf.filter_value_and_grad(f)
    x = jnp.ones(2)
    return counters.states, lambda: gradient(counters, x)


@operation
def an_eager_vmap():
    lanes, shared = sf.State(jnp.zeros(2, int)), sf.State(jnp.array(0))

    def f(x):
        lanes.value += 1
        shared.value += 1
        return x

    mapped = sf.filter_vmap(f, state_axes=[(lanes, 0)])
    xs = jnp.ones(2)
    return [lanes, shared], lambda: mapped(xs)


@operation
def an_eager_scan():
    states = three()

    def body(c, x):
        runs.append("scan")
        for s in states:
            s.value += x
        return c, None

    xs = jnp.array([1, 0])
    return states, lambda: sf.scan(body, jnp.array(0), xs)


@operation
def an_eager_fori_loop():
    states = three()

    def body(i, c):
        runs.append("fori_loop")
        for s in states:
            s.value += i
        return c

    return states, lambda: sf.fori_loop(0, 2, body, jnp.array(0))


@operation
def an_eager_cond():
    states = three()

    def yes(x):
        runs.append("cond")
        for s in states:
            s.value += x
        return x

    def no(x):
        return x

    one = jnp.array(1)
    return states, lambda: sf.cond(one > 0, yes, no, one)


@operation
def an_eager_checkpoint():
    states = three()

    @sf.filter_checkpoint
    def f(x):
        for s in states:
            s.value += x

    one = jnp.array(1)
    return states, lambda: f(one)


@operation
def an_eager_custom_vjp():
    states = three()

    @sf.filter_custom_vjp
    def f(x):
        for s in states:
            s.value += 1
        return x

    f.def_fwd(lambda perturbed, x: (f.fn(x), None))
    f.def_bwd(lambda residuals, g, perturbed, x: g)
    one = jnp.array(1.0)
    return states, lambda: f(one)


@operation
def an_eager_closure_convert():
    states = three()

    def f(x):
        runs.append("closure_convert")
        for s in states:
            s.value += x

    one = jnp.array(1)
    converted = sf.filter_closure_convert(f, one)
    return states, lambda: converted(one)


@operation
def copies():
    counters = Counters()

    def run():
        new = copy.deepcopy(counters)
        new.add()
        new = sf.clone(new)
        sf.update(counters, sf.freeze(new))

    return counters.states, run


# -- first calls: each is made by a new function ------------------------------------


def first_call():
    states = three()

    @sf.filter_jit
    def f(x):
        for s in states:
            s.value += x

    return states, f


def first_call_of_a_nest():
    states = three()

    def body(c, _):
        for s in states:
            s.value += c
        return c, None

    def f(x):
        sf.filter_checkpoint(lambda x: sf.scan(body, x, None, length=1)[0])(x)

    return states, sf.filter_jit(f)


# -- real signals -------------------------------------------------------------------

SIGNALS = """
    import os, random, signal, sys, time
    from tests.interrupts import OPERATIONS, Probe, number, runs

    signal.signal(signal.SIGALRM, signal.default_int_handler)  # as Ctrl-C
    probe = Probe()
    random.seed(int(sys.argv[1]))
    made = []
    for name, make in OPERATIONS.items():
        states, run = make()
        for _ in range(3):
            run()
        start = time.perf_counter()
        for _ in range(10):
            run()
        made.append((name, states, run, (time.perf_counter() - start) / 10))
    traced = len(runs)
    end = time.monotonic() + float(sys.argv[2])
    interrupted = rounds = 0
    while time.monotonic() < end:
        name, states, run, takes = random.choice(made)
        (n,) = {number(s) for s in states}
        done = 0
        try:
            # And once more, should the first arrive in a finalizer, which ignores it.
            soon = random.uniform(1e-6, 6 * takes)
            signal.setitimer(signal.ITIMER_REAL, soon, 2)
            while True:
                run()
                done += 1
        except BaseException:  # JAX makes other errors of an interrupt in its caches
            signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            there = probe.elsewhere(lambda: [number(s) for s in states])
            assert set(there) in ({n + done}, {n + done + 1}), f"{n} + {done}: {there}"
            probe.check()
            assert len(runs) == traced, "traced again"
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}")
            sys.stdout.flush()
            os._exit(1)
        interrupted += 1
    print(f"{interrupted} interrupts")
"""


def with_signals(seed, seconds):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SIGNALS), str(seed), str(seconds)],
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        cwd=pathlib.Path(__file__).parent.parent,
    )


if __name__ == "__main__":
    # Not a test: where a signal arrives is a matter of luck.
    done = with_signals(seed=int(sys.argv[1]), seconds=int(sys.argv[2]))
    print(done.stdout + done.stderr[-2000:])
    sys.exit(done.returncode)
