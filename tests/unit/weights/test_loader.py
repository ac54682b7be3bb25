from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_gguf import write_gguf
from torch import nn

from octavo.checkpoint.gguf_file import GgufFile
from octavo.checkpoint.gguf_tensors import iter_tensors
from octavo.config.sections import ModelConfig
from octavo.errors import CheckpointError, WeightsError
from octavo.weights.dummy import fill_dummy
from octavo.weights.gguf import iter_gguf
from octavo.weights.loader import feed, load_weights
from octavo.weights.safetensors import iter_safetensors
from octavo.weights.slots import WeightSlot


class Model(nn.Module):
    """Slots for whatever parameters it is given."""

    ignored_weights = (r".*\.inv_freq",)

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.names = {name.replace(".", "_"): name for name in shapes}
        for key, name in self.names.items():
            self.register_parameter(key, nn.Parameter(torch.full(shapes[name], torch.nan)))

    def weight_slots(self) -> dict[str, WeightSlot]:
        return {self.names[k]: slot(p) for k, p in self.named_parameters()}


def slot(parameter: torch.Tensor) -> WeightSlot:
    def load(tensor: torch.Tensor) -> None:
        parameter.copy_(tensor)

    return WeightSlot(tuple(parameter.shape), load)


def config(load_format: str, files: tuple[Path, ...] = (), **hf: Any) -> ModelConfig:
    return ModelConfig(
        model="m",
        path=files[0] if files else Path(),
        load_format=load_format,  # type: ignore[arg-type]
        weight_files=files,
        hf_config=hf,
        architecture="TestForCausalLM",
        dtype="float32",
        max_model_len=8,
        vocab_size=8,
        eos_token_ids=(),
        seed=3,
    )


def test_feed_fills_every_slot():
    a, b = torch.zeros(2, 3), torch.zeros(4)
    tensors = [("b", torch.arange(4)), ("a", torch.ones(2, 3)), ("x.inv_freq", torch.ones(1))]
    feed({"a": slot(a), "b": slot(b)}, [r".*\.inv_freq"], tensors)
    assert (a == 1).all()
    assert b.tolist() == [0, 1, 2, 3]


def test_feed_names_every_fault():
    slots = {name: slot(torch.zeros(2)) for name in ("a", "b", "c")}
    tensors = [
        ("a", torch.ones(2)),
        ("a", torch.ones(2)),
        ("b", torch.ones(3, 1)),
        ("odd", torch.ones(1)),
    ]
    with pytest.raises(WeightsError) as caught:
        feed(slots, [], tensors)
    message = str(caught.value)
    for part in ("1 missing: c", "1 unexpected: odd", "1 doubled: a", "b ([3, 1], expected [2])"):
        assert part in message


def test_feed_names_only_some_of_many():
    with pytest.raises(WeightsError, match=r"100 unexpected: t0, .*, t7 and 92 more"):
        feed({}, [], ((f"t{i}", torch.ones(1)) for i in range(100)))


def test_ignored_must_match_as_a_whole_and_slots_go_first():
    kept = torch.zeros(1)
    feed({"w": slot(kept)}, ["w|v"], [("w", torch.ones(1)), ("v", torch.ones(1))])
    assert kept.item() == 1
    with pytest.raises(WeightsError, match="vv"):
        feed({}, ["v"], [("vv", torch.ones(1))])


def test_load_safetensors(tmp_path):
    files = (tmp_path / "1.safetensors", tmp_path / "2.safetensors")
    save_file({"a.weight": torch.ones(2, 2, dtype=torch.bfloat16)}, files[0])
    save_file({"b.weight": torch.arange(3.0), "r.inv_freq": torch.ones(1)}, files[1])
    model = Model({"a.weight": (2, 2), "b.weight": (3,)})
    load_weights(model, config("safetensors", files), progress=False)
    assert model.b_weight.tolist() == [0, 1, 2]
    assert (model.a_weight == 1).all()
    with pytest.raises(WeightsError, match=r"TestForCausalLM.*missing: c"):
        load_weights(Model({"c": (1,)}), config("safetensors", files[:1]), progress=False)


