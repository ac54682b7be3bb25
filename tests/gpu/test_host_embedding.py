"""Embeddings that stay in the host's memory, read from there by a GPU."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from support.small_engines import QWEN3

from octavo.checkpoint import locate
from octavo.config import EngineArgs
from octavo.engine.build import build_core
from octavo.layers.embedding import Embedding
from octavo.layers.host import HostMethod

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("source", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_those_that_were_loaded(source: str, dtype: torch.dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    values = torch.randn(5000, 96).to(dtype)
    for _ in range(3):  # what is let go can be taken again
        embedding = Embedding(5000, 96)
        embedding.change_method(HostMethod(device))
        before = torch.cuda.memory_allocated(device)
        (slot,) = embedding.weight_slots("embed").values()
        with torch.inference_mode():
            slot.load(values.to(source))
            ids = torch.randint(0, 5000, (700,), device=device)
            rows = embedding(ids)
            assert rows.device == device
            assert torch.equal(rows.cpu(), values[ids.cpu()].to(torch.get_default_dtype()))
            del rows, ids
        assert torch.cuda.memory_allocated(device) == before
        del embedding, slot
        gc.collect()


def test_the_gpu_is_spared_its_bytes(tmp_path: Path) -> None:
    config = QWEN3 | {"vocab_size": 100_000}  # 51 MB in bfloat16
    (tmp_path / "config.json").write_text(json.dumps(config))
    taken = []
    for on_host in (True, False):
        args = EngineArgs.from_options(
            model=str(tmp_path), load_format="dummy", embedding_on_host=on_host, max_num_seqs=16
        )
        core = build_core(args, locate(str(tmp_path), load_format="dummy"))
        taken.append(core.info.memory_bytes)
        core.close()
        del core
        gc.collect()
        torch.cuda.empty_cache()
    assert taken[1]["weights"] - taken[0]["weights"] == 100_000 * 256 * 2
    # Nothing else has come to lie in what was spared, and keeps it.
    assert abs(taken[1]["state"] - taken[0]["state"]) < 24 << 20  # segments of 2 to 20 MB
