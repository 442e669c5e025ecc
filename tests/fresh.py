"""Runs code in a process of its own: for what depends on JAX's caches being empty."""

import subprocess
import sys
import textwrap


def run_fresh(code: str) -> str:
    """What the code prints, stripped; raises with its errors if it fails."""
    run = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(run, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()
