"""Where a model lies on disk and what it says of itself. No torch: the server process uses it as
well.

`locate(model)` turns a built-in name, a hub id, a folder or a .gguf file into a `Checkpoint`.
"""

from octavo.checkpoint.checkpoint import Checkpoint
from octavo.checkpoint.source import locate, locate_from

__all__ = ["Checkpoint", "locate", "locate_from"]
