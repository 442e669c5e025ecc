"""The docstrings of what users call: complete, and their examples run."""

import functools
import inspect
import json
import re
import textwrap
import types
from collections.abc import Iterator

import pytest

import statefun as sf
from statefun import ir, optim

from .test_readme import run_as_a_user


def documented() -> Iterator[tuple[str, object]]:
    """All public functions, classes and modules, and the methods that these define."""
    todo = [(f"statefun.{name}", getattr(sf, name)) for name in sf.__all__]
    todo += [("statefun.ir", ir), ("statefun.optim", optim)]
    while todo:
        name, thing = todo.pop(0)
        if isinstance(thing, types.ModuleType):
            names = getattr(thing, "__all__", None) or [
                n for n in vars(thing) if not n.startswith("_")
            ]
            todo += [(f"{name}.{n}", getattr(thing, n)) for n in names]
            continue
        yield name, thing
        if inspect.isclass(thing) and thing.__module__.startswith("statefun"):
            for n, member in vars(thing).items():
                if not n.startswith("_") and _is_method(member):
                    yield f"{name}.{n}", member


def _is_method(x: object) -> bool:
    kinds = types.FunctionType | property | staticmethod | classmethod
    return isinstance(x, kinds | functools.cached_property)


DOCUMENTED = dict(documented())


def doc_of(name: str) -> str:
    return inspect.getdoc(DOCUMENTED[name]) or ""


def examples(name: str) -> list[str]:
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", doc_of(name), re.M | re.S)
    return [textwrap.dedent(code) for _, code in blocks]


def test_the_examples_of_docstrings_run():
    code = {name: "\n".join(examples(name)) for name in DOCUMENTED if examples(name)}
    assert len(code) > 50
    # In one process, for the time; each with names of its own.
    out = run_as_a_user(
        f"""
import contextlib, io, json, traceback
failed = {{}}
for name, code in json.loads({json.dumps(json.dumps(code))}).items():
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, name, "exec"), {{"__name__": "__main__"}})
    except BaseException:
        failed[name] = traceback.format_exc()
print(json.dumps(failed))
"""
    )
    assert json.loads(out) == {}


# Classes whose objects users are given, and don't make.
GIVEN = [
    *("CacheKey", "Cause", "Compiled", "Hyperparams", "Jitted", "Lowered", "Report"),
    *("Retrace", "StateError", "StateTrace", "StateTraceError", "StateTypeError"),
    *("StateValueError", "TraceLimitError", "Traced"),
    *("nn.Cache", "nn.FromEquinox", "nn.InMode", "nn.Part", "optim.Hyperparams"),
]
MODULES = ["statefun", *(f"statefun.{m}" for m in ("ir", "metrics", "nn", "optim"))]
TO_CALL = [
    name
    for name, thing in DOCUMENTED.items()
    if (inspect.isclass(thing) or inspect.isfunction(thing))
    and name.rpartition(".")[0] in MODULES
    and name.removeprefix("statefun.") not in GIVEN
]


@pytest.mark.parametrize("name", TO_CALL)
def test_a_docstring_says_what_goes_in_and_out_and_shows_it(name):
    thing = DOCUMENTED[name]
    assert examples(name)
    if inspect.isclass(thing):
        if "__init__" in vars(thing):  # else it is made as its base class is
            assert "**Arguments:**" in doc_of(name)
        return
    signature = inspect.signature(thing)
    if signature.parameters:
        assert "**Arguments:**" in doc_of(name)
    if signature.return_annotation not in ("None", "Iterator[None]"):
        assert "**Returns:**" in doc_of(name)
