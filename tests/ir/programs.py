"""Random programs: drawn as data, so that hypothesis can shrink them, then traced.

A program is a list of instructions over a growing pool of arrays. Each names its
operands by number, taken modulo what is there, so that every list of instructions
is a program. The lists favour what the passes look for: literals that are neutral,
operations that undo one another, the same instruction twice, results nobody uses.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax
from jax.experimental import io_callback

DTYPES = tuple(
    np.dtype(d)
    for d in (
        bool, np.int8, np.int32, np.uint8, np.uint32,
        jnp.bfloat16, np.float16, np.float32, np.complex64,
    )
)  # fmt: skip
SHAPES = ((), (3,), (1, 3), (2, 3))


def kind(dtype):
    for name, parent in (
        ("bool", np.bool_),
        ("int", np.integer),
        ("float", np.floating),
    ):
        if jnp.issubdtype(dtype, parent):
            return name
    return "complex"


def specials(dtype):
    """The values that identities trip over.

    No subnormals and no signalling NaN: eager arithmetic on a CPU flushes the former
    and quiets the latter, even in `x * 1`, which compiled code does not compute.
    `test_identities.py` has them.
    """
    match kind(dtype):
        case "bool":
            values = [False, True]
        case "int":
            info = np.iinfo(dtype)
            values = [0, 1, 2, 7, info.min, info.max, info.max - 1]
            if info.min < 0:
                values += [-1, -5]
        case "float":
            values = [0.0, -0.0, 1.0, -1.0, 0.5, 3.25, -7.0, np.inf, -np.inf, np.nan]
        case _:
            values = [0j, complex(-0.0, -0.0), complex(0.0, -0.0), 1 + 0j, 1 - 2j]
            values += [complex(np.inf, 1), complex(np.nan, 0), complex(0.0, np.inf)]
    return np.array(values).astype(dtype)


# By kind of dtype; every entry takes and returns one dtype.
UNARY = {
    "bool": [lax.bitwise_not],
    "int": [lax.bitwise_not, lax.neg, lambda x: lax.integer_pow(x, 1), jnp.copy],
    "float": [
        lax.neg,
        lax.floor,
        lax.abs,
        lax.sqrt,
        lax.stop_gradient,
        lambda x: lax.integer_pow(x, 1),
        lambda x: lax.integer_pow(x, 2),
        lambda x: lax.reduce_precision(x, 5, 3),
        jnp.copy,
    ],
    "complex": [lax.neg, lambda x: lax.integer_pow(x, 1), jnp.copy],
}
BINARY = {
    "bool": [lax.bitwise_and, lax.bitwise_or, lax.bitwise_xor, lax.max],
    "int": [
        lax.add, lax.sub, lax.mul, lax.max, lax.min,
        lax.bitwise_and, lax.bitwise_or, lax.bitwise_xor,
        lax.shift_left, lax.shift_right_logical,
    ],
    "float": [lax.add, lax.sub, lax.mul, lax.div, lax.max, lax.min],
    "complex": [lax.add, lax.sub, lax.mul],
}  # fmt: skip
COMPARE = [lax.eq, lax.ne, lax.lt, lax.ge]


def _pad_nothing(x):
    return lax.pad(x, lax.full((), 0, x.dtype), [(0, 0, 0)] * x.ndim)


SHAPE = [
    lambda x: lax.transpose(x, tuple(reversed(range(x.ndim)))),
    lambda x: lax.transpose(x, tuple(range(x.ndim))),
    lambda x: lax.reshape(x, (x.size,)),
    lambda x: lax.reshape(lax.reshape(x, (x.size, 1)), x.shape),
    lambda x: lax.expand_dims(x, (0,)),
    lambda x: lax.broadcast_in_dim(x, (2, *x.shape), tuple(range(1, x.ndim + 1))),
    lambda x: lax.broadcast_in_dim(x, x.shape, tuple(range(x.ndim))),
    lambda x: lax.slice(x, (0,) * x.ndim, x.shape),
    lambda x: lax.rev(x, tuple(range(x.ndim))),
    lambda x: lax.dynamic_slice(x, (np.int32(1),) * x.ndim, x.shape),
    lambda x: lax.squeeze(x, tuple(i for i, n in enumerate(x.shape) if n == 1)),
    _pad_nothing,
]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_jvp(body, *args):
    return body(*args)


@_with_jvp.defjvp
def _with_jvp_rule(body, primals, tangents):
    return jax.jvp(body, primals, tangents)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_vjp(body, *args):
    return body(*args)


_with_vjp.defvjp(
    lambda body, *args: jax.vjp(body, *args), lambda body, back, ct: back(ct)
)


class Machine:
    """Runs programs on tracers, and records what the callbacks see."""

    def __init__(self):
        self.log = []
        self.quiet = 0

    def note(self, tag, value):
        self.log.append((tag, np.asarray(value).tobytes()))

    def answer(self, tag, value):
        self.note(tag, value)
        return np.asarray(value)

    def run(self, program, pool):
        pool = list(pool)
        last = None
        for step in program:
            if step[0] == "again":
                step = last or ("unary", 0, 0)
            last = step
            pool.extend(self.step(step, pool))
        return pool

    def step(self, step, pool):
        name, *rest = step
        if self.quiet and name in ("debug", "io", "ref"):
            return []
        return getattr(self, name)(pool, *rest)

    def unary(self, pool, i, op):
        x = pool[i % len(pool)]
        ops = UNARY[kind(x.dtype)]
        return [ops[op % len(ops)](x)]

    def binary(self, pool, i, j, op):
        x = pool[i % len(pool)]
        fits = [y for y in pool if y.dtype == x.dtype and y.shape == x.shape]
        y = fits[j % len(fits)]
        ops = BINARY[kind(x.dtype)]
        return [ops[op % len(ops)](x, y)]

    def literal(self, pool, i, value, op, left):
        x = pool[i % len(pool)]
        values = specials(x.dtype)
        y = values[value % len(values)]  # a literal: the scalar that lax takes
        if op % 3 == 0:
            y = lax.full(x.shape, y)
        ops = BINARY[kind(x.dtype)]
        op = ops[op % len(ops)]
        return [op(y, x) if left % 2 else op(x, y)]

    def compare(self, pool, i, j, op):
        x = pool[i % len(pool)]
        fits = [y for y in pool if y.dtype == x.dtype and y.shape == x.shape]
        op = COMPARE[op % (2 if kind(x.dtype) == "complex" else 4)]
        return [op(x, fits[j % len(fits)])]

    def shape(self, pool, i, op):
        x = pool[i % len(pool)]
        y = SHAPE[op % len(SHAPE)](x)
        return [y if y.size <= 12 and y.ndim <= 3 else x]

    def convert(self, pool, i, to):
        x = pool[i % len(pool)]
        dtype = DTYPES[to % len(DTYPES)]
        # Out of range is undefined in XLA; complex to real is no conversion of lax.
        if kind(x.dtype) in ("float", "complex") and kind(dtype) not in (
            "float",
            "complex",
        ):
            dtype = x.dtype
        if kind(x.dtype) == "complex":
            dtype = x.dtype
        return [lax.convert_element_type(x, dtype)]

    def select(self, pool, p, i, j):
        x = pool[i % len(pool)]
        fits = [y for y in pool if y.dtype == x.dtype and y.shape == x.shape]
        tests = [y for y in pool if y.dtype == bool and y.shape in ((), x.shape)]
        test = tests[p % len(tests)] if tests and p % 5 else jnp.asarray(bool(p % 2))
        return [lax.select_n(test, x, fits[j % len(fits)])]

    def constant(self, pool, i, value):
        dtype = DTYPES[i % len(DTYPES)]
        values = specials(dtype)
        x = jnp.asarray(np.resize(np.roll(values, value), SHAPES[value % 3]))
        ops = UNARY[kind(dtype)] + BINARY[kind(dtype)]
        op = ops[value % len(ops)]
        return [x, op(x) if op in UNARY[kind(dtype)] else op(x, x)]

    def barrier(self, pool, i):
        return [lax.optimization_barrier(pool[i % len(pool)])]

    def debug(self, pool, i, tag):
        jax.debug.callback(functools.partial(self.note, tag), pool[i % len(pool)])
        return []

    def io(self, pool, i, tag):
        x = pool[i % len(pool)]
        fn = functools.partial(self.answer, tag)
        return [
            io_callback(fn, jax.ShapeDtypeStruct(x.shape, x.dtype), x, ordered=True)
        ]

    def ref(self, pool, i, j, how):
        x = pool[i % len(pool)]
        fits = [y for y in pool if y.dtype == x.dtype and y.shape == x.shape]
        ref = jax.new_ref(x)
        before = ref[...]
        for k in range(how % 3):
            ref[...] = ref[...] if (how + k) % 2 else fits[j % len(fits)]
        middle = ref[...]
        if how % 2 and kind(x.dtype) in ("int", "float"):
            jax.ref.addupdate(ref, (...,), fits[j % len(fits)])
        return [before, middle, ref[...]]

    def call(self, pool, how, program, picks):
        """A call of some kind, whose body is a program over some of the pool."""
        args = [pool[i % len(pool)] for i in picks]

        def body(*args):
            return tuple(self.run(program, args))[-3:]

        match how % 5:
            case 0:
                out = jax.jit(body)(*args)
            case 1:
                out = jax.checkpoint(body)(*args)
            case 2 | 3 as how:
                self.quiet += 1  # JAX allows few effects there
                out = (_with_jvp if how == 2 else _with_vjp)(body, *args)
                self.quiet -= 1
            case _:
                # Called with a literal, which the body may be folded for.
                fn = jax.jit(
                    lambda flag, *args: body(lax.select(flag, args[0], args[0]), *args)
                )
                out = fn(True, *args)
        return list(out)

    def cond(self, pool, p, programs, picks):
        args = [pool[i % len(pool)] for i in picks]

        def branch(program):
            def body(*args):
                return tuple(_same_types(self.run(program, args), args))

            return body

        tests = [y for y in pool if y.dtype == bool and y.shape == ()]
        test = tests[p % len(tests)] if tests else jnp.asarray(bool(p % 2))
        return list(lax.cond(test, *map(branch, programs), *args))

    def scan(self, pool, program, consts, carry, reverse):
        consts = [pool[i % len(pool)] for i in consts]
        carry = tuple(pool[i % len(pool)] for i in carry)

        def body(carry, x):
            out = self.run(program, [*carry, *consts, x])
            return tuple(_same_types(out, carry)), (out[-1], carry[0])

        xs = jnp.arange(3, dtype=np.int32)
        carry, ys = lax.scan(body, carry, xs, reverse=bool(reverse % 2))
        return [*carry, *[lax.slice(y, (0,) * y.ndim, (1, *y.shape[1:])) for y in ys]]

    def while_loop(self, pool, program, consts, carry):
        consts = [pool[i % len(pool)] for i in consts]
        carry = tuple(pool[i % len(pool)] for i in carry)

        def body(state):
            i, *carry = state
            out = self.run(program, [*carry, *consts])
            return (i + 1, *_same_types(out, carry))

        return list(
            lax.while_loop(lambda s: s[0] < 2, body, (jnp.int32(0), *carry))[1:]
        )


def _same_types(pool, like):
    """For each of `like` the newest value of its type."""
    return [
        next(y for y in [*reversed(pool), x] if jax.typeof(y) == jax.typeof(x))
        for x in like
    ]


N = st.integers(0, 20)
PICKS = st.lists(N, min_size=1, max_size=3)


def _flat():
    return st.one_of(
        st.tuples(st.just("unary"), N, N),
        st.tuples(st.just("binary"), N, N, N),
        st.tuples(st.just("literal"), N, N, N, N),
        st.tuples(st.just("literal"), N, N, N, N),
        st.tuples(st.just("compare"), N, N, N),
        st.tuples(st.just("shape"), N, N),
        st.tuples(st.just("convert"), N, N),
        st.tuples(st.just("select"), N, N, N),
        st.tuples(st.just("constant"), N, N),
        st.tuples(st.just("again")),
        st.tuples(st.just("barrier"), N),
        st.tuples(st.just("again")),
    )


def _effects():
    return st.one_of(
        st.tuples(st.just("debug"), N, N),
        st.tuples(st.just("io"), N, N),
        st.tuples(st.just("ref"), N, N, N),
    )


def _nested(inner):
    body = st.lists(inner, min_size=1, max_size=5)
    return st.one_of(
        _flat(),
        st.tuples(st.just("call"), N, body, PICKS),
        st.tuples(st.just("call"), N, body, PICKS),
        st.tuples(st.just("cond"), N, st.tuples(body, body), PICKS),
        st.tuples(st.just("scan"), body, PICKS, PICKS, N),
        st.tuples(st.just("while_loop"), body, PICKS, PICKS),
    )


def programs(effects):
    """Lists of instructions, nested up to two deep."""
    flat = st.one_of(_flat(), _flat(), _effects()) if effects else _flat()
    return st.lists(_nested(_nested(flat)) | flat, min_size=6, max_size=14)


@st.composite
def inputs(draw):
    """A few arrays of special values."""
    out = []
    for dtype in draw(st.lists(st.sampled_from(DTYPES), min_size=2, max_size=4)):
        shape = draw(st.sampled_from(SHAPES))
        values = specials(dtype)
        size = int(np.prod(shape))
        picks = draw(
            st.lists(st.integers(0, len(values) - 1), min_size=size, max_size=size)
        )
        out.append(values[picks].reshape(shape))
    return out
