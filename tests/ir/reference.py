"""A jaxpr evaluated one equation at a time: slow, obvious, and the same bits always.

`jax.jit` may fuse a product and a sum into one rounding, and fuse differently after
an optimization. So the passes are judged by this interpreter, which runs every
equation by itself, those inside calls and loops included.
"""

import jax
import numpy as np
from jax.extend.core import Literal


def _scan_counts(eqn):
    params = eqn.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    return tuple(len(part) for part in params["ft_in"].unpack()[:2])


def _call(eqn, args):
    """The results of an equation that calls jaxprs, or None for any other."""
    params = eqn.params
    match eqn.primitive.name:
        case "jit" | "pjit" | "remat2" | "checkpoint":
            return run(params["jaxpr"], *args)
        case "custom_jvp_call" | "custom_vjp_call":
            return run(params["call_jaxpr"], *args)
        case "cond":
            index = int(np.clip(int(args[0]), 0, len(params["branches"]) - 1))
            return run(params["branches"][index], *args[1:])
        case "while":
            n, m = params["cond_nconsts"], params["body_nconsts"]
            test, body, carry = args[:n], args[n : n + m], args[n + m :]
            while bool(run(params["cond_jaxpr"], *test, *carry)[0]):
                carry = run(params["body_jaxpr"], *body, *carry)
            return carry
        case "scan":
            n, m = _scan_counts(eqn)
            consts, carry, xs = args[:n], args[n : n + m], args[n + m :]
            steps = range(params["length"])
            collected = []
            for i in reversed(steps) if params["reverse"] else steps:
                out = run(params["jaxpr"], *consts, *carry, *[x[i] for x in xs])
                carry = out[:m]
                collected.append([np.asarray(y) for y in out[m:]])
            if params["reverse"]:
                collected.reverse()
            ys = [np.stack(y) for y in zip(*collected, strict=True)]
            return [*carry, *ys]
    return None


def run(jaxpr, *args):
    """What `jaxpr` returns for `args`."""
    env = {}

    def read(atom):
        if isinstance(atom, Literal):
            dtype = getattr(atom.aval, "dtype", None)
            return np.asarray(atom.val, dtype)
        return env[atom]

    def write(variables, values):
        env.update(zip(variables, values, strict=True))

    write(jaxpr.constvars, getattr(jaxpr, "consts", ()))
    write(jaxpr.invars, args)
    for eqn in jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        outs = _call(eqn, values)
        if outs is None:
            outs = eqn.primitive.bind(*values, **eqn.params)
            if not eqn.primitive.multiple_results:
                outs = [outs]
            if eqn.effects:
                jax.effects_barrier()
        write(eqn.outvars, outs)
    return [read(v) for v in jaxpr.outvars]


def bits(value, nan_is_nan=False):
    """Dtype, shape and bytes of an array; optionally one pattern for all NaNs."""
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    value = np.asarray(value)
    if nan_is_nan and jax.dtypes.issubdtype(value.dtype, np.inexact):
        parts = [value.real, value.imag] if value.dtype.kind == "c" else [value]
        value = np.stack(
            [np.where(p != p, np.asarray(np.nan, p.dtype), p) for p in parts]
        )
    return value.dtype.name, value.shape, value.tobytes()
