"""Quantised models: against their dequantised twin, stacked and layer by layer, alone and in a
batch.
"""

from __future__ import annotations

import pytest
import torch
from support.paged import PagedCache
from support.tiny_gguf import write_gguf

from octavo.attention import ForwardContext, get_backend
from octavo.checkpoint.gguf_config import hf_config
from octavo.checkpoint.gguf_file import GgufFile
from octavo.kernels.cpu import library, ops
from octavo.layers.linear import DENSE, DenseMethod, MatrixLayer
from octavo.models import create_model
from octavo.quant import quantize, stack_layers
from octavo.quant.int8 import to_blocks
from octavo.quant.stack import NativeStack
from octavo.weights.blocks import Blocks
from octavo.weights.gguf import iter_gguf
from octavo.weights.loader import feed

pytestmark = pytest.mark.skipif(not library.is_available(), reason="not built: no C compiler")

ARCHITECTURES = ["llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"]


class Twin(DenseMethod):
    """What the kernels do, in torch: activations rounded to 8 bits, in groups of 32."""

    def apply(self, layer, x, bias):
        groups = x.reshape(len(x), -1, ops.GROUP)
        scale = groups.abs().amax(-1, keepdim=True) / 127
        steps = (groups * torch.where(scale > 0, 1 / scale, 0.0)).round()
        return super().apply(layer, (steps * scale).reshape(x.shape), bias)


TWIN = Twin()


def build(path, *, quantized: bool, stacked: bool = False, method: DenseMethod = TWIN):
    model = create_model(hf_config(GgufFile.open(path)), 128)
    if quantized:
        quantize(model, "int8")
    else:
        for layer in model.modules():
            if isinstance(layer, MatrixLayer) and layer.method is DENSE:
                layer.method = method
    tensors = dict(iter_gguf(path))
    if not quantized:  # what is stored in full is rounded, too
        for name, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 2:
                tensors[name] = to_blocks(tensor)
    feed(model.weight_slots(), model.ignored_weights, tensors.items())
    assert not stacked or stack_layers(model)
    return model


class Run:
    """Steps of known tokens through a model with native attention."""

    def __init__(self, model, prompt_lens=None):
        self.model, self.backend = model, get_backend("native")
        self.cache = PagedCache(model.attention_specs, 64, 16, prompt_lens=prompt_lens or {})

    def step(self, *chunks, ends_of=None):
        batch, positions = self.cache.step(chunks), self.cache.positions(chunks)
        starts = {seq: self.cache.lens[seq] - n for seq, n in chunks}
        ids = [(7 * seq + 3 * (starts[seq] + i)) % 11 for seq, n in chunks for i in range(n)]
        last = None if ends_of is None else self.cache.ends(batch, ends_of)
        context = ForwardContext(batch, self.cache.kv, self.backend, last)
        with ops.in_charge():
            hidden = self.model(torch.tensor(ids), positions, context)
            return self.model.compute_logits(hidden)


