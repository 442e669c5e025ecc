"""A lock for tracing that two threads can't wait for in a circle."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import ClassVar


class TracingLock:
    """Held while a function is traced, so that two threads don't trace the same thing.

    Re-entrant. The user's code runs meanwhile and may have other functions traced: two
    threads that each hold the lock that the other one wants would wait forever. One of
    them goes ahead without it then, and at worst a function is traced twice.
    """

    _guard = threading.Lock()
    _waiting: ClassVar[dict[int, TracingLock]] = {}

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._depth = 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._guard:
            wait = not self._closes_a_circle(me)
            if wait:
                self._waiting[me] = self
        if not wait:
            yield
            return
        with self._lock:
            with self._guard:
                self._waiting.pop(me, None)
                self._owner = me
                self._depth += 1
            try:
                yield
            finally:
                with self._guard:
                    self._depth -= 1
                    if self._depth == 0:
                        self._owner = None

    def _closes_a_circle(self, me: int) -> bool:
        lock: TracingLock | None = self
        while lock is not None and lock._owner is not None:
            if lock._owner == me:
                return lock is not self  # its own lock it may enter again
            lock = self._waiting.get(lock._owner)
        return False
