"""Mutable State for Equinox modules, seen by JAX's transformations."""

from ._cache import (
    CacheKey as CacheKey,
)
from ._errors import (
    StateError as StateError,
)
from ._errors import (
    StateTraceError as StateTraceError,
)
from ._errors import (
    StateTypeError as StateTypeError,
)
from ._errors import (
    StateValueError as StateValueError,
)
from ._function import (
    StatefulFunction as StatefulFunction,
)
from ._function import (
    StateTrace as StateTrace,
)
from ._function import (
    make_jaxpr as make_jaxpr,
)
from ._state import (
    Param as Param,
)
from ._state import (
    State as State,
)
from ._state import (
    is_state as is_state,
)
from ._tree import (
    clone as clone,
)
from ._tree import (
    freeze as freeze,
)
from ._tree import (
    states as states,
)
from ._tree import (
    update as update,
)
from ._tree import (
    values as values,
)
from .inspect import (
    Cause as Cause,
)
from .inspect import (
    Report as Report,
)
from .inspect import (
    Retrace as Retrace,
)
from .inspect import (
    TraceLimitError as TraceLimitError,
)
from .inspect import (
    explain as explain,
)
from .inspect import (
    log_retraces as log_retraces,
)
from .inspect import (
    max_traces as max_traces,
)
from .ir import (
    optimize_jaxpr as optimize_jaxpr,
)
from .transforms import (
    Compiled as Compiled,
)
from .transforms import (
    Jitted as Jitted,
)
from .transforms import (
    Lowered as Lowered,
)
from .transforms import (
    Traced as Traced,
)
from .transforms import (
    associative_scan as associative_scan,
)
from .transforms import (
    checkify as checkify,
)
from .transforms import (
    cond as cond,
)
from .transforms import (
    filter_checkpoint as filter_checkpoint,
)
from .transforms import (
    filter_closure_convert as filter_closure_convert,
)
from .transforms import (
    filter_custom_jvp as filter_custom_jvp,
)
from .transforms import (
    filter_custom_vjp as filter_custom_vjp,
)
from .transforms import (
    filter_eval_shape as filter_eval_shape,
)
from .transforms import (
    filter_grad as filter_grad,
)
from .transforms import (
    filter_hessian as filter_hessian,
)
from .transforms import (
    filter_jacfwd as filter_jacfwd,
)
from .transforms import (
    filter_jacrev as filter_jacrev,
)
from .transforms import (
    filter_jit as filter_jit,
)
from .transforms import (
    filter_jvp as filter_jvp,
)
from .transforms import (
    filter_make_jaxpr as filter_make_jaxpr,
)
from .transforms import (
    filter_value_and_grad as filter_value_and_grad,
)
from .transforms import (
    filter_vjp as filter_vjp,
)
from .transforms import (
    filter_vmap as filter_vmap,
)
from .transforms import (
    fori_loop as fori_loop,
)
from .transforms import (
    map as map,
)
from .transforms import (
    scan as scan,
)
from .transforms import (
    shard_map as shard_map,
)
from .transforms import (
    switch as switch,
)
from .transforms import (
    while_loop as while_loop,
)

__all__ = [
    "CacheKey",
    "Cause",
    "Compiled",
    "Jitted",
    "Lowered",
    "Param",
    "Report",
    "Retrace",
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
    "optimize_jaxpr",
    "scan",
    "shard_map",
    "states",
    "switch",
    "update",
    "values",
    "while_loop",
]
