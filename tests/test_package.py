"""Rules that hold for the source of statefun as a whole, checked on its syntax trees.

Nothing here runs the library, save for the last few tests: a rule about imports has to
hold for code that no test reaches.
"""

import ast
import importlib
import importlib.metadata
import inspect
import subprocess
import sys
import tomllib
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "statefun"
FILES = sorted(SOURCE.glob("**/*.py"))

# Imports point one way only: a module imports from lines above its own, and may import
# from its own package. A new module needs a place here, which is the moment to ask
# whether it can be read after those above it. `statefun/__init__.py` comes after all.
LAYERS = (
    ("_compat",),
    ("_errors", "_promotion"),
    ("ir",),
    ("_state.static", "_state.numbers"),
    ("_state.fingerprint",),
    ("_state.structure",),
    ("_state.handed",),
    ("_state.cell",),
    ("_state.access",),
    ("_state.state",),
    ("_state.tree",),
    ("_trace.stale", "_trace.names", "_trace.escape", "_trace.nondiff"),
    ("_trace.frame",),
    ("_trace.transaction",),
    ("_trace.result",),
    ("_trace.program",),
    ("_call.forms",),
    ("_call.reader",),
    ("_call.modules",),
    ("_call.args", "_call.keys", "_call.locks"),
    ("_call.compiled",),
    ("_call.site",),
    ("_call.plan",),
    ("_call.calls",),
    ("_call.fast",),
    ("_call.function",),
    ("_rng",),
    ("transforms",),
    ("inspect",),
    ("optim",),
    ("nn", "metrics"),
)
FOLDERS = ("_state", "_trace", "_call")
"""Packages of the core, in which the order above goes by module."""
LAYER_OF = {name: depth for depth, names in enumerate(LAYERS) for name in names}
# What a part imports of statefun, where that is less than the order above admits:
# passes go from jaxpr to jaxpr and know nothing of States.
ONLY = {"_compat": set(), "ir": {"_compat"}}

CORE = {"jax", "equinox", "jaxtyping", "optax", "numpy"}


class Use(NamedTuple):
    """One mention of a module or of a name in it, in full: `jax.numpy.asarray`."""

    dotted: str
    file: Path
    line: int
    imported: bool  # by an import statement, not as an attribute of what was imported
    lazy: bool  # inside a function: runs when it is called
    typing: bool  # under `if TYPE_CHECKING:`, never runs

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}: {self.dotted}"


def package_of(file: Path) -> list[str]:
    return list(file.relative_to(ROOT).parent.parts)


