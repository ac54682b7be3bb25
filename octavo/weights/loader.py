"""Fill a model from its checkpoint: each expected tensor exactly once, or an error with names."""

from __future__ import annotations

import re
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import nn
from tqdm import tqdm

from octavo.config.sections import ModelConfig
from octavo.errors import WeightsError
from octavo.weights.blocks import Blocks
from octavo.weights.dummy import fill_dummy, fill_dummy_blocks
from octavo.weights.gguf import iter_gguf
from octavo.weights.packed import PackedModel, size_of
from octavo.weights.packed_cache import Keeper, PackedCache
from octavo.weights.safetensors import iter_safetensors
from octavo.weights.slots import WeightSlot
from octavo.weights.staging import staged

_T = TypeVar("_T")

_MAX_NAMED = 8  # names in an error message
_MIN_PACKING_S = 0.5  # what is packed faster than this is not worth a file

# Where multimodal checkpoints keep their text part, and what it is called on its own.
_TEXT_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("lm_head.", "lm_head."),
    ("model.layers.", "model.layers."),
    ("model.embed_tokens.", "model.embed_tokens."),
    ("model.norm.", "model.norm."),
)


@runtime_checkable
class LoadableModel(Protocol):
    """What the loader asks of a model."""

    ignored_weights: Sequence[str]  # regular expressions of checkpoint names to skip

    def weight_slots(self) -> dict[str, WeightSlot]: ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """Where a model's weights have come from."""

    source: str  # in words
    mapped_bytes: int = 0  # of them, those that stay in a file and take memory as they are read
    saved_s: float = 0.0  # that packing them has taken once
    keeper: Keeper | None = None  # puts them where the next start finds them, once it is started


def load_weights(
    model: nn.Module,
    config: ModelConfig,
    progress: bool = True,
    packed_model: PackedModel | None = None,
) -> Loaded:
    """Fill `model` in place; `packed_model` is the same one, if it packs its weights.

    Raises:
        WeightsError: the checkpoint does not fit the model; see `feed`.
        CheckpointError: a file cannot be read.
    """
    if config.load_format == "dummy":
        fill_dummy(model, config.seed)
        if isinstance(model, LoadableModel):
            fill_dummy_blocks(model.weight_slots().values(), config.seed)
        return Loaded("random weights")
    if packed_model is not None and config.packed_cache_bytes:
        return _load_packed(model, config, progress, packed_model)
    _load_checkpoint(model, config, progress)
    return Loaded(config.load_format)


def _load_packed(
    model: nn.Module, config: ModelConfig, progress: bool, packed_model: PackedModel
) -> Loaded:
    """From the cache, or else from the checkpoint for the cache."""
    cache = PackedCache.of(config, packed_model.packing)
    if (mapped := cache.try_load(packed_model)) is not None:
        return Loaded(
            f"packed weights from cache {cache.path}",
            mapped_bytes=size_of(mapped.tensors, packed=True),
            saved_s=mapped.saved_s,
        )
    start_s = time.monotonic()
    _load_checkpoint(model, config, progress)
    seconds, tensors = time.monotonic() - start_s, packed_model.packed()
    # What is mostly as it was (a mixture's experts) is as soon read from the checkpoint.
    pays = seconds >= _MIN_PACKING_S and 2 * size_of(tensors, packed=True) > size_of(tensors)
    return Loaded(config.load_format, keeper=Keeper(cache, tensors, seconds) if pays else None)


def _load_checkpoint(model: nn.Module, config: ModelConfig, progress: bool) -> None:
    if not isinstance(model, LoadableModel):
        raise TypeError(f"{type(model).__name__} has no weight_slots() and ignored_weights")
    slots = model.weight_slots()
    total_bytes = sum(path.stat().st_size for path in config.weight_files)
    try:
        with closing(_read(config, slots, next(model.parameters()).device)) as tensors:
            feed(slots, model.ignored_weights, tensors, progress, total_bytes)
    except WeightsError as error:
        raise WeightsError(f"{config.path} does not fit {config.architecture}: {error}") from error


