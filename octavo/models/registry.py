"""Which class runs which architecture. Nothing is imported before it is needed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from octavo.errors import CheckpointError, UnsupportedModelError
from octavo.models.base import CausalLM

REGISTRY: dict[str, str] = {
    "Gemma2ForCausalLM": "octavo.models.gemma2:Gemma2ForCausalLM",
    "Gemma3ForCausalLM": "octavo.models.gemma3:Gemma3ForCausalLM",
    "LlamaForCausalLM": "octavo.models.llama:LlamaForCausalLM",
    "MistralForCausalLM": "octavo.models.mistral:MistralForCausalLM",
    "MixtralForCausalLM": "octavo.models.mixtral:MixtralForCausalLM",
    "Phi3ForCausalLM": "octavo.models.phi3:Phi3ForCausalLM",
    "Qwen2ForCausalLM": "octavo.models.qwen2:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "octavo.models.qwen3:Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM": "octavo.models.qwen3_moe:Qwen3MoeForCausalLM",
}


def create_model(hf_config: Mapping[str, Any], max_model_len: int) -> CausalLM:
    """The model that `architectures` in the config names, its parameters empty, on the default
    device and in the default dtype.

    Raises:
        UnsupportedModelError: neither the architecture nor a feature of it may be unknown.
        CheckpointError: the config lacks a value that the model needs.
    """
    architectures = hf_config.get("architectures") or ()
    architecture = next((name for name in architectures if name in REGISTRY), None)
    if architecture is None:
        raise UnsupportedModelError(
            f"Architecture {', '.join(architectures) or 'unknown'} is not implemented; "
            f"supported: {', '.join(REGISTRY)}."
        )
    if quantization := hf_config.get("quantization_config"):
        raise UnsupportedModelError(
            f"Weights quantised by {quantization.get('quant_method')!r} are not implemented."
        )
    module_name, _, class_name = REGISTRY[architecture].partition(":")
    model_class = getattr(importlib.import_module(module_name), class_name)
    try:
        model: CausalLM = model_class(hf_config, max_model_len)
    except KeyError as error:
        raise CheckpointError(f"The model's config.json lacks {error}.") from error
    return model
