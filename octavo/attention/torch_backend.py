"""Paged attention in plain torch: the oracle for every other backend, and what a CPU runs.

What a step needs is the same in every layer with the same window, so it is worked out once per
step (`_Plan`): decodes are gathered in groups of similar length, longer chunks are cut into tiles
of queries, and both gather exactly the keys that some query sees. Stale or uninitialised parts of
a block are never read, so that one request's NaN cannot reach another through a reused block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from octavo.attention.base import AttentionBatch, AttentionSpec, KVLayer

# What a group of decodes may gather of K and V together. On a CPU the copy should still be in the
# cache when it is read; on a GPU the groups should be few.
GATHER_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
# A group takes a longer sequence as long as so large a part of what it gathers is not padding ...
MIN_GROUP_FILL = 0.75
# ... or the padding is so short that it costs less than another group's calls.
FREE_PADDING_TOKENS = 512
# Bounds on a tile: queries, and elements of its mask (or, with a softcap, of its scores).
TILE_QUERIES = 512
TILE_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class _Group:
    """Decodes that are attended together, each padded to the same number of keys."""

    rows: slice | torch.Tensor  # which tokens of the step
    num_rows: int
    slots: torch.Tensor  # [num_rows * num_keys], where the keys lie in the cache
    mask: torch.Tensor | None  # [num_rows, 1, 1, num_keys], added to the scores; None: no padding


@dataclass(frozen=True, slots=True)
class _Tile:
    """Some queries of one sequence, and the keys that any of them sees."""

    rows: slice  # which tokens of the step
    fresh: slice | None  # the keys are these of the step's own tokens ...
    slots: torch.Tensor | None  # ... or lie here in the cache, [num_keys]
    mask: torch.Tensor | None  # [num_queries, num_keys], added to the scores; None: see is_causal
    is_causal: bool  # query i sees keys [0, i]; otherwise, without a mask, all


@dataclass(frozen=True, slots=True)
class _Plan:
    groups: tuple[_Group, ...]
    tiles: tuple[_Tile, ...]
    num_tokens: int  # without padding
    # Where keys and values are gathered, group by group in each layer: on a CPU, fresh memory for
    # each would cost as much in page faults as the copy itself.
    scratch: torch.Tensor  # [2, most slots of a group or tile, num_kv_heads, head_dim]

    @property
    def is_one_group(self) -> bool:
        return len(self.groups) == 1 and not self.tiles


class TorchAttention:
    """Any device, any floating dtype, sliding window, softcap, grouped queries.

    It remembers the plans of the last batch and nothing else; a batch's tensors must not change
    once a layer has seen it.
    """

    name = "torch"
    captures_decodes = captures_chunks = compiles_ahead = gives_up_decodes = False

    def __init__(self) -> None:
        self._batch: AttentionBatch | None = None
        self._plans: dict[tuple[AttentionSpec, torch.dtype], _Plan] = {}

    def forward(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_dim]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        kv: KVLayer,
        batch: AttentionBatch,
        spec: AttentionSpec,
    ) -> torch.Tensor:  # [num_queries, num_heads, head_dim]
        """See `AttentionBackend.forward`. Rows beyond the batch's sequences (padding) are zero."""
        k_cache = kv.k.view(-1, *kv.k.shape[2:])  # [num_slots, num_kv_heads, head_dim]
        v_cache = kv.v.view(-1, *kv.v.shape[2:])
        key, value = _narrow(key, k_cache.dtype), _narrow(value, v_cache.dtype)
        k_cache.index_copy_(0, batch.slot_mapping, key)
        v_cache.index_copy_(0, batch.slot_mapping, value)
        query = batch.pick(query)
        plan = self._plan(query, kv, batch, spec)
        if plan.is_one_group and plan.num_tokens == len(query):
            k, v = _gather(k_cache, v_cache, plan.groups[0].slots, plan.scratch)
            return _attend_group(query, k, v, plan.groups[0], spec)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        output[plan.num_tokens :] = 0
        for group in plan.groups:
            k, v = _gather(k_cache, v_cache, group.slots, plan.scratch)
            output[group.rows] = _attend_group(query[group.rows], k, v, group, spec)
        for tile in plan.tiles:
            if tile.slots is None:
                k, v = key[tile.fresh], value[tile.fresh]
            else:
                k, v = _gather(k_cache, v_cache, tile.slots, plan.scratch)
            output[tile.rows] = _attend_tile(query[tile.rows], k, v, tile, spec)
        return output

    def _plan(
        self, query: torch.Tensor, kv: KVLayer, batch: AttentionBatch, spec: AttentionSpec
    ) -> _Plan:
        if batch is not self._batch:
            self._batch = batch
            self._plans.clear()
        cache_key = (spec, query.dtype)
        if cache_key not in self._plans:
            self._plans[cache_key] = _Planner(batch, kv.k, spec, query.dtype).plan()
        return self._plans[cache_key]


