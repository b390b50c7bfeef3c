"""Imports go one way, and some libraries have one place: a checker of the sources, and tests that it can fail."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "pit_jax"

COMMAND_LINE = {"train", "improve", "evaluate", "plan", "convert", "inspect_data", "bench", "synthesize"}
LAYERS = (
    {"config", "types", "sharding", "client", "files", "cost", "processes"},
    {"data"},
    {"models"},
    {"losses"},
    {"sampling", "optimizers", "train_state", "checkpoint", "metrics", "interrupts"},
    {"learners"},
    {"pipelines", "programs", "slices", "fitting", "planner", "works", "speed", "stand_ins", "growth"},
    {"evaluation"},
    {"cli"},
    COMMAND_LINE,
)
"""Names directly under the package, from left to right: an import points to its own layer or to the left."""
LAYER = {name: i for i, layer in enumerate(LAYERS) for name in layer}

ONLY_IN = {
    "ml_collections": {"config", "configs", *COMMAND_LINE},
    "orbax": {"checkpoint"},
    "tensorflow_datasets": {"data"},
    "flax.linen": {"models"},
    "openai": {"client"},
    "torch": {"evaluation"},
    "transformers": {"evaluation"},
    "matplotlib": {"evaluation"},
    "pyarrow": {"data"},
    "tokenizers": {"data"},
    "safetensors": {"models", "convert"},
    "sklearn": {"evaluation"},
}
"""Library -> names under the package that may import it; `configs` is the folder of config files."""

NOWHERE = ("tensorflow", "pickle", "cPickle", "cloudpickle", "dill")
SPEC_FREE = {"losses", "learners"}
SPECS = ("PartitionSpec", "NamedSharding", "jax.P", "jax.sharding")
"""Names that layout is written with; code in SPEC_FREE gets it from the types of its arrays."""


def imported(tree: ast.AST, module: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, full dotted name) of all that a module imports, wherever in the module it stands."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: one dot is the package of the module
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and dotted(node.func) in ("importlib.import_module", "__import__"):
            found += [(node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant)]
    return found


def dotted(node: ast.AST) -> str:
    """`jax.sharding.Mesh` of the expression, or an empty string where it is no plain chain of names."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def within(name: str, library: str) -> bool:
    return name == library or name.startswith(f"{library}.")


