"""What an engine with the fake runner is configured from."""

from __future__ import annotations

from pathlib import Path

from octavo.checkpoint import Checkpoint
from octavo.config import DeviceInfo, EngineArgs, EngineConfig, resolve

MAX_LEN = 256


def fake_checkpoint() -> Checkpoint:
    return Checkpoint(
        model="fake",
        path=Path("fake"),
        weights_format="safetensors",
        weight_files=(),
        config={"architectures": ["X"], "vocab_size": 50, "max_position_embeddings": MAX_LEN},
    )


def fake_config(args: EngineArgs, checkpoint: Checkpoint) -> EngineConfig:
    device = DeviceInfo(
        kind="cpu",
        name="cpu",
        total_memory_bytes=1,
        free_memory_bytes=1,
        num_cores=1,
        default_dtype="float32",
        dtypes=("float32",),
        attention_backends=("torch",),
    )
    return resolve(args, checkpoint, device)
