"""A lock for tracing that two threads can't wait for in a circle."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import ClassVar, TypeVar

T = TypeVar("T")


class _Claim:
    """Of the thread that traces; kept in the one place of a `TracingLock`."""

    __slots__ = ("over", "process", "thread")

    def __init__(self) -> None:
        self.process = os.getpid()
        self.thread = threading.get_ident()
        self.over = threading.Event()


class TracingLock:
    """Held while a function is traced, so that two threads don't trace the same thing.

    Re-entrant. The user's code runs meanwhile and may have other functions traced: two
    threads that each hold the lock that the other one wants would wait forever. One of
    them goes ahead without it then, and at worst a function is traced twice.

    Whether this thread has the lock can be told at any moment from the claim in it: so an
    exception that arrives while it is taken or given back does not leave it locked.
    """

    _waiting: ClassVar[dict[int, TracingLock]] = {}

    def __init__(self) -> None:
        self._claims: dict[int, _Claim] = {}  # at most one, at 0

    def __call__(self, act: Callable[[], T]) -> T:
        """Runs `act` with the lock."""
        mine = _Claim()
        try:
            self._take(mine)
            result = act()
            self._give_back(mine)
        except BaseException:
            self._give_back(mine)
            raise
        return result

    def _take(self, mine: _Claim) -> None:
        while True:
            claim = self._claims.setdefault(0, mine)  # atomic
            if claim.thread == mine.thread:
                return
            if claim.process != mine.process:  # a fork has left that thread behind
                if self._claims.get(0) is claim:
                    self._claims.pop(0, None)
                continue
            self._waiting[mine.thread] = self
            if self._closes_a_circle(mine.thread):
                return
            # Not for ever: a circle may close later, and an interrupt may have kept the
            # other thread from saying that it is over.
            claim.over.wait(0.02)

    def _give_back(self, mine: _Claim) -> None:
        self._waiting.pop(mine.thread, None)
        if self._claims.get(0) is mine:
            self._claims.pop(0, None)
        mine.over.set()

    def _closes_a_circle(self, me: int) -> bool:
        lock: TracingLock | None = self
        for _ in range(len(self._waiting) + 1):
            claim = None if lock is None else lock._claims.get(0)
            if claim is None:
                return False
            if claim.thread == me:
                return True
            lock = self._waiting.get(claim.thread)
        return False
