"""Optimizations of jaxprs, each a function from jaxpr to jaxpr."""

from ._algebra import algebraic_simplification as algebraic_simplification
from ._constant_fold import constant_fold as constant_fold
from ._copies import copy_propagation as copy_propagation
from ._cse import cse as cse
from ._dce import dce as dce
from ._pipeline import (
    OPTIMIZATIONS as OPTIMIZATIONS,
    normalize_optimizations as normalize_optimizations,
    optimize_jaxpr as optimize_jaxpr,
)
