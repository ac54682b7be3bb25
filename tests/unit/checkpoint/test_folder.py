from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.tiny_gguf import write_gguf
from support.tiny_tokenizers import byte_level_json

from octavo.checkpoint import hub, locate
from octavo.errors import CheckpointError

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 10}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text(byte_level_json())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    return tmp_path


def test_a_folder(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    checkpoint = locate(str(folder))
    assert checkpoint.path == folder
    assert checkpoint.weights_format == "safetensors"
    assert checkpoint.weight_files == (folder / "model.safetensors",)
    assert checkpoint.config == CONFIG
    assert checkpoint.generation_config == {"eos_token_id": [1, 2]}
    assert checkpoint.tokenizer_json == byte_level_json()
    assert checkpoint.chat_template is None


def test_chat_templates(folder):
    (folder / "chat_template.json").write_text('{"chat_template": "json"}')
    assert locate(str(folder)).chat_template == "json"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert locate(str(folder)).chat_template == "d"
    (folder / "chat_template.jinja").write_text("jinja")
    assert locate(str(folder)).chat_template == "jinja"
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text('{"chat_template": 7}')
    with pytest.raises(CheckpointError, match="chat template"):
        locate(str(folder))


def test_shards(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(CheckpointError, match="no model-00002-of-00002"):
        locate(str(folder))
    save_file({"b": np.ones(2, np.float32)}, folder / "model-00002-of-00002.safetensors")
    assert [file.name for file in locate(str(folder)).weight_files] == sorted(shards.values())
    for weight_map in ({"a": "../evil.safetensors"}, {"a": 3}, {}, None):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match="index"):
            locate(str(folder))


def test_files_without_an_index(folder):
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    assert [f.name for f in locate(str(folder)).weight_files] == ["consolidated.safetensors"]
    save_file({"b": np.ones(2, np.float32)}, folder / "weights.safetensors")
    assert [f.name for f in locate(str(folder)).weight_files] == ["weights.safetensors"]


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="dummy"):
        locate(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="pickles"):
        locate(str(folder))


def test_dummy_needs_only_a_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    checkpoint = locate(str(tmp_path), load_format="dummy")
    assert (checkpoint.weights_format, checkpoint.weight_files) == ("none", ())
    assert checkpoint.tokenizer_json is None


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b""])
def test_broken_json_names_its_file(folder, content):
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        path = folder / name
        before = path.read_bytes() if path.exists() else b"{}"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            locate(str(folder))
        path.write_bytes(before)


def test_text_part_of_a_multimodal_model(folder):
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "text_config": {"model_type": "gemma3_text", "hidden_size": 8, "sliding_window": None},
        "vision_config": {"hidden_size": 9},
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert locate(str(folder)).config == {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": 8,
        "sliding_window": None,
        "eos_token_id": [1, 106],
        "text_part_of": "Gemma3ForConditionalGeneration",
    }
    (folder / "config.json").write_text('{"text_config": 3}')
    with pytest.raises(CheckpointError, match="text_config"):
        locate(str(folder))


def test_a_gguf_file(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, extra={"tokenizer.chat_template": "{{ messages }}"})
    checkpoint = locate(str(path))
    assert (checkpoint.weights_format, checkpoint.weight_files) == ("gguf", (path,))
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert checkpoint.chat_template == "{{ messages }}"
    assert checkpoint.tokenizer_json is not None
    assert locate(str(tmp_path)).path == path, "a folder with one .gguf file"
    assert locate(str(path), load_format="dummy").weights_format == "none"
    with pytest.raises(CheckpointError, match="load_format"):
        locate(str(path), load_format="safetensors")
    write_gguf(tmp_path / "n.gguf")
    with pytest.raises(CheckpointError, match=r"2 \.gguf files"):
        locate(str(tmp_path))


def test_another_tokenizer(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, vocabulary=False)
    assert locate(str(path)).tokenizer_json is None
    checkpoint = locate(str(path), tokenizer=str(folder))
    assert checkpoint.tokenizer_json == byte_level_json()
    assert checkpoint.tokenizer_config == {"eos_token": "</s>"}
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        locate(str(path), tokenizer=str(folder))


@pytest.mark.parametrize(
    "name", ["nonsense", "/no/such/folder", "./x/y/z", "a/b/c", "", "a/b.gguf"]
)
def test_unknown_names_list_the_choices(name):
    with pytest.raises(CheckpointError, match="smollm2-135m"):
        locate(name)


def test_other_refusals(folder):
    with pytest.raises(CheckpointError, match="load_format"):
        locate(str(folder), load_format="pickle")
    with pytest.raises(CheckpointError, match="neither"):
        locate(str(folder / "config.json"))


def test_hub_offline(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"org/name.*local cache"):
        locate("org/name", download_dir=str(tmp_path))


def _response(status: int):
    import httpx

    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/api"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("GatedRepoError", "HF_TOKEN"),
        ("RepositoryNotFoundError", "spelling"),
        ("RevisionNotFoundError", "no revision 'dev'"),
    ],
)
def test_hub_errors_say_what_to_do(monkeypatch, error, words):
    from huggingface_hub import errors

    def fail(*args, **kwargs):
        raise getattr(errors, error)("no", response=_response(403))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError, match=words):
        locate("org/name", revision="dev")


def test_hub_download(monkeypatch, folder):
    asked = {}

    def download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("org/name", revision="main").path == folder
    assert asked["repo_id"] == "org/name"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".py")) for pattern in asked["allow_patterns"])
    locate("org/name", load_format="dummy")
    assert "*.safetensors" not in asked["allow_patterns"]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: 1 / 0)
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        hub.download("a/b", revision=None, download_dir=None, needs_weights=True)
