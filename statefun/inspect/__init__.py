"""What a function does, and why it was traced."""

from ._causes import Cause as Cause
from ._explain import explain as explain
from ._history import Retrace as Retrace
from ._limits import TraceLimitError as TraceLimitError, max_traces as max_traces
from ._report import Report as Report
from ._retraces import log_retraces as log_retraces
