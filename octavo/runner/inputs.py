"""From a plan to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from octavo.attention.base import AttentionBatch
from octavo.runner.rows import DeviceRows, to_device
from octavo.sched.plan import StepPlan

# Keys that are copied out of the cache at once, at most: 201 MB in Qwen3 8B, less than the
# feed-forward layers of a step with as many tokens take.
MAX_GATHERED = 49_152
# Copying a key costs about as much as what so many queries gain by it ...
_MIN_QUERIES_PER_KEY = 512
# ... and steps with fewer tokens are rather run as graphs, which cannot copy.
_MIN_GATHER_TOKENS = 2048


def is_fresh(plan: StepPlan) -> bool:
    """Whether there are chunks and none has a context."""
    return len(plan.token_ids) > 0 and not plan.starts[plan.num_decodes :].any()


def count_gathered(plan: StepPlan) -> int:
    """How many keys to copy out of the cache before the chunks attend; 0: it does not pay."""
    if len(plan.token_ids) < _MIN_GATHER_TOKENS or is_fresh(plan):
        return 0
    lens = plan.chunk_lens[plan.num_decodes :].astype(np.int64)
    keys = plan.starts[plan.num_decodes :] + lens
    num_keys = int(keys.sum())
    pays = int((lens * keys).sum()) >= _MIN_QUERIES_PER_KEY * num_keys
    return num_keys if pays and num_keys <= MAX_GATHERED else 0


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One forward pass. Tokens lie sequence after sequence, in plan order."""

    token_ids: torch.Tensor  # [num_tokens] int64
    positions: torch.Tensor  # [num_tokens] int64
    batch: AttentionBatch
    last_batch: AttentionBatch | None  # see `ForwardContext`
    sample_indices: torch.Tensor | slice  # which hidden states are sampled from, [num_samples]
    sample_rows: torch.Tensor  # [num_samples] int64
    seq_rows: torch.Tensor  # [num_seqs] int64
    seq_lens: torch.Tensor  # [num_seqs] int64, positions computed once this pass has run


def _starts(lens: torch.Tensor) -> torch.Tensor:
    """[n] -> [n + 1] int32: where each would begin if they lay one after the other."""
    return F.pad(lens.cumsum(0), (1, 0)).to(torch.int32)


def last_layer_batch(
    slot_mapping: torch.Tensor,  # [num_tokens] int64, of the whole step
    queries: torch.Tensor,  # [n] int64, the tokens that are sampled from
    seq_lens: torch.Tensor,  # [n] int32, of their sequences; 0: padding
    block_tables: torch.Tensor,  # [n, max_blocks] int32
    host_seq_lens: Sequence[int],  # the same on the host, or bounds
    prompt_lens: Sequence[int] = (),
) -> AttentionBatch:
    """For the last layer: each sampled token attends as if its step were a decode."""
    num_queries = len(queries)
    starts = torch.arange(num_queries + 1, dtype=torch.int32, device=queries.device)
    return AttentionBatch(
        slot_mapping=slot_mapping,
        query_starts=starts,
        seq_lens=seq_lens,
        block_tables=block_tables,
        num_decodes=num_queries,
        max_query_len=1,
        max_seq_len=max(host_seq_lens),
        query_lens=(1,) * num_queries,
        host_seq_lens=tuple(host_seq_lens),
        prompt_lens=tuple(prompt_lens),
        queries=queries,
    )


def build_inputs(
    plan: StepPlan, rows: DeviceRows, block_size: int, *, want_all: bool = False
) -> StepInputs:
    """Everything the host knows goes over in one copy; the rest is gathered on the device.

    Args:
        want_all: the hidden states of all tokens, not only of those that are sampled from.
    """
    num_tokens, num_samples = plan.num_tokens, int(plan.samples.sum())
    query_starts = np.zeros(len(plan.rows) + 1, np.int64)
    np.cumsum(plan.chunk_lens, out=query_starts[1:])
    seq_index = np.repeat(np.arange(len(plan.rows)), plan.chunk_lens)
    seq_lens = plan.starts + plan.chunk_lens
    # A step without samples still has a last layer: its last token goes all the way.
    last_seqs = np.flatnonzero(plan.samples) if num_samples else np.array([len(plan.rows) - 1])
    sent = _send(
        {
            "seq_rows": plan.rows,
            "token_rows": plan.rows[seq_index],
            "positions": np.arange(num_tokens) - (query_starts[:-1] - plan.starts)[seq_index],
            "token_ids": plan.token_ids,
            "query_starts": query_starts,
            "seq_lens": seq_lens,
            "sample_rows": plan.rows[plan.samples],
            "last_seqs": last_seqs,
            "last_tokens": query_starts[1:][last_seqs] - 1,
        },
        rows.block_tables.device,
    )
    batch = _batch(plan, seq_lens, sent, rows, block_size)
    last_batch = None
    sample_indices: torch.Tensor | slice = sent["last_tokens"][:num_samples]
    if not want_all and len(last_seqs) < num_tokens:
        last_batch = last_layer_batch(
            batch.slot_mapping,
            sent["last_tokens"],
            batch.seq_lens[sent["last_seqs"]],
            batch.block_tables[sent["last_seqs"]],
            seq_lens[last_seqs].tolist(),
            rows.prompt_lens[plan.rows[last_seqs]].tolist(),
        )
        sample_indices = slice(num_samples)
    decode_ids = rows.last_token_ids[sent["seq_rows"][: plan.num_decodes]]
    return StepInputs(
        token_ids=torch.cat([decode_ids, sent["token_ids"]]),
        positions=sent["positions"],
        batch=batch,
        last_batch=last_batch,
        sample_indices=sample_indices,
        sample_rows=sent["sample_rows"],
        seq_rows=sent["seq_rows"],
        seq_lens=sent["seq_lens"],
    )


def _send(
    arrays: Mapping[str, npt.NDArray[np.integer]], device: torch.device
) -> dict[str, torch.Tensor]:
    """As int64 tensors, in one copy."""
    packed = np.concatenate([*arrays.values()]).astype(np.int64, copy=False)
    parts = torch.split(to_device(packed, device), [len(array) for array in arrays.values()])
    return dict(zip(arrays, parts, strict=True))


def _batch(
    plan: StepPlan,
    host_seq_lens: npt.NDArray[np.int32],
    sent: Mapping[str, torch.Tensor],
    rows: DeviceRows,
    block_size: int,
) -> AttentionBatch:
    num_decodes, num_keys = plan.num_decodes, count_gathered(plan)
    block_tables = rows.block_tables
    positions = sent["positions"]
    max_seq_len = int(host_seq_lens.max())
    max_blocks = -(-max_seq_len // block_size)
    blocks = block_tables[sent["token_rows"], positions // block_size].to(torch.int64)
    return AttentionBatch(
        slot_mapping=blocks * block_size + positions % block_size,
        query_starts=sent["query_starts"].to(torch.int32),
        seq_lens=sent["seq_lens"].to(torch.int32),
        block_tables=block_tables[sent["seq_rows"], :max_blocks],
        num_decodes=num_decodes,
        max_query_len=int(plan.chunk_lens.max()),
        max_seq_len=max_seq_len,
        query_lens=tuple(plan.chunk_lens.tolist()),
        host_seq_lens=tuple(host_seq_lens.tolist()),
        prompt_lens=tuple(rows.prompt_lens[plan.rows].tolist()),
        is_fresh=is_fresh(plan),
        key_starts=_starts(sent["seq_lens"][num_decodes:]) if num_keys else None,
        num_keys=num_keys,
    )