def faults_of_module(path: pathlib.Path, root: pathlib.Path) -> list[str]:
    """What is wrong with the imports of a module, one line each."""
    parts = path.relative_to(root).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    in_package, in_tests = parts[0] == PACKAGE, parts[0] == "tests"
    top = "__init__" if module == PACKAGE else parts[1] if in_package else parts[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = imported(tree, module, is_package)
    faults = []

    def fault(line: int, message: str):
        faults.append(f"{path.relative_to(root)}:{line}: {message}")

    if in_package and top != "__init__" and top not in LAYER:
        fault(1, f"{top} is in no layer: put it into LAYERS")
        return faults
    for line, name in names:
        for library in NOWHERE:
            if within(name, library):
                fault(line, f"{library} is imported nowhere")
        for library, places in ONLY_IN.items():
            if within(name, library) and not in_tests and top not in places:
                fault(line, f"{library} is imported only in {', '.join(sorted(places))}")
        if not in_package or not within(name, PACKAGE):
            continue
        target = f"{name}.".split(".")[1]
        if target not in LAYER:
            continue  # pit_jax itself, or a name that it defines, such as __version__
        if top == "__init__":
            fault(line, f"{PACKAGE} itself imports nothing of its own, but here {target}")
        elif LAYER[target] > LAYER[top]:
            fault(line, f"{top} imports {target}, which is to its right")
        elif top == "losses" and target not in ("losses", "types"):
            fault(line, f"losses imports nothing of ours but types, but here {target}")

    for node in ast.walk(tree):
        name = dotted(node) if isinstance(node, ast.Attribute | ast.Name) else ""
        if in_package and top not in ONLY_IN["flax.linen"] and name == "flax.linen":
            fault(node.lineno, "flax.linen is used only in models")
        if in_package and top in SPEC_FREE and name and (name in SPECS or name.split(".")[-1] in SPECS[:2]):
            fault(node.lineno, f"{name}: no layout in {top}")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and getattr(node.value, "value", True):
            fault(node.value.lineno, "pickle is used nowhere, but here allow_pickle")
    if in_package and top in SPEC_FREE:
        for line, name in names:
            if any(within(name, spec) for spec in SPECS) or name.split(".")[-1] in SPECS[:2]:
                fault(line, f"{name}: no layout in {top}")
    return faults


def modules(root: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for folder in (PACKAGE, "configs", "tests") for path in (root / folder).rglob("*.py"))


def faults(root: pathlib.Path) -> list[str]:
    """What is wrong with the imports of a repository."""
    return [fault for path in modules(root) for fault in faults_of_module(path, root)]


def test_imports_of_the_repository():
    assert not faults(ROOT), "\n" + "\n".join(faults(ROOT))


def test_the_walk_sees_the_package():
    seen = {path.relative_to(ROOT).as_posix() for path in modules(ROOT)}
    assert {"pit_jax/types.py", "pit_jax/losses/preference.py", "pit_jax/models/transformer.py"} <= seen
    path = ROOT / "pit_jax" / "losses" / "preference.py"
    names = {name for _, name in imported(ast.parse(path.read_text("utf-8")), "pit_jax.losses.preference", False)}
    assert {"jax", "pit_jax.types.Array", "pit_jax.losses.masked.row_metric"} <= names


def make_tree(root: pathlib.Path, files: dict[str, str]) -> pathlib.Path:
    names = ["config.py", "types.py", "checkpoint.py", "data/x.py", "models/x.py", "losses/x.py", "learners/x.py"]
    names += ["pipelines/x.py", "evaluation/x.py", "train.py", "sampling.py", "metrics.py", "__init__.py"]
    for name, text in ({f"pit_jax/{name}": "" for name in names} | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


BAD = [
    # Arrows that run back.
    ("pit_jax/types.py", "from pit_jax.data import x", "types imports data"),
    ("pit_jax/config.py", "import pit_jax.train", "config imports train"),
    ("pit_jax/data/x.py", "from pit_jax.models.x import Model", "data imports models"),
    ("pit_jax/models/x.py", "from pit_jax import sampling", "models imports sampling"),
    ("pit_jax/sampling.py", "def f():\n    from pit_jax.learners import x", "sampling imports learners"),
    ("pit_jax/learners/x.py", "from pit_jax.pipelines.x import y", "learners imports pipelines"),
    ("pit_jax/pipelines/x.py", "__import__('pit_jax.evaluation')", "imports evaluation"),
    ("pit_jax/pipelines/x.py", "importlib.import_module('pit_jax.evaluation.x')", "pipelines imports evaluation"),
    ("pit_jax/pipelines/x.py", "from pit_jax.evaluation import x", "pipelines imports evaluation"),
    ("pit_jax/evaluation/x.py", "from pit_jax import types, train", "evaluation imports train"),
    # Relative imports.
    ("pit_jax/data/x.py", "from ..models import x", "data imports models"),
    ("pit_jax/data/x.py", "from .. import learners", "data imports learners"),
    ("pit_jax/types.py", "from .data import x", "types imports data"),
    ("pit_jax/data/__init__.py", "from ..models import x", "data imports models"),
    # losses.
    ("pit_jax/losses/x.py", "from pit_jax.config import PPOConfig", "nothing of ours but types"),
    ("pit_jax/losses/x.py", "from pit_jax.data import x", "nothing of ours but types"),
    ("pit_jax/losses/x.py", "from pit_jax.metrics import mean", "losses imports metrics"),
    # A module that nobody has given a layer.
    ("pit_jax/utils.py", "import os", "utils is in no layer"),
    ("pit_jax/__init__.py", "from pit_jax.types import Array", "imports nothing of its own"),
    # Libraries.
    ("pit_jax/data/x.py", "import ml_collections", "ml_collections is imported only in"),
    ("pit_jax/learners/x.py", "from ml_collections import config_flags", "ml_collections is imported only in"),
    ("pit_jax/train.py", "import orbax.checkpoint as ocp", "orbax is imported only in checkpoint"),
    ("pit_jax/train.py", "import tensorflow_datasets as tfds", "tensorflow_datasets is imported only in data"),
    ("configs/x.py", "import tensorflow_datasets as tfds", "tensorflow_datasets is imported only in data"),
    ("pit_jax/learners/x.py", "from flax import linen as nn", "flax.linen is imported only in models"),
    ("pit_jax/learners/x.py", "import flax.linen as nn", "flax.linen is imported only in models"),
    ("pit_jax/learners/x.py", "from flax.linen import Module", "flax.linen is imported only in models"),
    ("pit_jax/learners/x.py", "import flax\nx = flax.linen.Module", "flax.linen is used only in models"),
    ("pit_jax/evaluation/x.py", "import openai", "openai is imported only in client"),
    ("pit_jax/data/x.py", "import tensorflow as tf", "tensorflow is imported nowhere"),
    ("pit_jax/data/x.py", "from tensorflow.io import gfile", "tensorflow is imported nowhere"),
    ("pit_jax/models/x.py", "import torch.nn", "torch is imported only in evaluation"),
    ("configs/x.py", "import torch", "torch is imported only in evaluation"),
    ("pit_jax/pipelines/x.py", "def f():\n    import matplotlib", "matplotlib is imported only in evaluation"),
    ("pit_jax/checkpoint.py", "import pickle", "pickle is imported nowhere"),
    ("tests/test_x.py", "from pickle import dumps", "pickle is imported nowhere"),
    ("pit_jax/checkpoint.py", "np.load('x', allow_pickle=True)", "allow_pickle"),
    # Layout.
    ("pit_jax/losses/x.py", "from jax.sharding import PartitionSpec as P", "no layout in losses"),
    ("pit_jax/losses/x.py", "import jax\nx = jax.P('data')", "no layout in losses"),
    ("pit_jax/learners/x.py", "from jax import P", "no layout in learners"),
    ("pit_jax/learners/x.py", "import jax\nx = jax.sharding.NamedSharding", "no layout in learners"),
    ("pit_jax/learners/x.py", "from jax import sharding", "no layout in learners"),
    ("pit_jax/learners/x.py", "def f(m, PartitionSpec):\n    return PartitionSpec()", "no layout in learners"),
]


@pytest.mark.parametrize(("path", "text", "expected"), BAD, ids=[f"{p}-{e}" for p, _, e in BAD])
def test_a_bad_import_is_found(tmp_path, path, text, expected):
    found = faults(make_tree(tmp_path, {path: text + "\n"}))
    assert found and all(f.startswith(f"{path}:") for f in found)
    assert any(expected in f for f in found), found
    if path != "pit_jax/utils.py":  # the fault is named with its line
        assert re.match(rf"{re.escape(path)}:{len(text.splitlines())}: ", found[0])


def test_good_imports_pass(tmp_path):
    good = {
        "pit_jax/__init__.py": ['__version__ = "1"'],
        "pit_jax/config.py": ["import ml_collections", "from pit_jax.types import Array"],
        "pit_jax/data/x.py": [
            "import tensorflow_datasets as tfds",
            "from pit_jax import __version__",
            "from . import y",
        ],
        "pit_jax/data/y.py": ["from pit_jax.config import DataConfig", "from ..types import Array"],
        "pit_jax/models/x.py": [
            "import flax.linen",
            "from flax import linen",
            "from jax.sharding import NamedSharding",
        ],
        "pit_jax/losses/x.py": ["from pit_jax.losses import y", "from pit_jax.types import Array", "jax.numpy.sum"],
        "pit_jax/sampling.py": ["from pit_jax import train_state", "from pit_jax.models.x import y", "jax.P('data')"],
        "pit_jax/checkpoint.py": ["import orbax.checkpoint as ocp", "np.load('x', allow_pickle=False)"],
        "pit_jax/learners/x.py": ["from pit_jax.losses import x", "from pit_jax import sampling", "import flax.struct"],
        "pit_jax/pipelines/x.py": ["from pit_jax.learners import x", "from pit_jax.pipelines import y"],
        "pit_jax/evaluation/x.py": ["from pit_jax.pipelines import x", "from pit_jax import client", "import torch"],
        "pit_jax/client.py": ["import openai"],
        "pit_jax/train.py": ["from ml_collections import config_flags", "from pit_jax import evaluation, plan"],
        "configs/x.py": ["import ml_collections", "from pit_jax import config"],
        "tests/test_x.py": [
            "import torch, orbax",
            "from pit_jax import train",
            "from jax.sharding import NamedSharding",
        ],
    }
    good = {name: "\n".join(lines) for name, lines in good.items()}
    assert faults(make_tree(tmp_path, good)) == []