@pytest.mark.parametrize("qtype", ["Q4_0", "Q4_1", "Q8_0", "F32"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_close_to_its_twin(tmp_path, arch, qtype):
    path = tmp_path / "m.gguf"
    write_gguf(path, arch, qtype=qtype)
    expected = Run(build(path, quantized=False)).step((0, 20), (1, 9))
    got = Run(build(path, quantized=True)).step((0, 20), (1, 9))
    assert (got - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "phi3"])
def test_a_stack_has_the_same_bits_as_its_layers(tmp_path, arch):
    path = tmp_path / "m.gguf"
    write_gguf(path, arch, qtype="Q4_1")
    layers, stack = (
        Run(build(path, quantized=True)),
        Run(build(path, quantized=True, stacked=True)),
    )
    assert isinstance(stack.model.layers[0], NativeStack)
    for chunks in ([(0, 20), (1, 9)], [(0, 1), (1, 1)], [(2, 31), (1, 4)]):
        assert torch.equal(layers.step(*chunks), stack.step(*chunks))


def test_a_stack_still_runs_with_another_backend(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, qtype="Q4_1")
    native = Run(build(path, quantized=True, stacked=True))
    torch_attention = Run(build(path, quantized=True, stacked=True))
    torch_attention.backend = get_backend("torch")
    torch.testing.assert_close(
        native.step((0, 20)), torch_attention.step((0, 20)), atol=0.05, rtol=0.05
    )


def test_other_layers_are_not_stacked(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, "gemma2", qtype="Q8_0")
    assert not stack_layers(build(path, quantized=True))
    write_gguf(path, "llama", qtype="Q8_0")
    assert not stack_layers(build(path, quantized=False))


@pytest.mark.parametrize("stacked", [False, True])
def test_a_token_has_the_same_bits_in_any_batch_and_any_chunk(tmp_path, stacked):
    path = tmp_path / "m.gguf"
    write_gguf(path, qtype="Q4_1")
    library.set_threads(2)
    together = Run(build(path, quantized=True, stacked=stacked))
    first = together.step((0, 37), (1, 50), (2, 3))
    second = together.step((1, 1), (0, 1), (2, 40))
    library.set_threads(1)
    alone = Run(build(path, quantized=True, stacked=stacked))
    pieces = [alone.step((1, n)) for n in (1, 20, 2, 27, 1)]
    assert torch.equal(torch.cat(pieces), torch.cat([first[37:87], second[:1]]))


PROMPTS = {0: 37, 1: 30, 2: 25, 3: 9}  # lengths, by sequence


@pytest.mark.parametrize("qtype", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_prompt_and_what_was_generated_have_their_bits_however_they_are_computed(
    tmp_path, stacked, qtype
):
    """Sequence 1 has 30 tokens of a prompt and 22 more, one by one, or computed again in chunks."""
    path = tmp_path / "m.gguf"
    write_gguf(path, qtype=qtype)
    library.set_threads(2)
    first = Run(build(path, quantized=True, stacked=stacked), PROMPTS)
    again = first.step((0, 37), (1, 51), (2, 3))[37:88]
    again = torch.cat([again, first.step((0, 1), (1, 1), (2, 40))[1:2]])
    library.set_threads(1)
    alone = Run(build(path, quantized=True, stacked=stacked), PROMPTS)
    pieces = [alone.step((1, n)) for n in (1, 20, 2, 7)] + [alone.step((1, 1)) for _ in range(22)]
    assert torch.equal(torch.cat(pieces), again)


def test_tiles_are_for_prompts_alone(tmp_path):
    """They round less than the others do."""
    path = tmp_path / "m.gguf"
    write_gguf(path, qtype="Q8_0")
    exact = Run(build(path, quantized=False, method=DENSE)).step((0, 20))
    prompt, generated = (
        Run(build(path, quantized=True, stacked=True), {0: num_prompt}).step((0, 20))
        for num_prompt in (20, 0)
    )
    if library.isa() != "amx":
        assert torch.equal(prompt, generated)
        return
    errors = [((got - exact).norm() / exact.norm()).item() for got in (prompt, generated)]
    assert errors[0] < min(errors[1], 0.03)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_last_layer_of_few_tokens_has_the_same_bits(tmp_path, arch, stacked):
    if stacked and arch == "gemma2":
        pytest.skip("not stacked")
    path = tmp_path / "m.gguf"
    write_gguf(path, arch, qtype="Q4_1")
    library.set_threads(2)
    model = build(path, quantized=True, stacked=stacked)
    whole, few = Run(model, PROMPTS), Run(model, PROMPTS)
    expected = whole.step((0, 1), (1, 50), (2, 3), (3, 9))
    got = few.step((0, 1), (1, 50), (2, 3), (3, 9), ends_of=[0, 1, 3])
    assert torch.equal(got, expected[[0, 50, 62]])
    expected = whole.step((0, 1), (2, 40))
    got = few.step((0, 1), (2, 40), ends_of=[1])
    assert torch.equal(got, expected[[40]])
    # Whoever was not asked for has left its keys and values.
    assert torch.equal(few.step((3, 1), (2, 2), (0, 1)), whole.step((3, 1), (2, 2), (0, 1)))
    library.set_threads(1)


def test_formats_of_one_matrix_may_differ(tmp_path):
    """q, k and v are one matrix; files mix formats."""
    path = tmp_path / "m.gguf"
    write_gguf(path, qtype="Q4_1")
    other = tmp_path / "other.gguf"
    write_gguf(other, qtype="Q8_0")
    tensors = dict(iter_gguf(path))
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = dict(iter_gguf(other))[name]
    model = create_model(hf_config(GgufFile.open(path)), 128)
    quantize(model, "int8")
    feed(model.weight_slots(), model.ignored_weights, tensors.items())
    first, second = (layer.self_attn.qkv_proj.matrix for layer in model.layers)
    assert (first.kind, second.kind) == ("Q8_0", "Q4_1")
    rows = first.lookup(torch.arange(256, 384))
    torch.testing.assert_close(rows, tensors[name].dequantize(), atol=2e-3, rtol=0.01)


def test_blocks_dequantise_as_gguf_does(tmp_path):
    for qtype in ("Q4_0", "Q4_1", "Q8_0"):
        path = tmp_path / "m.gguf"
        expected = write_gguf(path, "qwen3", qtype=qtype)
        tensors = dict(iter_gguf(path))
        blocks = tensors["model.layers.1.mlp.up_proj.weight"]
        assert isinstance(blocks, Blocks)
        assert torch.equal(blocks.dequantize(), torch.from_numpy(expected["blk.1.ffn_up.weight"]))
