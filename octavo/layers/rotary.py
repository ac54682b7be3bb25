"""Rotary position embedding, with the scalings that stretch it beyond the trained context.

A server keeps one table of cos and sin for all requests, so every choice that could depend on the
length of a request (dynamic, longrope) is made once, from `max_model_len`. See `_dynamic` and
`_longrope`. The frequencies follow transformers' `modeling_rope_utils`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from octavo.errors import UnsupportedModelError
from octavo.kernels.rope import Rope, rotate

DEFAULT_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """What a config says of its rotary embedding, in one form."""

    rope_type: str
    theta: float
    rot_dim: int  # the leading part of each head that is rotated
    max_position_embeddings: int
    original_max_position_embeddings: int
    params: Mapping[str, Any]  # of the scaling

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> RopeConfig:
        """From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`.

        Raises:
            UnsupportedModelError: an unknown scaling type, or one that carries unknown parameters.
        """
        params = config.get("rope_scaling") or config.get("rope_parameters") or {}
        rope_type = str(params.get("rope_type") or params.get("type") or "default")
        if rope_type not in SCALINGS:
            raise UnsupportedModelError(
                f"Rotary scaling type {rope_type!r} is not implemented; "
                f"supported: {', '.join(SCALINGS)}."
            )
        unknown = sorted(params.keys() - SCALINGS[rope_type].parameters - _COMMON_PARAMETERS)
        if unknown:
            raise UnsupportedModelError(
                f"Rotary scaling {rope_type!r} with {', '.join(unknown)} is not implemented."
            )
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        both = {**config, **params}
        longest = int(config["max_position_embeddings"])
        # Phi-3 has the trained length beside the scaling, and that one counts.
        original = (
            config.get("original_max_position_embeddings")
            or params.get("original_max_position_embeddings")
            or longest
        )
        return cls(
            rope_type=rope_type,
            theta=float(both.get("rope_theta") or DEFAULT_THETA),
            rot_dim=int(head_dim * (both.get("partial_rotary_factor") or 1.0)),
            max_position_embeddings=longest,
            original_max_position_embeddings=int(original),
            params=params,
        )

    def number(self, name: str) -> float:
        """A parameter that the scaling cannot do without."""
        value = self.params.get(name)
        if not isinstance(value, (int, float)):
            raise UnsupportedModelError(
                f"Rotary scaling {self.rope_type!r} needs a number {name!r}, got {value!r}."
            )
        return float(value)

    def inv_freq(self, theta: float | None = None) -> torch.Tensor:
        """Unscaled frequencies, [rot_dim / 2] float32, in radians per position."""
        exponents = torch.arange(0, self.rot_dim, 2, dtype=torch.float32, device="cpu")
        return 1.0 / ((theta or self.theta) ** (exponents / self.rot_dim))


class RotaryEmbedding(nn.Module):
    """A table of rotations for positions [0, max_model_len), in float32, for all layers.

    Args:
        config: the model's config.json; see `RopeConfig.read` for what is used of it.
        max_model_len: longest sequence that will be served, tokens.
    """

    table: torch.Tensor  # [max_model_len, rot_dim]: cos, then sin, of each frequency

    def __init__(self, config: Mapping[str, Any], max_model_len: int) -> None:
        super().__init__()
        rope = RopeConfig.read(config)
        inv_freq, factor = SCALINGS[rope.rope_type].compute(rope, max_model_len)
        positions = torch.arange(max_model_len, dtype=torch.float32, device="cpu")
        angles = positions[:, None] * inv_freq
        table = torch.cat((angles.cos() * factor, angles.sin() * factor), dim=-1)
        if not table[-1].isfinite().all():  # of the widest angles
            raise UnsupportedModelError(
                f"The parameters of rotary scaling {rope.rope_type!r} give no finite angles."
            )
        self.dtype = torch.get_default_dtype()
        self.register_buffer("table", table.to(torch.get_default_device()), persistent=False)

    def forward(self, positions: torch.Tensor) -> Rope:
        """[num_tokens] -> the tokens' rotations. Once per step, not per layer."""
        return Rope(self.table, positions, self.dtype)


def apply_rope(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Rotate the leading rot_dim of each head; pairs are (i, i + rot_dim / 2).

    x: [num_tokens, num_heads, head_dim], and so is the result; x may be overwritten.
    """
    return rotate(x, rope.cos, rope.sin)


# ---- scalings: (config, max_model_len) -> frequencies [rot_dim / 2], factor on cos and sin

Frequencies = tuple[torch.Tensor, float]


def _default(rope: RopeConfig, max_model_len: int) -> Frequencies:
    return rope.inv_freq(), 1.0


def _linear(rope: RopeConfig, max_model_len: int) -> Frequencies:
    """Position interpolation: https://arxiv.org/abs/2306.15595."""
    return rope.inv_freq() / rope.number("factor"), 1.0


def _dynamic(rope: RopeConfig, max_model_len: int) -> Frequencies:
    """NTK-aware scaling, for the longest sequence that will be served.

    transformers rescales whenever a sequence outgrows the trained length, which leaves keys in
    the cache that were rotated by other frequencies, and makes the result depend on how the prompt
    was chunked. Here the base is the one that transformers uses for a sequence of max_model_len
    tokens: unscaled as long as that is within the trained length.
    """
    trained_len = rope.max_position_embeddings
    factor = rope.number("factor")
    if rope.rot_dim <= 2:
        raise UnsupportedModelError("Rotary scaling 'dynamic' needs more than one frequency.")
    stretch = factor * max(max_model_len, trained_len) / trained_len - (factor - 1)
    return rope.inv_freq(rope.theta * stretch ** (rope.rot_dim / (rope.rot_dim - 2))), 1.0


def _llama3(rope: RopeConfig, max_model_len: int) -> Frequencies:
    """Llama 3.1: long waves are divided by the factor, short ones kept, those between blended."""
    factor, low, high = (
        rope.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor")
    )
    inv_freq = rope.inv_freq()
    waves_per_context = rope.original_max_position_embeddings * inv_freq / (2 * math.pi)
    keep = ((waves_per_context - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep) * inv_freq / factor + keep * inv_freq, 1.0


def _yarn(rope: RopeConfig, max_model_len: int) -> Frequencies:
    """YaRN: https://arxiv.org/abs/2309.00071."""
    params = rope.params
    if params.get("factor") is None:
        factor = rope.max_position_embeddings / rope.original_max_position_embeddings
    else:
        factor = rope.number("factor")

    def dimension(num_rotations: float) -> float:
        """Index of the frequency that turns so often in the trained context."""
        wave = rope.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return rope.rot_dim * math.log(wave) / (2 * math.log(rope.theta))

    low = dimension(params.get("beta_fast") or 32)
    high = dimension(params.get("beta_slow") or 1)
    if params.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rot_dim - 1)
    inv_freq = rope.inv_freq()
    ramp = torch.arange(len(inv_freq), dtype=torch.float32, device="cpu") - low
    interpolate = (ramp / (high - low or 0.001)).clamp(0.0, 1.0)
    scaled = inv_freq / factor * interpolate + inv_freq * (1 - interpolate)
    return scaled, _yarn_attention_factor(params, factor)


def _yarn_attention_factor(params: Mapping[str, Any], factor: float) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if params.get("attention_factor") is not None:
        return float(params["attention_factor"])
    if params.get("mscale") and params.get("mscale_all_dim"):
        return mscale(params["mscale"]) / mscale(params["mscale_all_dim"])
    return mscale(1.0)


def _longrope(rope: RopeConfig, max_model_len: int) -> Frequencies:
    """LongRoPE: https://arxiv.org/abs/2402.13753.

    The long factors are used if sequences longer than the trained length will be served, the short
    ones otherwise. transformers switches by the length of each sequence, which would leave keys in
    the cache that were rotated by the other set when a sequence crosses the line.
    """
    trained_len = rope.original_max_position_embeddings
    name = "long_factor" if max_model_len > trained_len else "short_factor"
    factors = rope.params.get(name)
    if not isinstance(factors, (list, tuple)) or len(factors) != (rope.rot_dim + 1) // 2:
        raise UnsupportedModelError(
            f"Rotary scaling 'longrope' needs {(rope.rot_dim + 1) // 2} numbers in {name!r}."
        )
    inv_freq = rope.inv_freq() / torch.tensor(factors, dtype=torch.float32, device="cpu")
    attention_factor = rope.params.get("attention_factor")
    if attention_factor is None:
        stretch = rope.params.get("factor") or rope.max_position_embeddings / trained_len
        gain = math.log(stretch) / math.log(trained_len) if stretch > 1 else 0.0
        attention_factor = math.sqrt(1 + gain)
    return inv_freq, float(attention_factor)


@dataclass(frozen=True, slots=True)
class _Scaling:
    compute: Callable[[RopeConfig, int], Frequencies]
    parameters: frozenset[str] = frozenset()  # those it reads


_COMMON_PARAMETERS = frozenset(
    # "finetuned" is a remark that some YaRN checkpoints carry.
    ("type", "rope_type", "rope_theta", "partial_rotary_factor", "finetuned")
)
_ORIGINAL = "original_max_position_embeddings"
_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
SCALINGS: dict[str, _Scaling] = {
    "default": _Scaling(_default, frozenset((_ORIGINAL,))),
    "linear": _Scaling(_linear, frozenset(("factor", _ORIGINAL))),
    "dynamic": _Scaling(_dynamic, frozenset(("factor", _ORIGINAL))),
    "llama3": _Scaling(
        _llama3, frozenset(("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL))
    ),
    "yarn": _Scaling(_yarn, frozenset(("factor", _ORIGINAL, *_YARN))),
    "longrope": _Scaling(
        _longrope,
        frozenset(("factor", "attention_factor", "long_factor", "short_factor", _ORIGINAL)),
    ),
}
