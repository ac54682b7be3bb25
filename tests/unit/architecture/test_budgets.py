"""Size budgets. They only tighten."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from support.sources import parse

PACKAGE = Path(__file__).parents[3] / "octavo"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 200
MAX_PUBLIC_METHODS = 15
MAX_ENVIRONMENT_VARIABLES = 10


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_files_stay_short() -> None:
    long = {str(p): n for p in FILES if (n := len(p.read_text().splitlines())) > MAX_FILE_LINES}
    assert not long


def test_functions_stay_short() -> None:
    long = []
    for path in FILES:
        budget = MAX_KERNEL_LINES if "kernels" in path.parts else MAX_FUNCTION_LINES
        for node in functions(path):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > budget:
                long.append(f"{path}:{node.lineno} {node.name} has {length} lines")
    assert not long, "\n".join(long)


def test_classes_stay_narrow() -> None:
    wide = []
    for path in FILES:
        for node in ast.walk(parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                methods = [
                    item.name
                    for item in node.body
                    if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
                    and not item.name.startswith("_")
                ]
                if len(methods) > MAX_PUBLIC_METHODS:
                    wide.append(
                        f"{path}:{node.lineno} {node.name} has {len(methods)} public methods"
                    )
    assert not wide, "\n".join(wide)


def test_no_module_is_a_drawer_for_everything() -> None:
    assert not [path for path in FILES if path.stem in ("utils", "helpers", "misc", "common")]


def test_environment_variables_stay_few() -> None:
    from octavo import env

    assert len(env.VARIABLES) <= MAX_ENVIRONMENT_VARIABLES