def imported_names(
    node: ast.Import | ast.ImportFrom, file: Path
) -> Iterator[tuple[str, str]]:
    """The names that an import statement binds, each with what it stands for."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.asname is None:
                # `import jax.numpy` binds `jax`, yet it is jax.numpy that is imported.
                yield alias.name.partition(".")[0], alias.name
            else:
                yield alias.asname, alias.name
        return
    base = node.module or ""
    if node.level:
        package = package_of(file)
        base = ".".join([*package[: len(package) - node.level + 1], *base.split(".")])
        base = base.rstrip(".")
    for alias in node.names:
        yield alias.asname or alias.name, f"{base}.{alias.name}"


class Uses(ast.NodeVisitor):
    """Collects the uses in one file.

    An attribute is followed as long as it hangs on a name that an import bound
    somewhere in the file. A local variable of the same name is taken for the module.
    """

    def __init__(self, file: Path, tree: ast.Module):
        self.file = file
        self.uses: list[Use] = []
        self.lazy = False
        self.typing = False
        self.bound: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for name, dotted in imported_names(node, file):
                    # `import jax.numpy` again: the name is bound to the top.
                    top = isinstance(node, ast.Import) and dotted.startswith(f"{name}.")
                    self.bound[name] = name if top else dotted
        self.visit(tree)

    def add(self, node: ast.AST, dotted: str, imported: bool) -> None:
        use = Use(dotted, self.file, node.lineno, imported, self.lazy, self.typing)
        self.uses.append(use)

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        for _, dotted in imported_names(node, self.file):
            self.add(node, dotted, imported=True)

    visit_ImportFrom = visit_Import

    def dotted(self, node: ast.AST) -> str | None:
        match node:
            case ast.Name(id=name):
                return self.bound.get(name)
            case ast.Attribute(value=value, attr=attr):
                base = self.dotted(value)
                return None if base is None else f"{base}.{attr}"
            case ast.Call(
                func=ast.Name(id="getattr"),
                args=[value, ast.Constant(value=str(attr)), *_],
            ):
                base = self.dotted(value)
                return None if base is None else f"{base}.{attr}"
        return None

    def visit_Attribute(self, node: ast.Attribute) -> None:
        dotted = self.dotted(node)
        if dotted is None:
            self.generic_visit(node)
        else:
            self.add(node, dotted, imported=False)

    def visit_Call(self, node: ast.Call) -> None:
        dotted = self.dotted(node)
        if dotted is not None:
            self.add(node, dotted, imported=False)
        by_name = self.dotted(node.func) == "importlib.import_module" or (
            isinstance(node.func, ast.Name) and node.func.id == "__import__"
        )
        if by_name and node.args and isinstance(node.args[0], ast.Constant):
            self.add(node, str(node.args[0].value), imported=True)
        self.generic_visit(node)

    def visit_FunctionDef(
        self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    ) -> None:
        outer, self.lazy = self.lazy, True
        self.generic_visit(node)
        self.lazy = outer

    visit_AsyncFunctionDef = visit_FunctionDef
    visit_Lambda = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.generic_visit(node)
            return
        outer, self.typing = self.typing, True
        for child in node.body:
            self.visit(child)
        self.typing = outer
        for child in node.orelse:
            self.visit(child)


def uses_in(file: Path, text: str) -> list[Use]:
    return Uses(file, ast.parse(text)).uses


USES = [use for file in FILES for use in uses_in(file, file.read_text())]


def is_private(dotted: str) -> bool:
    root, *rest = dotted.split(".")
    if root == "statefun":
        return False
    # Equinox says of `equinox.internal` that it may change without notice.
    if root == "equinox" and rest[:1] == ["internal"]:
        return True
    return any(part.startswith("_") and not part.endswith("__") for part in rest)


def part_of(dotted: str) -> str:
    """The module or package directly under statefun that a dotted name lies in."""
    parts = dotted.split(".")
    if len(parts) == 1:
        return "__init__"
    if parts[1] in FOLDERS:
        return ".".join(parts[1:3])
    inside = (SOURCE / f"{parts[1]}.py").exists() or (SOURCE / parts[1]).is_dir()
    return parts[1] if inside else "__init__"


def part_of_file(file: Path) -> str:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:2] if parts[0] in FOLDERS else parts[:1])


def layer_faults(use: Use) -> Iterator[str]:
    here, there = part_of_file(use.file), part_of(use.dotted)
    if here in ("__init__", there):
        return
    if here not in LAYER_OF or there not in LAYER_OF | {"__init__": 0}:
        return  # test_every_module_has_a_layer speaks up
    if there == "__init__":
        yield f"{use} imports from the package itself: name the module"
    elif LAYER_OF[there] >= LAYER_OF[here]:
        yield f"{use} is not below {here} in LAYERS"
    elif there not in ONLY.get(here, {there}):
        yield f"{use}: {here} imports {ONLY[here] or 'nothing'} of statefun only"


def test_there_is_something_to_check():
    assert len(FILES) > 3
    assert any(use.dotted.startswith("jax.") for use in USES)


def test_only_public_names_of_dependencies_are_used():
    assert [str(use) for use in USES if is_private(use.dotted)] == []


def resolve(dotted: str) -> str | None:
    """What is wrong with a name of a dependency, or None.

    Follows modules and classes only: what hangs on a value is not a name of a package.
    """
    root, *rest = dotted.split(".")
    value, path = importlib.import_module(root), root
    for part in rest:
        if not isinstance(value, types.ModuleType | type):
            return None
        path = f"{path}.{part}"
        try:
            value = getattr(value, part)
        except AttributeError:
            try:
                value = importlib.import_module(path)
            except ImportError:
                return f"{path} does not exist"
        except DeprecationWarning as warning:
            return f"{path} is deprecated: {warning}"
    return None


def test_no_deprecated_name_is_used():
    faults = []
    for use in USES:
        if use.dotted.partition(".")[0] not in CORE or use.typing:
            continue
        # By hand, not left to the filter of the suite: a name that was looked up when
        # statefun was imported warned long before this test.
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)
            fault = resolve(use.dotted)
        # Telling versions apart is what _compat is for: it may ask for what isn't
        # there.
        absent = fault is not None and fault.endswith("does not exist")
        if fault and not (absent and part_of_file(use.file) == "_compat"):
            faults.append(f"{use}: {fault}")
    assert faults == []


def test_versions_of_jax_are_told_apart_in_compat_only():
    asking = ("jax.__version__", "jax.__version_info__", "jaxlib.__version__")
    faults = [
        str(use)
        for use in USES
        if use.dotted.startswith(asking) and part_of_file(use.file) != "_compat"
    ]
    assert faults == []


def test_the_core_imports_its_dependencies_only():
    allowed = CORE | set(sys.stdlib_module_names) | {"statefun"}
    faults = [
        str(use)
        for use in USES
        if use.imported and not (use.lazy or use.typing)
        if use.dotted.partition(".")[0] not in allowed
    ]
    assert faults == [], "import what an extra brings inside the function that uses it"


def test_core_dependencies_are_those_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {line.split(" ")[0] for line in project["dependencies"]} == CORE


def test_every_module_has_a_layer():
    parts = {part_of_file(file) for file in FILES if file.name != "__init__.py"}
    assert parts - LAYER_OF.keys() == set(), "new: give it a place in LAYERS"


def test_imports_point_one_way_only():
    inside = [use for use in USES if use.imported and not use.typing]
    inside = [use for use in inside if use.dotted.partition(".")[0] == "statefun"]
    assert [fault for use in inside for fault in layer_faults(use)] == []


@pytest.mark.parametrize(
    "code",
    [
        "import jax._src.core",
        "import jax._src.core as core",
        "from jax._src import core",
        "from jax import _src",
        "import jax\njax._src.core.eval_jaxpr",
        "import jax\ndef f():\n  return getattr(jax, '_src').core",
        "import jax.extend.core as jex\njex._private",
        "import importlib\nimportlib.import_module('jax._src.core')",
        "import equinox as eqx\nclass A(eqx._module.Module): pass",
        "from equinox._jit import filter_jit",
        "import equinox.internal as eqxi",
        "import equinox as eqx\neqx.internal.while_loop",
        "import numpy as np\nx = [np._core.multiarray]",
        "from optax._src import base",
    ],
)
def test_the_rule_on_private_names_sees(code):
    uses = uses_in(SOURCE / "_state.py", code)
    assert any(is_private(use.dotted) for use in uses)


@pytest.mark.parametrize(
    "code",
    [
        "import jax\nx = jax.__version__",
        "from statefun._state.state import State",
        "from ._state import State\nState._flat",
        "import jax.extend.core as jex\njex.Primitive",
        "x._private",
    ],
)
def test_the_rule_on_private_names_lets_pass(code):
    uses = uses_in(SOURCE / "_state.py", code)
    assert not any(is_private(use.dotted) for use in uses)


@pytest.mark.parametrize(
    ("file", "code", "wrong"),
    [
        ("_trace/frame.py", "from statefun._state.state import x", False),
        ("_trace/frame.py", "from .._state.state import x", False),
        ("_trace/frame.py", "from .stale import x", False),
        ("_state/state.py", "from .._trace.frame import x", True),
        ("_state/state.py", "from .._trace import frame", True),
        ("_state/state.py", "from .tree import x", True),
        ("_state/state.py", "def f():\n  import statefun._trace.frame", True),
        ("_state/state.py", "import statefun as sf", True),
        ("ir/dce.py", "from .._state.state import x", True),
        ("ir/dce.py", "from .._errors import x", True),
        ("ir/dce.py", "from .._compat import x", False),
        ("ir/dce.py", "from ._walk import x", False),
        ("__init__.py", "from ._state.state import State", False),
    ],
)
def test_the_rule_on_layers_sees(file, code, wrong, monkeypatch, tmp_path):
    # On a package of its own: what the rule says must not hang on which files exist.
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path / "statefun")
    modules = ("_compat", "_errors", "_state/state", "_trace/frame", "ir/_walk")
    for name in modules:
        path = tmp_path / "statefun" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    uses = uses_in(tmp_path / "statefun" / file, code)
    assert any(fault for use in uses for fault in layer_faults(use)) == wrong


def test_resolve_knows_a_missing_name():
    assert resolve("jax.numpy.asarray") is None
    assert resolve("jax.config.jax_enable_x64.anything") is None
    assert resolve("jax.numpy.nonsense") == "jax.numpy.nonsense does not exist"


def test_import_of_statefun_warns_of_nothing_and_brings_no_extra():
    extras = "flax, brainstate, orbax, rich, treescope, tqdm, sklearn, matplotlib"
    code = (
        "import sys, equinox, optax\n"
        "before = set(sys.modules)\n"
        "import statefun\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        f"print(sorted(new & set('{extras}'.split(', '))))\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[]\n"


def test_every_error_about_a_state_says_what_why_and_what_to_write_instead():
    kinds = {"StateError", "StateTraceError", "StateTypeError", "StateValueError"}
    made, faults = 0, []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in kinds:
                made += 1
                text = node.args[0] if node.args else None
                parts = text.args if isinstance(text, ast.Call) else []
                if getattr(getattr(text, "func", None), "id", "") != "message":
                    parts = []
                if len(parts) != 3:
                    faults.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert made > 30
    assert faults == []


def test_every_public_name_is_there_and_has_a_docstring():
    statefun = importlib.import_module("statefun")
    assert len(set(statefun.__all__)) == len(statefun.__all__) > 0
    faults = []
    for name in statefun.__all__:
        value = getattr(statefun, name)
        if isinstance(value, str | int | float | tuple):
            continue  # a constant has nowhere to put one
        doc = inspect.getdoc(value) or ""
        # What dataclass and NamedTuple write for a class that has none.
        if not doc or doc.startswith(f"{name}("):
            faults.append(name)
    assert faults == []


def test_the_version_is_that_of_the_installed_package():
    statefun = importlib.import_module("statefun")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if hasattr(statefun, "__version__"):
        assert statefun.__version__ == project["version"]
    try:
        installed = importlib.metadata.version("statefun")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("statefun is imported from the checkout, not installed")
    assert installed == project["version"]
