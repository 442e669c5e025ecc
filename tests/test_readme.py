"""What the README shows works as it stands."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```|`[^`]*`", "", text, flags=re.MULTILINE | re.DOTALL)


def run_as_a_user(code: str) -> str:
    # In a process of its own: pytest's has stricter promotion than a user's.
    result = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", code],
        capture_output=True,
        text=True,
        # The checkout is found where the tests run without an installation.
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_first_example_runs_and_learns():
    example = code_blocks(README, "python")[0]
    assert len(example.splitlines()) <= 25
    loss = run_as_a_user(example).removeprefix("mean squared error: ")
    assert float(loss) < 0.01


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs").glob("**/*.md")), ids=lambda path: path.name
)
def test_examples_of_the_documentation_run(path: Path):
    # Together, as one reads them: a later example may use the names of an earlier one.
    blocks = code_blocks(path.read_text(), "python")
    if blocks:
        run_as_a_user("\n".join(blocks))


def test_the_two_commands_are_sessions_and_what_ci_runs():
    commands = [block.strip() for block in code_blocks(README, "sh")]
    assert commands == [
        "python3 -m pip install nox && python3 -m nox -s train",
        "python3 -m pip install nox && python3 -m nox -s tests",
    ]
    noxfile = ast.parse((ROOT / "noxfile.py").read_text())
    sessions = {
        node.name
        for node in noxfile.body
        if isinstance(node, ast.FunctionDef) and node.decorator_list
    }
    mentioned = set(re.findall(r"\bnox -s (\w+)", README))
    assert {"train", "tests"} <= mentioned <= sessions
    assert commands[1] in (ROOT / ".ci" / "run").read_text()


def test_links_to_files_lead_somewhere():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")]
    links = [
        (page, target)
        for page in pages
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", prose(page.read_text()))
    ]
    assert links
    assert [link for link in links if not (link[0].parent / link[1]).exists()] == []
