"""State-aware twins of Equinox's and JAX's transformations."""

from ._ad import (
    filter_hessian as filter_hessian,
)
from ._ad import (
    filter_jacfwd as filter_jacfwd,
)
from ._ad import (
    filter_jacrev as filter_jacrev,
)
from ._ad import (
    filter_jvp as filter_jvp,
)
from ._ad import (
    filter_vjp as filter_vjp,
)
from ._branches import cond as cond
from ._branches import switch as switch
from ._checkify import checkify as checkify
from ._checkpoint import filter_checkpoint as filter_checkpoint
from ._custom import (
    filter_custom_jvp as filter_custom_jvp,
)
from ._custom import (
    filter_custom_vjp as filter_custom_vjp,
)
from ._grad import (
    filter_grad as filter_grad,
)
from ._grad import (
    filter_value_and_grad as filter_value_and_grad,
)
from ._jit import (
    Compiled as Compiled,
)
from ._jit import (
    Jitted as Jitted,
)
from ._jit import (
    Lowered as Lowered,
)
from ._jit import (
    Traced as Traced,
)
from ._jit import (
    filter_jit as filter_jit,
)
from ._loops import (
    associative_scan as associative_scan,
)
from ._loops import (
    fori_loop as fori_loop,
)
from ._loops import (
    map as map,
)
from ._loops import (
    scan as scan,
)
from ._loops import (
    while_loop as while_loop,
)
from ._shape import (
    filter_closure_convert as filter_closure_convert,
)
from ._shape import (
    filter_eval_shape as filter_eval_shape,
)
from ._shape import (
    filter_make_jaxpr as filter_make_jaxpr,
)
from ._shard_map import shard_map as shard_map
from ._vmap import filter_vmap as filter_vmap
