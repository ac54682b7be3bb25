"""Linear, norm, embedding and MLP layers: what they compute and which tensors they take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from octavo.errors import UnsupportedModelError, WeightsError
from octavo.layers.embedding import Embedding, LMHead
from octavo.layers.linear import Linear, MergedLinear
from octavo.layers.mlp import GatedMLP
from octavo.layers.norm import RMSNorm


def fill(slots):
    tensors = {name: torch.randn(slot.shape) for name, slot in slots.items()}
    for name, slot in slots.items():
        slot.load(tensors[name])
    return tensors


def test_merged_linear_stacks_its_parts():
    layer = MergedLinear(5, {"q": 4, "k": 2, "v": 3}, bias=True)
    tensors = fill(layer.weight_slots("a.b"))
    assert tensors.keys() == {f"a.b.{p}.{kind}" for p in "qkv" for kind in ("weight", "bias")}
    x = torch.randn(7, 5)
    parts = [F.linear(x, tensors[f"a.b.{p}.weight"], tensors[f"a.b.{p}.bias"]) for p in "qkv"]
    torch.testing.assert_close(layer(x), torch.cat(parts, -1))


def test_merged_linear_takes_a_tensor_that_is_already_fused():
    layer = MergedLinear(5, {"q": 4, "k": 2}, stored_as="qk")
    tensors = fill(layer.weight_slots("a"))
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {"a.qk.weight": (6, 5)}
    x = torch.randn(7, 5)
    torch.testing.assert_close(layer(x), F.linear(x, tensors["a.qk.weight"]))


def test_linear_and_its_slots():
    layer = Linear(5, 3, bias=True)
    tensors = fill(layer.weight_slots("proj"))
    x = torch.randn(7, 5)
    torch.testing.assert_close(layer(x), F.linear(x, tensors["proj.weight"], tensors["proj.bias"]))
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_a_tensor_that_would_broadcast_is_refused():
    slot = Linear(5, 3).weight_slots("proj")["proj.weight"]
    with pytest.raises(WeightsError, match=r"\(3, 5\), got \(1, 5\)"):
        slot.load(torch.zeros(1, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("add_one", "theirs"), [(False, LlamaRMSNorm), (True, Gemma2RMSNorm)])
def test_norm_is_that_of_transformers_to_the_bit(add_one, theirs, dtype):
    ours, reference = RMSNorm(48, 1e-5, add_one).to(dtype), theirs(48, 1e-5).to(dtype)
    weight, x, residual = torch.randn(48), torch.randn(9, 48).to(dtype), torch.randn(9, 48)
    residual = residual.to(dtype)
    ours.weight_slots("norm")["norm.weight"].load(weight)
    reference.weight.data.copy_(weight)
    assert torch.equal(ours.normalize(x), reference(x))
    normed, total = ours(x, residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, reference(x + residual))
    normed, total = ours(x, None)
    assert total is x
    assert torch.equal(normed, reference(x))


def test_embedding_scale_is_rounded_to_the_models_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        embedding = Embedding(4, 3072, scale=3072**0.5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert embedding.scale == 55.5
    embedding.weight.fill_(1.0)
    assert embedding(torch.tensor([3])).eq(55.5).all()


def test_head_is_tied_or_has_its_own_matrix_and_caps_its_logits():
    embedding = Embedding(11, 6)
    fill(embedding.weight_slots("embed"))
    tied = LMHead(11, 6, tied_to=embedding, softcap=2.0)
    assert not list(tied.parameters())
    assert tied.weight_slots("lm_head") == {}
    x = torch.randn(3, 6)
    torch.testing.assert_close(tied(x), 2 * torch.tanh(x @ embedding.weight.T / 2))
    own = LMHead(11, 6)
    weight = fill(own.weight_slots("lm_head"))["lm_head.weight"]
    torch.testing.assert_close(own(x), x @ weight.T)


@pytest.mark.parametrize("stored_as", [None, "gate_up_proj"])
def test_gated_mlp(stored_as):
    mlp = GatedMLP(6, 10, "gelu_pytorch_tanh", stored_as=stored_as)
    tensors = fill(mlp.weight_slots("mlp"))
    if stored_as is None:
        gate, up = tensors["mlp.gate_proj.weight"], tensors["mlp.up_proj.weight"]
    else:
        gate, up = tensors["mlp.gate_up_proj.weight"].chunk(2)
    x = torch.randn(3, 6)
    expected = (F.gelu(x @ gate.T, approximate="tanh") * (x @ up.T)) @ tensors[
        "mlp.down_proj.weight"
    ].T
    torch.testing.assert_close(mlp(x), expected)


def test_unknown_activation_is_named():
    with pytest.raises(UnsupportedModelError, match=r"'xielu'.*silu"):
        GatedMLP(6, 10, "xielu")