class _Planner:
    def __init__(
        self, batch: AttentionBatch, cache: torch.Tensor, spec: AttentionSpec, dtype: torch.dtype
    ) -> None:
        self.batch = batch
        self.cache = cache  # of keys or values, any layer's
        self.block_size = cache.shape[1]
        self.window = spec.sliding_window
        # Per query and key that are held at once: with a softcap, of every head.
        self.num_scores = 1 if spec.logit_softcap is None else spec.num_heads
        self.dtype = dtype

    def plan(self) -> _Plan:
        batch = self.batch
        lens = batch.host_seq_lens[: batch.num_decodes]
        spans = [self._keys_seen(seq_len - 1, seq_len) for seq_len in lens]
        budget = GATHER_BYTES.get(self.cache.device.type, GATHER_BYTES["cuda"])
        budget //= 2 * self.cache[0, 0].nbytes  # keys
        similar = _similar([stop - start for start, stop in spans], budget)
        groups = tuple(self._group(rows, spans) for rows in similar)
        tiles: list[_Tile] = []
        first_row = batch.num_decodes
        for seq in range(batch.num_decodes, len(batch.query_lens)):
            tiles += self._tiles(seq, first_row)
            first_row += batch.query_lens[seq]
        num_slots = [len(group.slots) for group in groups]
        num_slots += [len(tile.slots) for tile in tiles if tile.slots is not None]
        scratch = self.cache.new_empty(2, max(num_slots, default=0), *self.cache.shape[2:])
        return _Plan(groups, tuple(tiles), first_row, scratch)

    def _keys_seen(self, first_query: int, stop_query: int) -> tuple[int, int]:
        """The positions [start, stop) that queries at [first_query, stop_query) see."""
        start = 0 if self.window is None else max(first_query + 1 - self.window, 0)
        return start, max(stop_query, 1)  # a padding sequence may have length 0

    def _group(self, rows: list[int], spans: list[tuple[int, int]]) -> _Group:
        device = self.batch.block_tables.device
        bounds = torch.tensor([spans[row] for row in rows], device=device)  # [num_rows, 2]
        starts, stops = bounds[:, :1], bounds[:, 1:]
        num_keys = max(spans[row][1] - spans[row][0] for row in rows)
        positions = starts + torch.arange(num_keys, device=device)
        # Padding repeats the last key, which is a number; the mask takes it out.
        seen = positions.minimum(stops - 1)
        if rows[-1] - rows[0] + 1 == len(rows):
            index: slice | torch.Tensor = slice(rows[0], rows[-1] + 1)
        else:
            index = torch.tensor(rows, device=device)
        blocks = self.batch.block_tables[index].long().gather(1, seen // self.block_size)
        slots = blocks * self.block_size + seen % self.block_size
        mask = None
        if any(spans[row][1] - spans[row][0] < num_keys for row in rows):
            mask = self._mask(positions < stops)[:, None, None]
        return _Group(index, len(rows), slots.flatten(), mask)

    def _tiles(self, seq: int, first_row: int) -> list[_Tile]:
        """Cut a sequence's queries so that neither mask nor scores grow without bound."""
        query_len, seq_len = self.batch.query_lens[seq], self.batch.host_seq_lens[seq]
        window_hides = self.window is not None and self.window < seq_len
        if query_len == seq_len and not window_hides and self.num_scores == 1:
            rows = slice(first_row, first_row + query_len)
            return [_Tile(rows, fresh=rows, slots=None, mask=None, is_causal=True)]
        most = TILE_ELEMENTS // (self.num_scores * max(seq_len, 1))
        step = min(TILE_QUERIES, max(most, 1))
        first_position = seq_len - query_len
        return [
            self._tile(seq, first_row - first_position, start, min(start + step, seq_len))
            for start in range(first_position, seq_len, step)
        ]

    def _tile(self, seq: int, row_offset: int, first_query: int, stop_query: int) -> _Tile:
        """The queries at positions [first_query, stop_query) of a sequence whose position p is
        token p + row_offset of the step.
        """
        batch = self.batch
        device = batch.block_tables.device
        start, stop = self._keys_seen(first_query, stop_query)
        keys = torch.arange(start, stop, device=device)
        queries = torch.arange(first_query, stop_query, device=device)[:, None]
        visible = keys <= queries
        if self.window is not None:
            visible &= keys > queries - self.window
        is_fresh = batch.query_lens[seq] == batch.host_seq_lens[seq]
        blocks = batch.block_tables[seq].long()[keys // self.block_size]
        return _Tile(
            rows=slice(first_query + row_offset, stop_query + row_offset),
            fresh=slice(start + row_offset, stop + row_offset) if is_fresh else None,
            slots=None if is_fresh else blocks * self.block_size + keys % self.block_size,
            mask=self._mask(visible) if stop_query - first_query > 1 else None,
            is_causal=False,
        )

    def _mask(self, visible: torch.Tensor) -> torch.Tensor:
        """0 where visible, -inf elsewhere: SDPA would have to convert booleans in every layer."""
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=visible.device)
        return mask.masked_fill_(~visible, float("-inf"))


def _similar(num_keys: list[int], budget: int) -> list[list[int]]:
    """Partition decodes into groups that are padded to their longest: few, well filled, and within
    the budget (but at least one decode each). Each group's rows are in order.
    """
    groups: list[list[int]] = []
    held = 0  # keys in the last group, padding not counted
    for row in sorted(range(len(num_keys)), key=num_keys.__getitem__):
        longest = num_keys[row]
        padded = longest * (len(groups[-1]) + 1) if groups else 0
        padding = padded - held - longest
        allowed = max(FREE_PADDING_TOKENS, (1 - MIN_GROUP_FILL) * padded)
        if not groups or padded > budget or padding > allowed:
            groups.append([])
            held = 0
        groups[-1].append(row)
        held += longest
    return [sorted(group) for group in groups]


# ---- attending


def _gather(
    k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor, scratch: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values in these slots, [len(slots), num_kv_heads, head_dim] each, in scratch."""
    k, v = scratch[:, : len(slots)]
    torch.index_select(k_cache, 0, slots, out=k)
    torch.index_select(v_cache, 0, slots, out=v)
    return k, v


def _narrow(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded; what float16 has no room for becomes its largest number."""
    if dtype is torch.float16 and x.dtype is not dtype:
        x = x.clamp(-65504, 65504)
    return x.to(dtype)


def _attend_group(
    query: torch.Tensor,  # [n, num_heads, head_dim]
    key: torch.Tensor,  # [n * num_keys, num_kv_heads, head_dim]
    value: torch.Tensor,  # [n * num_keys, num_kv_heads, head_dim]
    group: _Group,
    spec: AttentionSpec,
) -> torch.Tensor:  # [n, num_heads, head_dim]
    shape = (group.num_rows, -1, *key.shape[1:])
    key = key.to(query.dtype).view(shape).transpose(1, 2)
    value = value.to(query.dtype).view(shape).transpose(1, 2)
    # The queries that share a KV head stand in for a sequence: K and V are not repeated.
    grouped = query.reshape(group.num_rows, spec.num_kv_heads, -1, spec.head_dim)
    if spec.logit_softcap is None:
        attended = F.scaled_dot_product_attention(
            grouped, key, value, attn_mask=group.mask, scale=spec.scale
        )
    else:
        attended = _softcapped(grouped, key, value, group.mask, spec.scale, spec.logit_softcap)
    return attended.flatten(1, 2)


def _attend_tile(
    query: torch.Tensor,  # [num_queries, num_heads, head_dim]
    key: torch.Tensor,  # [num_keys, num_kv_heads, head_dim]
    value: torch.Tensor,  # [num_keys, num_kv_heads, head_dim]
    tile: _Tile,
    spec: AttentionSpec,
) -> torch.Tensor:  # [num_queries, num_heads, head_dim]
    # [num_kv_heads, group, num_queries, head_dim]
    grouped = query.reshape(len(query), spec.num_kv_heads, -1, spec.head_dim)
    grouped = grouped.permute(1, 2, 0, 3)
    key, value = key.to(query.dtype).transpose(0, 1), value.to(query.dtype).transpose(0, 1)
    if spec.logit_softcap is None:
        attended = F.scaled_dot_product_attention(
            grouped,
            _for_each_head(key, grouped.shape[1]),
            _for_each_head(value, grouped.shape[1]),
            attn_mask=tile.mask,
            is_causal=tile.is_causal,
            scale=spec.scale,
        )
    else:
        stacked = grouped.flatten(1, 2)  # [num_kv_heads, group * num_queries, head_dim]
        mask = None if tile.mask is None else tile.mask.repeat(grouped.shape[1], 1)
        attended = _softcapped(stacked, key, value, mask, spec.scale, spec.logit_softcap)
        attended = attended.view(grouped.shape)
    return attended.permute(2, 0, 1, 3).flatten(1, 2)


def _for_each_head(x: torch.Tensor, group: int) -> torch.Tensor:
    """[num_kv_heads, num_keys, head_dim] -> [num_kv_heads, group, num_keys, head_dim], a view.

    But for float32 on a GPU: from a view, torch 2.11 attends wrongly there for a query that is
    alone in a tile of 64, the last of 64 n + 1.
    """
    repeated = x.unsqueeze(1).expand(-1, group, -1, -1)
    return repeated.contiguous() if x.is_cuda and x.dtype is torch.float32 else repeated


def _softcapped(
    query: torch.Tensor,  # [..., num_queries, head_dim]
    key: torch.Tensor,  # [..., num_keys, head_dim]
    value: torch.Tensor,  # [..., num_keys, head_dim]
    mask: torch.Tensor | None,  # broadcasts to [..., num_queries, num_keys]
    scale: float,
    softcap: float,
) -> torch.Tensor:  # [..., num_queries, head_dim]
    """Attention with scores capped before the mask, in float32. Copies K and V head by head first:
    strided operands cost matmul four times as much (8 sequences of 1,000 tokens, CPU).
    """
    key, value = key.float().contiguous(), value.float().contiguous()
    scores = torch.matmul(query.float(), key.transpose(-1, -2)).mul_(scale / softcap)
    scores = scores.tanh_().mul_(softcap)
    if mask is not None:
        scores = scores + mask
    return torch.matmul(scores.softmax(dim=-1), value).to(query.dtype)
