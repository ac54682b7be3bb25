"""Fuzzing of everything that reads what a stranger may have written. See README.md."""

from __future__ import annotations

import sys
from pathlib import Path

# Seeds are made by the tests' own builders of tiny models and tokenizers.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
