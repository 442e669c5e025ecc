"""Every task of the repository: `python3 -m nox -l` lists them.

Each session makes its own environment, with uv where that is installed and with
virtualenv and pip otherwise. What follows `--` is handed to the tool behind the
session: `nox -s tests -- tests/ir -x`.
"""

import os
import sys

import nox

nox.needs_version = ">= 2024.4.15"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["tests", "lint", "types"]
nox.options.reuse_existing_virtualenvs = True
# The interpreters that the machine has, or none: a session that fetched one would test
# something that the person who reads the result did not choose.
os.environ["UV_PYTHON_DOWNLOADS"] = "never"

PYPROJECT = nox.project.load_toml("pyproject.toml")

# Python 3.11 and jax 0.10, and Python 3.13 and jax 0.12, are the two ends of what we
# support: jax 0.11 made Jaxpr and ClosedJaxpr one class, and needs Python 3.12. The
# exact versions are given here, not in pyproject.toml, so that a release of jax can't
# turn an unchanged tree red, while users stay free to install it.
KNOWN_TO_WORK = {
    "3.11": ("jax==0.10.2", "equinox==0.13.8"),
    "3.12": ("jax==0.12.0.1", "equinox==0.13.8"),
    "3.13": ("jax==0.12.0.1", "equinox==0.13.8"),
}
CURRENT = f"{sys.version_info.major}.{sys.version_info.minor}"
OTHER = "3.11" if CURRENT == "3.13" else "3.13"


# The extras that parts of statefun need.
PARTS = "display,diagram,progress,metrics"


def install(session: nox.Session, extras: str = "") -> None:
    """Installs statefun in place, beside the jax known to work with this Python."""
    python = session.python if isinstance(session.python, str) else CURRENT
    here = f".[{extras}]" if extras else "."
    session.install("-e", here, *KNOWN_TO_WORK.get(python, ()))


def install_tool(session: nox.Session, name: str) -> None:
    """Installs the version of a tool that the `dev` extra names."""
    dev = PYPROJECT["project"]["optional-dependencies"]["dev"]
    session.install(*(line for line in dev if line.startswith(name)))


def run_tests(session: nox.Session, *args: str) -> None:
    # Anything but the CPU would make the result depend on the machine, and jax would
    # take all of a GPU's memory for each of the workers.
    session.run("python", "-m", "pytest", *args, env={"JAX_PLATFORMS": "cpu"})


# A jax that compiles on one thread fills a core; more workers than four wait for
# memory.
PARALLEL = ("-n", "auto", "--maxprocesses", "4")


@nox.session
def train(session: nox.Session) -> None:
    """Trains the example network and prints its accuracy on the test set."""
    install(session, "examples")
    session.run("python", "examples/train_classifier.py", *session.posargs)


@nox.session
def interrupts(session: nox.Session) -> None:
    """Raises at every bytecode of every operation; then real signals for ten minutes."""
    install(session, f"test,{PARTS}")
    everywhere = {"JAX_PLATFORMS": "cpu", "STATEFUN_INTERRUPTS": "0"}
    test = ("python", "-m", "pytest", "tests/test_interrupts.py")
    session.run(*test, *session.posargs, env=everywhere)
    session.run("python", "-m", "tests.interrupts", "1", "600", env=everywhere)


@nox.session
def tests(session: nox.Session) -> None:
    """Runs the tests; all of them, with the floor on coverage, unless told which."""
    install(session, f"test,examples,{PARTS}")
    install_tool(session, "pyright")  # a test asks what it sees
    if session.posargs:
        run_tests(session, *session.posargs)
    else:
        cover = ("--cov", "--cov-report=term-missing", "--cov-fail-under=95")
        run_tests(session, *PARALLEL, *cover)


@nox.session(python=OTHER)
def tests_pair(session: nox.Session) -> None:
    """Runs the tests on the other supported pair of Python and jax."""
    install(session, f"test,examples,{PARTS}")
    run_tests(session, *(session.posargs or PARALLEL))


@nox.session(python="3.11", venv_backend="uv")
def tests_floor(session: nox.Session) -> None:
    """Runs the tests on the oldest dependencies that are admitted (needs uv)."""
    session.install("--resolution=lowest-direct", "-e", ".")
    # In a second step: the floors asked about are statefun's, not those of the tools.
    session.install("-e", f".[test,examples,{PARTS}]")
    run_tests(session, *(session.posargs or PARALLEL))


@nox.session
def lint(session: nox.Session) -> None:
    """Checks style and formatting; `-- --fix` repairs what can be repaired."""
    install_tool(session, "ruff")
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", *(() if fix else ("--check",)))


@nox.session
def types(session: nox.Session) -> None:
    """Checks the types of statefun/."""
    install(session, PARTS)
    install_tool(session, "pyright")
    session.run("pyright", *(session.posargs or ("statefun/",)))


@nox.session
def bench(session: nox.Session) -> None:
    """Prints call times beside those of the peers, with the budget of each row."""
    install(session, "test,bench,examples")
    platform = os.environ.get("JAX_PLATFORMS", "cpu")
    session.run(
        "python",
        "-m",
        "tests.benchmarks",
        *session.posargs,
        env={"JAX_PLATFORMS": platform},
    )
