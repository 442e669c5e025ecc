"""Where jaxprs and their equations differ between jax 0.10 and 0.12.

- 0.11 merged `ClosedJaxpr` into `Jaxpr`. Until then an equation may also hold an
  open `Jaxpr` (checkpoint's), which has no `consts`.
- 0.11 replaced scan's `num_consts` and `num_carry` by the trees `ft_in` and
  `ft_out`. Only methods of the trees that the equation itself holds are used, so
  nothing private is imported; a tree without them leaves the scan whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

if TYPE_CHECKING:
    # JAX annotates these with private classes that know of no shape.
    Atom = AnyJaxpr = Eqn = Any
    ClosedJaxpr = Any
else:
    from jax.extend.core import ClosedJaxpr

    Atom = Var | Literal
    AnyJaxpr = ClosedJaxpr | Jaxpr
    Eqn = JaxprEqn
Mask = tuple[bool, ...]


def consts_of(jaxpr: AnyJaxpr) -> Sequence[Any]:
    """The values of `jaxpr.constvars`; none for an open jaxpr."""
    return jaxpr.consts if isinstance(jaxpr, ClosedJaxpr) else ()


def keep(items: Sequence[Any], mask: Sequence[bool]) -> list[Any]:
    return [item for item, kept in zip(items, mask, strict=True) if kept]


def _keep_names(names: Any, mask: Mask) -> tuple[str, ...] | None:
    # Best effort upstream too: a jaxpr built by hand may have names that do not fit.
    if not isinstance(names, tuple) or len(names) != len(mask):
        return None
    return tuple(keep(names, mask))


def rebuild(
    jaxpr: AnyJaxpr,
    eqns: Sequence[Eqn],
    outvars: Sequence[Any],
    *,
    keep_in: Mask | None = None,
    keep_out: Mask | None = None,
    consts: tuple[Sequence[Any], Sequence[Any]] | None = None,
) -> AnyJaxpr:
    """`jaxpr` with other equations, and fewer inputs and outputs if masks say so.

    `debug_info` is always passed on: `replace` would forget every name as soon as
    one output became another variable, though names belong to positions.
    """
    invars, info = jaxpr.invars, jaxpr.debug_info
    names, paths = info.arg_names, info.result_paths
    closed = isinstance(jaxpr, ClosedJaxpr)
    inner = jaxpr.jaxpr if closed else jaxpr
    if keep_in is not None:
        names = _keep_names(names, keep_in)
        invars = keep(invars, keep_in)
    if keep_out is not None:
        paths = _keep_names(paths, keep_out)
        outvars = keep(outvars, keep_out)
    constvars, values = consts or (inner.constvars, consts_of(jaxpr))
    inner = inner.replace(
        constvars=list(constvars),
        invars=invars,
        outvars=list(outvars),
        eqns=list(eqns),
        debug_info=info._replace(arg_names=names, result_paths=paths),
    )
    if not closed:
        return inner
    return ClosedJaxpr(inner, list(values))  # pyright: ignore[reportCallIssue]


def scan_counts(eqn: Eqn) -> tuple[int, int] | None:
    """How many constants and carries a scan has; None when it does not say."""
    params = eqn.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    tree = params.get("ft_in")
    if hasattr(tree, "unpack") and hasattr(tree, "filter_with_mask"):
        consts, carry, _ = tree.unpack()
        return len(consts), len(carry)
    return None


def scan_params(eqn: Eqn, keep_in: Mask, keep_out: Mask) -> dict[str, Any]:
    """The parameters that partition a scan's inputs, for the inputs that stay."""
    params = eqn.params
    if "num_consts" in params:
        consts, carry = params["num_consts"], params["num_carry"]
        return {
            "num_consts": sum(keep_in[:consts]),
            "num_carry": sum(keep_in[consts : consts + carry]),
        }
    return {
        "ft_in": params["ft_in"].filter_with_mask(keep_in),
        "ft_out": params["ft_out"].filter_with_mask(keep_out),
    }


def _open(choice: Any) -> bool:
    # The type of "no sharding was asked for" is private.
    return choice is None or type(choice).__name__ == "UnspecifiedValue"


def free_input(eqn: Eqn, i: int) -> bool:
    """Whether a jit asks nothing of its input: neither sharding nor layout."""
    return _open(eqn.params["in_shardings"][i]) and _open(eqn.params["in_layouts"][i])


def free_output(eqn: Eqn, i: int) -> bool:
    return _open(eqn.params["out_shardings"][i]) and _open(eqn.params["out_layouts"][i])
