"""What config.json, the index and their like must not be; most of these were found by fuzzing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_folder import CONFIG, write_tiny_folder

from octavo.checkpoint.config_check import check_config
from octavo.checkpoint.folder import open_folder
from octavo.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "32"),
        ("hidden_size", None),
        ("hidden_size", 1 << 40),
        ("hidden_size", 2),  # fewer than heads
        ("num_hidden_layers", 1 << 31),
        ("num_hidden_layers", True),
        ("num_key_value_heads", 0),
        ("num_key_value_heads", {"x": 1}),
        ("head_dim", -8),
        ("vocab_size", [512]),
        ("max_position_embeddings", 0),
        ("rms_norm_eps", "x"),
        ("rope_theta", 1.0),
        ("rope_theta", [1e4]),
        ("partial_rotary_factor", float("nan")),
        ("hidden_act", {"x": 1}),
        ("tie_word_embeddings", "yes"),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", [["LlamaForCausalLM"]]),
        ("layer_types", ["full_attention"]),  # of two layers
        ("layer_types", 7),
        ("mlp_only_layers", "x"),
        ("sliding_window_pattern", 0),
        ("quantization_config", "fp8"),
        ("rope_scaling", 7),
        ("rope_scaling", {"rope_type": ["yarn"]}),
        ("rope_scaling", {"rope_type": "linear", "factor": "2"}),
        ("rope_scaling", {"rope_type": "linear", "factor": 0}),
        ("rope_scaling", {"rope_type": "longrope", "long_factor": [1.0, None, "x"]}),
        ("rope_scaling", {"rope_type": "yarn", "original_max_position_embeddings": 1}),
        ("rope_parameters", {"full_attention": {"rope_theta": -1.0}}),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [2, None]),
        ("eos_token_id", -1),
        ("text_config", 7),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(tmp_path: Path, name: str, value: Any) -> None:
    folder = write_tiny_folder(tmp_path, **{name: value})
    parts = [name, "hidden_size", "layer_types"]
    with pytest.raises(CheckpointError, match=rf"config\.json.*({'|'.join(parts)})"):
        open_folder("m", folder, needs_weights=False)


@pytest.mark.parametrize("value", [None, [], [2, 3], 2])
def test_every_form_of_eos_is_taken(tmp_path: Path, value: Any) -> None:
    folder = write_tiny_folder(tmp_path, eos_token_id=value, pad_token_id=-1)
    assert open_folder("m", folder, needs_weights=False).config["eos_token_id"] == value


def test_what_real_configs_hold_is_taken() -> None:
    check_config(
        CONFIG
        | {
            "sliding_window": None,
            "head_dim": None,
            "rope_scaling": None,
            "initializer_range": 0.02,
        }
        | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False, "mscale": 1}}
        | {"layer_types": ["sliding_attention"] * 2, "torch_dtype": "bfloat16"},
        Path("config.json"),
    )


def test_eos_of_generation_config_is_checked(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [[2]]}')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id"):
        open_folder("m", folder, needs_weights=False)


def test_a_model_larger_than_its_files_takes_no_memory(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path, vocab_size=1 << 24, hidden_size=1 << 20)
    (folder / "model.safetensors").write_bytes(bytes(1000))
    with pytest.raises(CheckpointError, match="1000 bytes"):
        open_folder("m", folder, needs_weights=True)


@pytest.mark.parametrize(
    "name",
    [["model.safetensors"], {}, None, "../m.safetensors", "x" * 300, "a\ud800", "\0", "", "."],
)
def test_the_index_names_files_of_the_folder_only(tmp_path: Path, name: Any) -> None:
    folder = write_tiny_folder(tmp_path)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name, "b": name}}))
    with pytest.raises(CheckpointError) as caught:
        open_folder("m", folder, needs_weights=True)
    str(caught.value).encode()


@pytest.mark.parametrize("name", [["default"], {}, 7])
def test_templates_with_names_of_other_kinds_are_passed_over(tmp_path: Path, name: Any) -> None:
    folder = write_tiny_folder(tmp_path)
    named = [{"name": name, "template": "x"}, {"name": "default", "template": "y"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert open_folder("m", folder, needs_weights=False).chat_template == "y"
