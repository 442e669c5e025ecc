"""State-aware twins of Equinox's and JAX's transformations."""

from ._ad import (
    filter_hessian as filter_hessian,
    filter_jacfwd as filter_jacfwd,
    filter_jacrev as filter_jacrev,
    filter_jvp as filter_jvp,
    filter_vjp as filter_vjp,
)
from ._branches import cond as cond, switch as switch
from ._checkify import checkify as checkify
from ._checkpoint import filter_checkpoint as filter_checkpoint
from ._custom_jvp import filter_custom_jvp as filter_custom_jvp
from ._custom_vjp import filter_custom_vjp as filter_custom_vjp
from ._grad import (
    filter_grad as filter_grad,
    filter_value_and_grad as filter_value_and_grad,
)
from ._jit import (
    Compiled as Compiled,
    Jitted as Jitted,
    Lowered as Lowered,
    Traced as Traced,
    filter_jit as filter_jit,
)
from ._loops import (
    associative_scan as associative_scan,
    fori_loop as fori_loop,
    map as map,
    scan as scan,
    while_loop as while_loop,
)
from ._shard_map import shard_map as shard_map
from ._tracing import (
    filter_closure_convert as filter_closure_convert,
    filter_eval_shape as filter_eval_shape,
    filter_make_jaxpr as filter_make_jaxpr,
)
from ._vmap import filter_vmap as filter_vmap
