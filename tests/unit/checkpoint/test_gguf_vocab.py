from __future__ import annotations

import json

import gguf
import pytest
from support.tiny_gguf import write_byte_vocabulary
from tokenizers import Tokenizer

from octavo.checkpoint.gguf_file import GgufFile
from octavo.checkpoint.gguf_pretokenizers import PRE_TOKENIZERS
from octavo.checkpoint.gguf_vocab import hf_tokenizer
from octavo.errors import CheckpointError

TEXTS = [
    "Hello world",
    "  leading and trailing  ",
    "a\n\nb\t\tc\r\n",
    "1234567890 3.14 12,345 x=12;y=[1,2,3]",
    "def f(x):\n    return x**2  # 你好",
    "🎉👍🏽 e\u0301 ﬁ \u00a0nbsp\u2003em",
    "Ünïcödé مرحبا שלום हिन्दी ไทย 日本語 한국어",
    "<|im_start|>user\nhi<|im_end|>\n<repo_name>x",
    "it's I'm you'll THEY'RE don't 'S x's 's",
    "\x00\x01\x7f " + "a" * 50,
]


def tokenizer_of(path, write, **metadata) -> tuple[Tokenizer, dict]:
    writer = gguf.GGUFWriter(path, metadata.pop("arch", "llama"))
    write(writer)
    for key, value in metadata.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        add(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = hf_tokenizer(GgufFile.open(path))
    assert found is not None
    return Tokenizer.from_str(found[0]), found[1]


def write_sentencepiece(writer: gguf.GGUFWriter) -> None:
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
    pieces += [("▁t", -1.0, 1), ("he", -2.0, 1), ("▁the", -3.0, 1), ("▁▁", -4.0, 1)]
    pieces += [(c, -10.0 - i, 1) for i, c in enumerate("▁the")] + [("[x]", 0.0, 4)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def test_byte_level(tmp_path):
    tokenizer, config = tokenizer_of(tmp_path / "v.gguf", write_byte_vocabulary)
    encoding = tokenizer.encode("ab ab12<|end|>")
    assert encoding.tokens == ["ab", "Ġab", "1", "2", "<|end|>"]
    assert tokenizer.decode(encoding.ids) == "ab ab12"
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == "ab ab12<|end|>"
    assert config["eos_token"] == "<|end|>"
    assert "bos_token" not in config


def test_sentencepiece(tmp_path):
    tokenizer, config = tokenizer_of(tmp_path / "v.gguf", write_sentencepiece)
    assert tokenizer.encode("the the").tokens == ["<s>", "▁the", "▁the"]
    assert tokenizer.encode("the[x] é").tokens == [
        "<s>",
        "▁the",
        "[x]",
        "▁▁",
        "<0xC3>",
        "<0xA9>",
    ]
    assert tokenizer.decode(tokenizer.encode("the é").ids) == "the é"
    assert (config["bos_token"], config["add_bos_token"]) == ("<s>", True)


def test_gemma_puts_no_space_in_front(tmp_path):
    tokenizer, _ = tokenizer_of(
        tmp_path / "v.gguf", write_sentencepiece, add_space_prefix=False, arch="gemma2"
    )
    assert tokenizer.encode("the").tokens == ["<s>", "t", "he"]
    assert tokenizer.decode(tokenizer.encode(" the").ids) == " the"


def test_phi3_special_tokens_swallow_spaces(tmp_path):
    tokenizer, _ = tokenizer_of(tmp_path / "v.gguf", write_sentencepiece, arch="phi3")
    added = {t.content: t.rstrip for t in tokenizer.get_added_tokens_decoder().values()}
    assert added == {"<unk>": False, "<s>": False, "</s>": True, "[x]": False}


def test_bos_and_eos(tmp_path):
    both, config = tokenizer_of(tmp_path / "v.gguf", write_sentencepiece, add_eos_token=True)
    assert both.encode("the").tokens == ["<s>", "▁the", "</s>"]
    assert both.encode("the", "the").tokens == ["<s>", "▁the", "</s>", "<s>", "▁the", "</s>"]
    assert config["add_eos_token"] is True
    bare, _ = tokenizer_of(tmp_path / "w.gguf", write_sentencepiece, add_bos_token=False)
    assert bare.encode("the").tokens == ["▁the"]


def test_doubled_tokens_keep_their_ids(tmp_path):
    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(["a", "b", "a", "c", "bc"])
        writer.add_token_merges(["b c"])

    tokenizer, _ = tokenizer_of(tmp_path / "v.gguf", write)
    assert tokenizer.get_vocab_size() == 5
    assert tokenizer.encode("abcc").ids == [0, 4, 3]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_pre_tokenizer_keeps_the_text(name):
    from tokenizers import decoders

    pre = PRE_TOKENIZERS[name].build()
    for text in TEXTS:
        cut = [piece for piece, _ in pre.pre_tokenize_str(text)]
        assert decoders.ByteLevel().decode(cut) == text


def test_pre_tokenizers_cut_numbers_as_their_models_do():
    def cut(name: str) -> list[str]:
        return [piece for piece, _ in PRE_TOKENIZERS[name].build().pre_tokenize_str("x 12345")]

    assert cut("gpt-2") == ["x", "Ġ12345"]
    assert cut("llama-bpe") == ["x", "Ġ", "123", "45"]
    assert cut("qwen2") == ["x", "Ġ", "1", "2", "3", "4", "5"]
    assert cut("smollm") == ["x", "Ġ", "1", "2", "3", "4", "5"]
    assert cut("tekken") == ["x", "Ġ", "1", "2", "3", "4", "5"]
    assert cut("gpt-4o") == ["x", "Ġ", "123", "45"]


def test_unknown_kinds_are_refused(tmp_path):
    path = tmp_path / "v.gguf"
    with pytest.raises(CheckpointError, match="'martian'"):
        tokenizer_of(path, lambda writer: write_byte_vocabulary(writer, "martian"))
    with pytest.raises(CheckpointError, match="'bert'"):
        tokenizer_of(path, lambda writer: writer.add_tokenizer_model("bert"))
    with pytest.raises(CheckpointError, match="beyond the vocabulary"):
        tokenizer_of(path, write_byte_vocabulary, bos_token_id=10**6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_smollm2_encodes_as_transformers_does(smollm2_dir):
    """The converted folder, read by transformers and by itself, and the known answers."""
    from transformers import AutoTokenizer

    ours = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    reference = AutoTokenizer.from_pretrained(smollm2_dir)
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert ids == reference(text)["input_ids"]
        assert ours.decode(ids, skip_special_tokens=False) == text
    assert ours.encode("Hello world 12").tokens == ["Hello", "Ġworld", "Ġ", "1", "2"]
    config = json.loads((smollm2_dir / "config.json").read_text())
    assert (config["vocab_size"], config["rope_theta"]) == (49152, 100000.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_smollm2_encodes_as_transformers_own_gguf_reader(smollm2_gguf):
    """Apart from digits beyond ASCII, which transformers' reader forgets to cut off singly."""
    from transformers import AutoTokenizer

    found = hf_tokenizer(GgufFile.open(smollm2_gguf))
    assert found is not None
    ours = Tokenizer.from_str(found[0])
    reference = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    for text in TEXTS:
        assert ours.encode(text).ids == reference(text)["input_ids"], text
        ids = ours.encode(text).ids
        assert ours.decode(ids, skip_special_tokens=False) == reference.decode(ids)
