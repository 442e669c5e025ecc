"""Runs code in a process of its own, for what depends on JAX's caches being empty, or in
a thread of its own, for what its stack has to be free of."""

import concurrent.futures
import functools
import subprocess
import sys
import textwrap


def run_fresh(code: str) -> str:
    """What the code prints, stripped; raises with its errors if it fails."""
    run = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(run, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def in_a_thread(test):
    """Runs a test in a thread of its own, with a stack and a recursion limit of its own.

    - Python 3.11 loses a level of the limit where a trace function raises.
    - `jax.debug.breakpoint` looks at the local and global variables of every frame on the
      stack, pytest's among them. Where one holds itself, all levels are lost.
    """

    @functools.wraps(test)
    def run(*args, **kwargs):
        limit = sys.getrecursionlimit()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            ended = pool.submit(test, *args, **kwargs)
        sys.setrecursionlimit(limit)
        return ended.result()

    return run