def test_doubled_across_shards(tmp_path):
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for file in files:
        save_file({"a": torch.ones(1)}, file)
    with pytest.raises(WeightsError, match=r"'a'.*1\.safetensors and 2\.safetensors"):
        list(iter_safetensors(files))


def test_damaged_safetensors(tmp_path):
    """Cut or altered anywhere: an error that names the file, or just other values."""
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.arange(64.0), "b": torch.ones(2, 2)}, path)
    good = path.read_bytes()
    damaged = [good[:length] for length in range(0, len(good), 7)]
    damaged += [good[:i] + bytes([good[i] ^ 0x41]) + good[i + 1 :] for i in range(160)]
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            list(iter_safetensors([path]))
        except WeightsError as error:
            refused += "m.safetensors" in str(error)
    assert refused > len(damaged) // 2


def test_text_part_of_a_multimodal_checkpoint(tmp_path):
    for prefix in ("language_model.model.", "model.language_model."):
        path = tmp_path / "m.safetensors"
        tensors = {
            f"{prefix}norm.weight": torch.ones(2),
            "vision_tower.x.weight": torch.ones(1),
            "multi_modal_projector.w": torch.ones(1),
        }
        save_file(tensors, path)
        model = Model({"model.norm.weight": (2,)})
        load_weights(model, config("safetensors", (path,), text_part_of="X"), progress=False)
        assert (model.model_norm_weight == 1).all()


def test_load_gguf(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, qtype="Q4_K")
    expected = dict(iter_tensors(GgufFile.open(path)))
    model = Model({name: values.shape for name, values in expected.items()})
    load_weights(model, config("gguf", (path,)), progress=False)
    for key, name in model.names.items():
        assert torch.equal(model.get_parameter(key), torch.tensor(expected[name]))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"m\.gguf"):
        list(iter_gguf(path))


def test_gguf_float16_stays_float16(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, qtype="F16")
    tensors = dict(iter_gguf(path))
    assert tensors["model.embed_tokens.weight"].dtype == torch.float16
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float16
    assert tensors["model.norm.weight"].dtype == torch.float32


def test_dummy():
    shapes = {"a.weight": (64, 64), "norm.weight": (8,), "a.bias": (5,)}
    first, second, third = Model(shapes), Model(shapes), Model(shapes)
    load_weights(first, config("dummy"), progress=False)
    fill_dummy(second, 3)
    fill_dummy(third, 4)
    assert torch.equal(first.a_weight, second.a_weight)
    assert not torch.equal(first.a_weight, third.a_weight)
    assert (first.norm_weight == 1).all()
    assert 0.015 < first.a_weight.std().item() < 0.025
    fill_dummy(half := Model(shapes).to(torch.bfloat16), 3)
    assert half.a_weight.isfinite().all()


def test_a_model_without_slots_is_a_bug():
    with pytest.raises(TypeError, match="weight_slots"):
        load_weights(nn.Linear(2, 2), config("safetensors"), progress=False)


@pytest.mark.slow
def test_the_real_model_loads_fast(smollm2_dir):
    path = smollm2_dir / "model.safetensors"
    shapes = {name: tuple(tensor.shape) for name, tensor in iter_safetensors([path])}
    model = Model(shapes)
    hf = json.loads((smollm2_dir / "config.json").read_text())
    load_weights(model, config("safetensors", (path,), **hf), progress=False)
    start = time.perf_counter()
    load_weights(model, config("safetensors", (path,), **hf), progress=True)
    assert time.perf_counter() - start < 5  # 0.1 s on a quiet machine
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("shape", [[0, 2**64 - 1], [2, 0, 2**63]])
def test_shapes_that_only_the_library_takes(tmp_path, shape):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    header = json.dumps({"a.weight": entry}).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(WeightsError, match=r"odd\.safetensors cannot be read"):
        for _ in iter_safetensors([path]):
            pass
