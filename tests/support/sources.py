"""Source code as trees, for the tests that look at how the package is written."""

from __future__ import annotations

import ast
from functools import cache


@cache
def parse(source: str) -> ast.Module:
    """Each file once for all tests; nobody may change the tree."""
    return ast.parse(source)
