"""Configuration as a value: frozen sections, resolved once, handed out narrowly."""

from octavo.config.args import EngineArgs
from octavo.config.resolve import resolve
from octavo.config.sections import (
    CacheConfig,
    DeviceInfo,
    EngineConfig,
    ModelConfig,
    RunnerConfig,
    SchedulerConfig,
)

__all__ = [
    "CacheConfig",
    "DeviceInfo",
    "EngineArgs",
    "EngineConfig",
    "ModelConfig",
    "RunnerConfig",
    "SchedulerConfig",
    "resolve",
]
