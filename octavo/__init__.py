"""Octavo: an LLM inference and serving engine.

`from octavo import LLM, SamplingParams`. Importing the package pulls neither torch nor any server
package; `LLM` is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from octavo import env
from octavo.types import CompletionOutput, Logprob, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from octavo.llm import LLM

__version__ = "0.1.0"

env.calm_openmp()

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from octavo.llm import LLM

        return LLM
    raise AttributeError(f"module 'octavo' has no attribute {name!r}")
