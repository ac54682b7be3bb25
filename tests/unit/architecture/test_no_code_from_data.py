"""Nothing in the package turns data into code: no pickle, no eval, no code from a checkpoint."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from support.sources import parse

PACKAGE = Path(__file__).parents[3] / "octavo"

MODULES = frozenset(("pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle"))
BUILTINS = frozenset(("eval", "exec", "compile", "__import__"))
# By the last part of the name, whatever it is called on; `load` of json or ctypes is another.
METHODS = {
    ("torch", "load"): "torch.load reads pickles",
    ("torch", "save"): "torch.save writes pickles",
    ("np", "load"): "numpy.load may read pickles",
    ("numpy", "load"): "numpy.load may read pickles",
    ("joblib", "load"): "joblib.load reads pickles",
    ("yaml", "load"): "yaml.load makes objects; use safe_load",
    ("yaml", "load_all"): "yaml.load_all makes objects; use safe_load_all",
    ("yaml", "unsafe_load"): "yaml.unsafe_load makes objects",
    ("yaml", "full_load"): "yaml.full_load makes objects",
    ("os", "system"): "os.system runs a shell",
}
KEYWORDS = frozenset(("trust_remote_code", "allow_pickle"))


def violations(source: str) -> list[str]:
    found = []
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in MODULES:
                found.append(str(node.module))
            names = {(node.module or "", alias.name) for alias in node.names}
            found += [METHODS[name] for name in names & METHODS.keys()]
        elif isinstance(node, ast.Call):
            found += _of_call(node)
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            found.append("trust_remote_code as a name")
    return found


def _of_call(node: ast.Call) -> list[str]:
    found = []
    if isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
        found.append(f"{node.func.id}()")
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        name = (node.func.value.id, node.func.attr)
        if name in METHODS:
            found.append(METHODS[name])
    for keyword in node.keywords:
        is_off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg in KEYWORDS and not is_off:
            found.append(f"{keyword.arg}=")
        if keyword.arg == "shell" and not is_off:
            found.append("shell=")
    return found


def test_the_package_is_clean() -> None:
    bad = {
        str(path.relative_to(PACKAGE)): found
        for path in sorted(PACKAGE.rglob("*.py"))
        if (found := violations(path.read_text()))
    }
    assert not bad, bad


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import dill as d",
        "import torch\ntorch.load(path, weights_only=True)",
        "from torch import load",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "exec(code, {})",
        "__import__(name)",
        "AutoConfig.from_pretrained(x, trust_remote_code=True)",
        "options = {'trust_remote_code': flag}",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
    ],
)
def test_a_planted_line_is_found(line: str) -> None:
    assert violations(line)


@pytest.mark.parametrize(
    "line", ["json.load(file)", "yaml.safe_load(text)", "model.eval()", "re.compile(x)"]
)
def test_what_only_looks_alike_is_not(line: str) -> None:
    assert not violations(line)
