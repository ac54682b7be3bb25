from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny_tokenizers import byte_level_json

from octavo.checkpoint.checkpoint import Checkpoint
from octavo.errors import CheckpointError, InvalidRequestError
from octavo.text.tokenizer import Tokenizer


def test_round_trip(byte_level, sentencepiece):
    for text in ("hello world", "  two  spaces", "naïve 你好 🎉", "a\n\tb", ""):
        assert byte_level.decode(byte_level.encode(text)) == text
        assert sentencepiece.decode(sentencepiece.encode(text)) == text


def test_special_tokens(byte_level):
    ids = byte_level.encode("<s>hello</s>")
    assert ids[0] == byte_level.bos_token_id == 0
    assert ids[-1] == byte_level.eos_token_id == 1
    assert byte_level.special_token_ids == {0, 1, 2}
    assert byte_level.decode(ids) == "hello"
    assert byte_level.decode(ids, skip_special_tokens=False) == "<s>hello</s>"
    assert byte_level.id_to_token(0) == "<s>"
    assert byte_level.id_to_token(10**6) is None
    assert byte_level.token_to_id("</s>") == 1


def test_vocab_size_counts_added_tokens(byte_level):
    added = byte_level.encode("[tool é]")
    assert added == [byte_level.vocab_size - 1]
    assert byte_level.decode(added) == "[tool é]"
    assert byte_level.token_bytes(added[0]) == "[tool é]".encode()


def test_encode_batch_equals_encode(byte_level):
    texts = ["hello", "", "the quick", "你好"]
    assert byte_level.encode_batch(texts) == [byte_level.encode(text) for text in texts]


def test_flags_add_what_tokenizer_json_does_not():
    both = Tokenizer(
        byte_level_json(), bos_token="<s>", eos_token="</s>", add_bos=True, add_eos=True
    )
    plain = both.encode("hello", add_special_tokens=False)
    assert both.encode("hello") == [0, *plain, 1]
    assert both.encode("<s>hello") == [0, *plain, 1], "no second BOS"
    assert both.encode_batch(["a", "b"])[1][0] == 0


def test_the_files_own_template_goes_first():
    layout = json.loads(byte_level_json())
    layout["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    tokenizer = Tokenizer(json.dumps(layout), bos_token="<s>", add_bos=True)
    assert tokenizer.encode("hello").count(0) == 1


def test_truncation_and_padding_of_the_file_are_off():
    layout = json.loads(byte_level_json())
    layout["truncation"] = {
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    assert len(Tokenizer(json.dumps(layout)).encode("hello world the quick")) > 2


def test_token_text_shows_a_token_as_inside_a_text(byte_level, sentencepiece):
    the = sentencepiece.token_to_id("▁the")
    assert sentencepiece.token_text(the) == " the"
    assert sentencepiece.token_bytes(the) == b" the"
    assert sentencepiece.token_text(sentencepiece.token_to_id("<0x41>")) == "A"
    assert sentencepiece.token_bytes(sentencepiece.token_to_id("<0xE4>")) == b"\xe4"
    assert sentencepiece.token_text(sentencepiece.token_to_id("<0xE4>")) == "\ufffd"
    assert sentencepiece.token_text(1) == "<s>"
    for token_id in range(byte_level.vocab_size):
        expected = byte_level.decode([token_id], skip_special_tokens=False)
        assert byte_level.token_text(token_id) == expected
    assert byte_level.token_bytes(10**6) == b""


def test_lone_surrogates_are_refused(byte_level):
    with pytest.raises(InvalidRequestError, match="surrogates"):
        byte_level.encode("a\ud800b")
    with pytest.raises(InvalidRequestError, match="surrogates"):
        byte_level.encode_batch(["ok", "a\ud800b"])


def test_from_checkpoint():
    def checkpoint(text: str | None) -> Checkpoint:
        return Checkpoint(
            model="m",
            path=Path("/models/m"),
            weights_format="none",
            weight_files=(),
            config={},
            tokenizer_config={"bos_token": {"content": "<s>"}, "eos_token": "</s>"},
            tokenizer_json=text,
        )

    assert Tokenizer.from_checkpoint(checkpoint(None)) is None
    tokenizer = Tokenizer.from_checkpoint(checkpoint(byte_level_json()))
    assert tokenizer is not None
    assert (tokenizer.bos_token, tokenizer.eos_token_id) == ("<s>", 1)
    with pytest.raises(CheckpointError, match="/models/m"):
        Tokenizer.from_checkpoint(checkpoint("{}"))


def test_a_panic_of_the_library_is_an_error_of_the_file():
    layout = json.loads(byte_level_json())
    layout["model"]["continuing_subword_prefix"] = "x" * 20  # longer than what it is taken from
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be used"):
        Tokenizer(json.dumps(layout))


def test_a_panic_in_use_is_one_too():
    layout = json.loads(byte_level_json())
    layout["decoder"] = {"type": "Strip", "content": "h", "start": 1, "stop": 32}
    tokenizer = Tokenizer(json.dumps(layout))
    ids = tokenizer.encode("h")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be used"):
        tokenizer.decode(ids)
