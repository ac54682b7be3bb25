"""Rotary tables against transformers at real sizes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from octavo.errors import UnsupportedModelError
from octavo.layers.rotary import RotaryEmbedding, apply_rope

SIZES = {"hidden_size": 512, "num_attention_heads": 4, "max_position_embeddings": 4096}
BASE = {**SIZES, "rope_theta": 10000.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LONG = {"type": "longrope", "short_factor": [1.1] * 64, "long_factor": [3.0 + i for i in range(64)]}


def angles(inv_freq, factor, length):
    angle = torch.arange(length, dtype=torch.float32)[:, None] * inv_freq
    return torch.cat([angle.cos() * factor, angle.sin() * factor], -1)


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 2.5},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
        YARN,
        {**YARN, "truncate": False},
        {**YARN, "beta_fast": 20, "beta_slow": 3},
        {**YARN, "attention_factor": 0.9},
        {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
    ],
    ids=str,
)
def test_tables_agree_with_transformers(scaling):
    config = LlamaConfig(**SIZES, rope_theta=50000.0, rope_scaling=dict(scaling))
    rope_type = config.rope_parameters["rope_type"]
    expected = angles(*ROPE_INIT_FUNCTIONS[rope_type](config), 300)
    old = RotaryEmbedding({**BASE, "rope_theta": 50000.0, "rope_scaling": scaling}, 300)
    new = RotaryEmbedding(config.to_dict(), 300)
    # An ulp of the frequency is 3e-5 radians at position 300.
    torch.testing.assert_close(old.table, expected, atol=1e-4, rtol=0)
    assert torch.equal(old.table, new.table)


@pytest.mark.parametrize("max_model_len", [4096, 6000])
def test_dynamic_is_unscaled_within_the_trained_length_and_fixed_beyond(max_model_len):
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    config = LlamaConfig(**SIZES, rope_theta=10000.0, rope_scaling=dict(scaling))
    inv_freq, factor = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=max_model_len)
    table = RotaryEmbedding({**BASE, "rope_scaling": scaling}, max_model_len).table
    torch.testing.assert_close(table[:300], angles(inv_freq, factor, 300), atol=1e-4, rtol=0)
    plain = RotaryEmbedding(BASE, max_model_len).table
    assert torch.allclose(table[:300], plain[:300], atol=1e-4) == (max_model_len == 4096)


@pytest.mark.parametrize("max_model_len", [1024, 1025])
def test_longrope_takes_its_factors_by_the_longest_sequence_served(max_model_len):
    config = Phi3Config(
        **SIZES, original_max_position_embeddings=1024, rope_scaling=dict(LONG), pad_token_id=0
    )
    expected = angles(*ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=max_model_len), 300)
    beside = {**BASE, "rope_scaling": LONG, "original_max_position_embeddings": 1024}
    within = {**BASE, "rope_scaling": {**LONG, "original_max_position_embeddings": 1024}}
    for form in (beside, within):
        table = RotaryEmbedding(form, max_model_len).table
        torch.testing.assert_close(table[:300], expected, atol=1e-4, rtol=0)


def test_rotation_keeps_lengths_and_leaves_the_rest_of_the_head_alone():
    rotary = RotaryEmbedding({**BASE, "partial_rotary_factor": 0.5}, 50)
    x = torch.randn(3, 2, 128)
    rotated = apply_rope(x, rotary(torch.tensor([0, 7, 49])))
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotated[..., 64:], x[..., 64:])
    assert torch.equal(rotated[0], x[0])  # position 0 is not rotated
    assert not torch.allclose(rotated[1, :, :64], x[1, :, :64])


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "proportional"}, "'proportional' is not implemented.*llama3"),
        ({"type": "default", "mrope_section": [16, 24, 24]}, "mrope_section"),
        ({"type": "linear"}, "'factor'"),
        ({"type": "linear", "factor": "2"}, "'factor'"),
        ({**LONG, "short_factor": [1.0]}, "64 numbers"),
    ],
    ids=str,
)
def test_unimplemented_scalings_are_named(scaling, message):
    with pytest.raises(UnsupportedModelError, match=message):
        RotaryEmbedding({**BASE, "rope_scaling": scaling}, 50)
