"""One file per architecture, found through the registry."""

from octavo.models.base import CausalLM
from octavo.models.registry import REGISTRY, create_model

__all__ = ["REGISTRY", "CausalLM", "create_model"]
