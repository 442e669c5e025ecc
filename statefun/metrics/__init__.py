"""Metrics that accumulate in States."""

from ._library import Metric as Metric
from ._mean import (
    Accuracy as Accuracy,
    Mean as Mean,
)
