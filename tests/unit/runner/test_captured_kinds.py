"""Which steps the runner captures is the attention backend's choice, and changes no token.

In place of a GPU stands a capturer whose replay calls the captured function again, and a backend
that, as a graph must, believes the batch's tensors and not what the host said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.tiny_folder import write_tiny_folder

from octavo.attention import BACKENDS, AttentionBatch, AttentionSpec, KVLayer, TorchAttention
from octavo.checkpoint import locate
from octavo.config import EngineArgs, resolve
from octavo.engine.core import EngineCore
from octavo.platforms import detect
from octavo.runner import runner as runner_module
from octavo.runner.runner import ModelRunner
from octavo.types import EngineRequest, SamplingParams


class Again:
    """A graph that is only a function."""

    def __init__(self, function) -> None:
        self._function = function
        self.result = function().clone()

    def replay(self) -> None:
        self.result.copy_(self._function())


class Capturer:
    def __init__(self, device: torch.device) -> None:
        pass

    def capture(self, function):
        graph = Again(function)
        return graph, graph.result


class ByTensors(TorchAttention):
    """Attends by the lengths on the device."""

    name = "by-tensors"
    captures_decodes = True

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv: KVLayer,
        batch: AttentionBatch,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        lens = batch.query_starts.diff().tolist()
        there = [i for i, length in enumerate(lens) if length]  # a graph has room for more
        seen = dataclasses.replace(
            batch,
            seq_lens=batch.seq_lens[there],
            block_tables=batch.block_tables[there],
            num_decodes=sum(i < batch.num_decodes for i in there),
            query_lens=tuple(lens[i] for i in there),
            host_seq_lens=tuple(batch.seq_lens[there].tolist()),
        )
        return super().forward(query, key, value, kv, seen, spec)


class Chunks(ByTensors):
    name = "chunks-too"
    captures_chunks = True


@pytest.fixture(autouse=True)
def backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(runner_module, "Capturer", Capturer)
    for backend in (ByTensors, Chunks):
        monkeypatch.setitem(BACKENDS, backend.name, backend)
    return


def engine(folder: Path, backend: str, *, graphs: bool) -> tuple[EngineCore, ModelRunner]:
    args = EngineArgs.from_options(
        model=str(folder),
        load_format="dummy",
        device="cpu",
        dtype="float32",
        quantization="none",
        max_num_seqs=4,
        max_num_batched_tokens=48,
        kv_cache_memory_bytes=1 << 20,
    )
    platform, checkpoint = detect("cpu"), locate(str(folder), load_format="dummy")
    config = resolve(args, checkpoint, platform.info())
    section = dataclasses.replace(
        config.runner, attention_backend=backend, enforce_eager=not graphs
    )
    config = dataclasses.replace(config, runner=section)
    runner = ModelRunner(config, platform)
    return EngineCore(config, runner), runner


def drive(core: EngineCore) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {i: [] for i in range(6)}
    for i in tokens:
        prompt = tuple(3 + (7 * i + 5 * p) % 400 for p in range(5 + 11 * i))
        core.add(
            EngineRequest(
                request_id=i,
                prompt_token_ids=prompt,
                params=SamplingParams(max_tokens=None, temperature=0),
                max_total_len=len(prompt) + 6 + i,
                stop_token_ids=(),
                seed=i,
            )
        )
    while core.has_work:
        if (outputs := core.step()) is not None:
            for request_id, token in zip(outputs.request_ids, outputs.token_ids, strict=True):
                tokens[request_id].append(token)
    return tokens


@pytest.mark.parametrize(
    ("backend", "captures_chunks"), [("by-tensors", False), ("chunks-too", True)]
)
def test_only_what_the_backend_allows_is_captured(
    tmp_path: Path, backend: str, captures_chunks: bool
) -> None:
    folder = write_tiny_folder(tmp_path)
    core, runner = engine(folder, backend, graphs=True)
    tokens = drive(core)
    assert all(len(tokens[i]) == 6 + i for i in tokens)
    while runner.prepare_more():
        pass
    assert runner._decode_graphs is not None
    assert runner._chunk_graphs is not None
    assert set(runner._decode_graphs.ladder) == {s for s, *_ in runner._decode_graphs._captured}
    assert bool(runner._chunk_graphs._captured) == captures_chunks
    assert (runner._chunk_graphs.largest is not None) == captures_chunks
    core.close()
    eager, runner = engine(folder, backend, graphs=False)
    assert drive(eager) == tokens
    assert runner._decode_graphs is None
    eager.close()
