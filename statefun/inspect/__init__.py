"""What a function does, and why it was traced."""

from ._causes import Cause as Cause
from ._explain import explain as explain
from ._report import Report as Report
from ._retraces import (
    Retrace as Retrace,
    TraceLimitError as TraceLimitError,
    log_retraces as log_retraces,
    max_traces as max_traces,
)
