"""The notebooks as they are committed: clean files, whose code runs from the first cell to the last."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import commands
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))

RUNNER = """
import json, sys
from pathlib import Path

cells = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["cells"]
scope = {"__name__": "__main__"}
for cell in cells:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {cell['id']}", "exec"), scope)
"""
"""What a kernel does with a notebook, less the kernel."""


def cells(name, kind="code"):
    """Of one kind, id -> source."""
    notebook = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind}


def execute(name, folder, **more):
    """Runs all cells in a fresh process that starts in an empty folder, as on Colab, and returns what they print."""
    folder.mkdir(exist_ok=True)
    result = subprocess.run(
        [sys.executable, "-c", RUNNER, str(FOLDER / name)], cwd=folder, env=commands.environment() | more,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def test_there_are_three():
    assert NOTEBOOKS == ["pit_walk_through.ipynb", "plan_a_slice.ipynb", "quick_start.ipynb"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_clean(name):
    """No outputs, which would change with every run, and nothing that only a notebook server understands."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert text == json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info", "accelerator", "colab"}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z0-9-]{1,64}", found) for found in ids)
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            ast.parse("".join(cell["source"]))  # neither ! nor %
    assert notebook["cells"][0]["cell_type"] == "markdown"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_nothing_is_installed_where_pit_jax_is(tmp_path, name):
    """The first cell calls neither git nor pip."""
    run = [sys.executable, "-c", "import subprocess\nsubprocess.run = None\n" + cells(name)["install"]]
    result = subprocess.run(run, cwd=tmp_path, env=commands.environment(), capture_output=True, text=True, timeout=60)
    assert result.stdout.startswith(f"pit_jax is in {commands.ROOT}"), result.stderr


@pytest.mark.parametrize("repository", ["URL", ""], ids=["known", "unknown"])
def test_what_is_installed_elsewhere(tmp_path, repository):
    """As on Colab: nothing is there, and the notebook alone was opened."""
    here = """
import importlib.util, subprocess, types
found = iter([None, types.SimpleNamespace(origin="/checkout/pit_jax/__init__.py")])
importlib.util.find_spec = lambda name: next(found)
subprocess.run = lambda command, check: print([x for x in command if x in ("clone", "pip", "URL", "--editable")])
"""
    cell = cells("pit_walk_through.ipynb")["install"].replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}")
    run = [sys.executable, "-c", here + cell]
    result = subprocess.run(run, cwd=tmp_path, env=commands.environment(), capture_output=True, text=True, timeout=60)
    if repository:
        clone, pip, last = result.stdout.splitlines()
        assert (clone, pip) == ("['clone', 'URL']", "['pip', '--editable']")
        assert last.startswith("pit_jax is in /checkout, ")
    else:
        assert "AssertionError: Set REPOSITORY" in result.stderr


def test_pit_walk_through(tmp_path):
    printed = execute("pit_walk_through.ipynb", tmp_path / "here")
    assert "gap_loss = 0.5259" in printed
    assert len([code for code in cells("pit_walk_through.ipynb").values() if "\nassert " in code]) >= 15


def test_plan_a_slice(tmp_path):
    if not (sys.platform.startswith("linux") and os.uname().machine == "x86_64"):
        pytest.skip("the TPU compiler is for Linux on x86-64")
    pytest.importorskip("libtpu", reason="the TPU compiler is in the extras tpu and test")
    printed = execute("plan_a_slice.ipynb", tmp_path / "here")
    assert "sft_policy: fits is True" in printed


def test_quick_start(tmp_path, finished):
    """On a finished run, whose training prints its tables again; its flags are those of the fixture."""
    workdir, _ = finished
    copy = tmp_path / "smoke"
    shutil.copytree(workdir, copy)
    more = {"PIT_JAX_NOTEBOOK_WORKDIR": str(copy), "PIT_JAX_NOTEBOOK_FLAGS": commands.ADAPTIVE}
    printed = execute("quick_start.ipynb", tmp_path / "here", **more)
    assert "All stages were done before." in printed
    assert len(re.findall(r"^  y_0", printed, re.MULTILINE)) == 2
    assert "index.html" in printed
