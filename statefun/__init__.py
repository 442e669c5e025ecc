"""Mutable State for Equinox modules, seen by JAX's transformations."""

from typing import TYPE_CHECKING

from . import metrics as metrics, nn as nn
from ._call.function import (
    StatefulFunction as StatefulFunction,
    StateTrace as StateTrace,
    make_jaxpr as make_jaxpr,
)
from ._call.keys import CacheKey as CacheKey
from ._errors import (
    StateError as StateError,
    StateTraceError as StateTraceError,
    StateTypeError as StateTypeError,
    StateValueError as StateValueError,
)
from ._rng import Rng as Rng
from ._state.state import Param as Param, State as State, is_state as is_state
from ._state.tree import (
    clone as clone,
    freeze as freeze,
    states as states,
    update as update,
    values as values,
)
from .inspect import (
    Cause as Cause,
    Report as Report,
    Retrace as Retrace,
    TraceLimitError as TraceLimitError,
    explain as explain,
    log_retraces as log_retraces,
    max_traces as max_traces,
)
from .ir import (
    optimize_jaxpr as optimize_jaxpr,
)
from .transforms import (
    Compiled as Compiled,
    Jitted as Jitted,
    Lowered as Lowered,
    Traced as Traced,
    associative_scan as associative_scan,
    checkify as checkify,
    cond as cond,
    filter_checkpoint as filter_checkpoint,
    filter_closure_convert as filter_closure_convert,
    filter_custom_jvp as filter_custom_jvp,
    filter_custom_vjp as filter_custom_vjp,
    filter_eval_shape as filter_eval_shape,
    filter_grad as filter_grad,
    filter_hessian as filter_hessian,
    filter_jacfwd as filter_jacfwd,
    filter_jacrev as filter_jacrev,
    filter_jit as filter_jit,
    filter_jvp as filter_jvp,
    filter_make_jaxpr as filter_make_jaxpr,
    filter_value_and_grad as filter_value_and_grad,
    filter_vjp as filter_vjp,
    filter_vmap as filter_vmap,
    fori_loop as fori_loop,
    map as map,
    scan as scan,
    shard_map as shard_map,
    switch as switch,
    while_loop as while_loop,
)

if TYPE_CHECKING:
    from .optim import Hyperparams as Hyperparams, Optimizer as Optimizer


def __getattr__(name: str) -> object:
    # optax takes longer to import than all of statefun, and not everybody needs it.
    if name in ("Hyperparams", "Optimizer"):
        from . import optim

        return getattr(optim, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "CacheKey",
    "Cause",
    "Compiled",
    "Hyperparams",
    "Jitted",
    "Lowered",
    "Optimizer",
    "Param",
    "Report",
    "Retrace",
    "Rng",
    "State",
    "StateError",
    "StateTrace",
    "StateTraceError",
    "StateTypeError",
    "StateValueError",
    "StatefulFunction",
    "TraceLimitError",
    "Traced",
    "associative_scan",
    "checkify",
    "clone",
    "cond",
    "explain",
    "filter_checkpoint",
    "filter_closure_convert",
    "filter_custom_jvp",
    "filter_custom_vjp",
    "filter_eval_shape",
    "filter_grad",
    "filter_hessian",
    "filter_jacfwd",
    "filter_jacrev",
    "filter_jit",
    "filter_jvp",
    "filter_make_jaxpr",
    "filter_value_and_grad",
    "filter_vjp",
    "filter_vmap",
    "fori_loop",
    "freeze",
    "is_state",
    "log_retraces",
    "make_jaxpr",
    "map",
    "max_traces",
    "metrics",
    "nn",
    "optimize_jaxpr",
    "scan",
    "shard_map",
    "states",
    "switch",
    "update",
    "values",
    "while_loop",
]
