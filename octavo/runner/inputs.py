"""From a plan to the tensors of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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
    sample_indices: torch.Tensor  # [num_samples] int64, tokens whose hidden state is sampled from
    sample_rows: torch.Tensor  # [num_samples] int64
    seq_rows: torch.Tensor  # [num_seqs] int64
    seq_lens: torch.Tensor  # [num_seqs] int64, positions computed once this pass has run


def _starts(lens: torch.Tensor) -> torch.Tensor:
    """[n] -> [n + 1] int32: where each would begin if they lay one after the other."""
    return F.pad(lens.cumsum(0), (1, 0)).to(torch.int32)


def build_inputs(plan: StepPlan, rows: DeviceRows, block_size: int) -> StepInputs:
    """Everything the host knows goes over in one copy; the rest is gathered on the device."""
    device = rows.block_tables.device
    num_seqs, num_tokens, num_decodes = len(plan.rows), plan.num_tokens, plan.num_decodes
    query_starts = np.zeros(num_seqs + 1, np.int64)
    np.cumsum(plan.chunk_lens, out=query_starts[1:])
    seq_index = np.repeat(np.arange(num_seqs), plan.chunk_lens)
    positions = np.arange(num_tokens) - query_starts[seq_index] + plan.starts[seq_index]
    seq_lens = plan.starts + plan.chunk_lens
    num_keys = count_gathered(plan)
    pieces = (
        plan.rows,
        plan.rows[seq_index],
        positions,
        plan.token_ids,
        query_starts[1:][plan.samples] - 1,
        plan.rows[plan.samples],
        query_starts,
        seq_lens,
    )
    packed = to_device(np.concatenate(pieces).astype(np.int64, copy=False), device)
    (
        seq_rows,
        token_rows,
        device_positions,
        host_token_ids,
        sample_indices,
        sample_rows,
        device_query_starts,
        device_seq_lens,
    ) = torch.split(packed, [len(piece) for piece in pieces])
    max_seq_len = int(seq_lens.max())
    max_blocks = -(-max_seq_len // block_size)
    blocks = rows.block_tables[token_rows, device_positions // block_size].to(torch.int64)
    batch = AttentionBatch(
        slot_mapping=blocks * block_size + device_positions % block_size,
        query_starts=device_query_starts.to(torch.int32),
        seq_lens=device_seq_lens.to(torch.int32),
        block_tables=rows.block_tables[seq_rows, :max_blocks],
        num_decodes=num_decodes,
        max_query_len=int(plan.chunk_lens.max()),
        max_seq_len=max_seq_len,
        query_lens=tuple(plan.chunk_lens.tolist()),
        host_seq_lens=tuple(seq_lens.tolist()),
        is_fresh=is_fresh(plan),
        key_starts=_starts(device_seq_lens[num_decodes:]) if num_keys else None,
        num_keys=num_keys,
    )
    decode_ids = rows.last_token_ids[seq_rows[:num_decodes]]
    return StepInputs(
        token_ids=torch.cat([decode_ids, host_token_ids]),
        positions=device_positions,
        batch=batch,
        sample_indices=sample_indices,
        sample_rows=sample_rows,
        seq_rows=seq_rows,
        seq_lens=device_seq_lens,
    )
