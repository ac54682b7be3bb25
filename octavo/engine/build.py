"""From options to a running `EngineCore`: the one place where all parts meet."""

from __future__ import annotations

from octavo.checkpoint import Checkpoint
from octavo.config import EngineArgs, EngineConfig, resolve
from octavo.engine.core import EngineCore
from octavo.platforms import detect
from octavo.runner.runner import ModelRunner


def build_runner(
    args: EngineArgs, checkpoint: Checkpoint, *, progress: bool = False
) -> tuple[EngineConfig, ModelRunner]:
    """Load the model and size the cache.

    Raises:
        OctavoError: ConfigError, CheckpointError or UnsupportedModelError, with what to do.
    """
    platform = detect(args.device)
    config = resolve(args, checkpoint, platform.info())
    return config, ModelRunner(config, platform, progress=progress)


def build_core(args: EngineArgs, checkpoint: Checkpoint, *, progress: bool = False) -> EngineCore:
    """An engine in this process. Raises OctavoError as `build_runner` does."""
    return EngineCore(*build_runner(args, checkpoint, progress=progress))
