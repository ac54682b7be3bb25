"""A model out of a file of packed weights: the same bits as out of its checkpoint."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.tiny_folder import write_tiny_folder
from support.tiny_gguf import write_gguf
from support.tiny_models import SIZES, PagedRun, Reference

from octavo import LLM, SamplingParams
from octavo.attention import get_backend
from octavo.checkpoint.catalogue import packed_folder
from octavo.checkpoint.gguf_config import hf_config
from octavo.checkpoint.gguf_file import GgufFile
from octavo.errors import WeightsError
from octavo.kernels.cpu import library, ops
from octavo.models import CausalLM, create_model
from octavo.quant import quantize, stack_layers
from octavo.weights import loader
from octavo.weights.gguf import iter_gguf
from octavo.weights.loader import feed
from octavo.weights.packed import Packed, PackedModel, size_of
from octavo.weights.packed_file import map_packed, write_packed

pytestmark = pytest.mark.skipif(not library.is_available(), reason="not built: no C compiler")

EXPERTS = {"head_dim": 32, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES = {
    "llama": ("Llama", {"attention_bias": True}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-moe": ("Qwen3Moe", EXPERTS),
    "phi3": ("Phi3", {}),
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 24}),
}
PROMPT = [(7 * i + 3) % 149 for i in range(30)]


def make(config: dict[str, object]) -> tuple[CausalLM, PackedModel]:
    model = create_model(config, 64)
    for parameter in model.parameters():
        parameter.requires_grad_(False).fill_(float("nan"))
    packed_model = quantize(model, "int8")
    assert packed_model is not None
    return model, packed_model


def logits(model: CausalLM) -> torch.Tensor:
    stack_layers(model)
    run = PagedRun(model, [PROMPT])
    run.backend = get_backend("native")
    with ops.in_charge():
        run.step((0, 20))
        for _ in range(10):
            run.step((0, 1))
    return run.result(0)


def through_a_file(tensors: dict[str, Packed], path: Path) -> dict[str, Packed]:
    with path.open("wb") as file:
        write_packed(file, "key", tensors)
    return map_packed(path, "key").tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits(tmp_path, family):
    name, changes = FAMILIES[family]
    reference = Reference(getattr(transformers, f"{name}Config")(**SIZES | changes))
    first, first_packed = make(reference.hf_config())
    feed(first.weight_slots(), first.ignored_weights, reference.checkpoint.items())
    second, second_packed = make(reference.hf_config())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = through_a_file(first_packed.packed(), tmp_path / "file")
        second_packed.load_packed(tensors)
    assert torch.equal(logits(first), logits(second))
    # Experts are not packed: what is mapped of them is copied, and most of such a model is theirs.
    mostly_packed = 2 * size_of(tensors, packed=True) > size_of(tensors)
    assert mostly_packed == (family != "qwen3-moe")


@pytest.mark.parametrize("qtype", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "F16"])
def test_the_same_bits_as_a_gguf_file(tmp_path, qtype):
    path = tmp_path / "m.gguf"
    write_gguf(path, qtype=qtype)
    config = hf_config(GgufFile.open(path))
    first, first_packed = make(config)
    feed(first.weight_slots(), first.ignored_weights, iter_gguf(path))
    second, second_packed = make(config)
    second_packed.load_packed(through_a_file(first_packed.packed(), tmp_path / "file"))
    ids = torch.arange(11)
    assert torch.equal(first.embed_tokens(ids), second.embed_tokens(ids))
    for one, other in zip(first.layers, second.layers, strict=True):
        x = torch.randn(5, 256)
        assert torch.equal(one.mlp(x), other.mlp(x))


def test_matrices_stay_where_they_are_mapped_and_cannot_be_written_to(tmp_path):
    reference = Reference(transformers.LlamaConfig(**SIZES))
    model, packed_model = make(reference.hf_config())
    feed(model.weight_slots(), model.ignored_weights, reference.checkpoint.items())
    tensors = through_a_file(packed_model.packed(), tmp_path / "file")
    packed_model.load_packed(tensors)
    address = model.layers[1].mlp.down_proj.matrix.packed.data_ptr()
    assert address == tensors["layers.1.mlp.down_proj"].data.data_ptr()
    maps = Path("/proc/self/maps")
    if maps.exists():
        for line in maps.read_text().splitlines():
            begin, _, end = line.split()[0].partition("-")
            if int(begin, 16) <= address < int(end, 16):
                assert line.split()[1].startswith("r--")
                assert line.endswith("file")
    assert model.norm.weight.data_ptr() != tensors["norm.weight"].data.data_ptr()


def wrong(tensors: dict[str, Packed], how: str) -> dict[str, Packed]:
    tensors = dict(tensors)
    matrix, norm = tensors["layers.0.mlp.down_proj"], tensors["norm.weight"]
    if how == "missing":
        del tensors["norm.weight"]
    elif how == "left over":
        tensors["other"] = norm
    elif how == "matrix of another shape":
        tensors["layers.0.mlp.down_proj"] = Packed(matrix.kind, (64, 95), matrix.data)
    elif how == "matrix of another kind":
        tensors["layers.0.mlp.down_proj"] = Packed("float32", matrix.shape, matrix.data)
    elif how == "matrix cut off":
        tensors["layers.0.mlp.down_proj"] = Packed(matrix.kind, matrix.shape, matrix.data[:-64])
    elif how == "parameter of another shape":
        tensors["norm.weight"] = Packed(norm.kind, (63,), norm.data[:-4])
    elif how == "parameter of another kind":
        tensors["norm.weight"] = Packed("Q8_0", norm.shape, norm.data)
    elif how == "parameter cut off":
        tensors["norm.weight"] = Packed(norm.kind, norm.shape, norm.data[:-4])
    return tensors


@pytest.mark.parametrize(
    "how",
    ["missing", "left over"]
    + [f"matrix {what}" for what in ("of another shape", "of another kind", "cut off")]
    + [f"parameter {what}" for what in ("of another shape", "of another kind", "cut off")],
)
def test_what_does_not_fit_is_refused(how):
    reference = Reference(transformers.LlamaConfig(**SIZES))
    model, packed_model = make(reference.hf_config())
    feed(model.weight_slots(), model.ignored_weights, reference.checkpoint.items())
    tensors = packed_model.packed()
    packed_model.load_packed(tensors)
    with pytest.raises(WeightsError):
        packed_model.load_packed(wrong(tensors, how))


# ---- whole engines


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint, and a home; what is packed in no time is kept all the same."""
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(loader, "_MIN_PACKING_S", 0.0)
    folder = write_tiny_folder(tmp_path / "model")
    write_weights(folder, seed=0)
    return folder


