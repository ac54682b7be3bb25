"""From options to a running `EngineCore`: the one place where all parts meet."""

from __future__ import annotations

from octavo.checkpoint import Checkpoint
from octavo.config import EngineArgs, resolve
from octavo.engine.core import EngineCore
from octavo.platforms import detect
from octavo.runner.runner import ModelRunner


def build_core(args: EngineArgs, checkpoint: Checkpoint, *, progress: bool = False) -> EngineCore:
    """Load the model and size the cache.

    Raises:
        OctavoError: ConfigError, CheckpointError or UnsupportedModelError, with what to do.
    """
    platform = detect(args.device)
    config = resolve(args, checkpoint, platform.info())
    runner = ModelRunner(config, platform, progress=progress)
    return EngineCore(config, runner)