def _read(
    config: ModelConfig, slots: dict[str, WeightSlot], device: torch.device
) -> Generator[tuple[str, torch.Tensor | Blocks], None, None]:
    """What the checkpoint holds: on the CPU, or what `device` has slots for already there."""

    def is_wanted(name: str, tensor: torch.Tensor) -> bool:
        slot = slots.get(name)
        return slot is not None and not slot.on_host and tuple(tensor.shape) == slot.shape

    is_part = "text_part_of" in config.hf_config
    if config.load_format == "gguf":
        blocks = iter_gguf(config.weight_files[0])
        yield from _text_part(blocks) if is_part else blocks
        return
    tensors = iter_safetensors(config.weight_files)
    if is_part:
        tensors = _text_part(tensors)
    yield from staged(tensors, device, is_wanted) if device.type == "cuda" else tensors


@torch.no_grad()
def feed(
    slots: dict[str, WeightSlot],
    ignored: Sequence[str],
    tensors: Iterable[tuple[str, torch.Tensor | Blocks]],
    progress: bool = False,
    total_bytes: int | None = None,
) -> None:
    """Give every slot its tensor.

    Args:
        slots: what is expected, by checkpoint name.
        ignored: regular expressions; a name that one of them matches as a whole is skipped, unless
            a slot asks for it.
        tensors: what there is.
        progress: show a bar, if it takes longer than a second.
        total_bytes: size of all tensors, for the bar.

    Raises:
        WeightsError: tensors are unexpected, missing, doubled or of the wrong shape, with names.
    """
    skip = re.compile("|".join(f"(?:{pattern})" for pattern in ignored) or r"(?!)")
    faults: dict[str, list[str]] = {kind: [] for kind in _FAULTS}
    seen: set[str] = set()
    with tqdm(
        desc="loading weights",
        total=total_bytes,
        unit="B",
        unit_scale=True,
        delay=1.0,
        leave=False,
        disable=not progress,
    ) as bar:
        for name, tensor in tensors:
            slot = slots.get(name)
            if slot is None:
                if not skip.fullmatch(name):
                    faults["unexpected"].append(name)
            elif name in seen:
                faults["doubled"].append(name)
            elif tuple(tensor.shape) != slot.shape:
                shapes = f"{list(tensor.shape)}, expected {list(slot.shape)}"
                faults["of the wrong shape"].append(f"{name} ({shapes})")
                seen.add(name)
            else:
                _load(slot, tensor)
                seen.add(name)
            bar.update((tensor.data if isinstance(tensor, Blocks) else tensor).nbytes)
    faults["missing"] = [name for name in slots if name not in seen]
    if any(faults.values()):
        raise WeightsError(_report(faults))


def _load(slot: WeightSlot, tensor: torch.Tensor | Blocks) -> None:
    if not isinstance(tensor, Blocks):
        slot.load(tensor)
    elif slot.load_blocks is not None:
        slot.load_blocks(tensor)
    else:
        slot.load(tensor.dequantize())


_FAULTS = ("missing", "unexpected", "doubled", "of the wrong shape")


def _report(faults: dict[str, list[str]]) -> str:
    parts = []
    for kind, names in faults.items():
        if names:
            more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
            parts.append(f"{len(names)} {kind}: {', '.join(names[:_MAX_NAMED])}{more}")
    return "tensors " + "; ".join(parts) + "."


def _text_part(tensors: Iterable[tuple[str, _T]]) -> Iterator[tuple[str, _T]]:
    """The text model's tensors of a multimodal checkpoint under their plain names; the rest (vision
    tower, projector) is left out.
    """
    for name, tensor in tensors:
        for prefix, plain in _TEXT_PREFIXES:
            if name.startswith(prefix):
                yield plain + name.removeprefix(prefix), tensor
                break