def write_weights(folder: Path, seed: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    torch.manual_seed(seed)
    slots = create_model(config, 64).weight_slots()
    tensors = {name: torch.randn(slot.shape) / 4 for name, slot in slots.items()}
    save_file(tensors, folder / "model.safetensors")


def generate(folder: Path, **options: object) -> tuple[list[int], str]:
    """Tokens, and where the weights were from. Waits until they are kept."""
    options = {"num_threads": 1, "num_gpu_blocks_override": 64} | options
    with LLM(str(folder), **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        [output] = llm.generate(["ab"], params, use_tqdm=False)
        loaded = llm._engine()._runner._loaded
        if loaded.keeper is not None:
            loaded.keeper._thread.join()
        return [*output.outputs[0].token_ids], loaded.source


def test_the_second_engine_maps_what_the_first_has_packed(folder):
    tokens, source = generate(folder)
    assert source == "safetensors"
    again, source = generate(folder)
    assert source.startswith("packed weights from cache ")
    assert again == tokens
    [path] = packed_folder().glob("*.packed")
    path.write_bytes(path.read_bytes()[:-1])
    assert generate(folder) == (tokens, "safetensors")
    assert generate(folder) == (tokens, source)
    write_weights(folder, seed=1)
    other, source = generate(folder)
    assert source == "safetensors"
    assert other != tokens


def test_it_can_be_turned_off(folder):
    assert generate(folder, packed_cache_bytes=0)[1] == "safetensors"
    assert generate(folder, quantization="none")[1] == "safetensors"
    assert generate(folder, load_format="dummy")[1] == "random weights"
    assert not packed_folder().exists()
    generate(folder)
    assert packed_folder().exists()
    assert generate(folder, packed_cache_bytes=0)[1] == "safetensors"


def test_what_is_packed_in_no_time_is_not_kept(folder, monkeypatch):
    monkeypatch.setattr(loader, "_MIN_PACKING_S", 60.0)
    generate(folder)
    assert not packed_folder().exists()


def test_another_instruction_set_has_another_file(folder):
    sources = []
    for isa in ("generic", "", "generic", ""):
        assert library.use_isa(isa)
        sources.append(generate(folder)[1])
    if library.packing().startswith("generic"):
        pytest.skip("this CPU has no other")
    assert [source == "safetensors" for source in sources] == [True, True, False, False]
    assert sources[2] != sources[3]


def test_an_engine_that_is_closed_lets_go_of_its_file(folder):
    generate(folder)
    [path] = packed_folder().glob("*.packed")
    assert generate(folder)[1].startswith("packed weights")
    maps = Path("/proc/self/maps")
    assert not maps.exists() or path.name not in maps.read_text()
