from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples
from support.tiny_tokenizers import byte_level_json, sentencepiece_json

from octavo.text.detokenizer import _MAX_HELD_TOKENS, IncrementalDetokenizer
from octavo.text.tokenizer import Tokenizer

BYTE_LEVEL = Tokenizer(byte_level_json())
SENTENCEPIECE = Tokenizer(sentencepiece_json())
TEXTS = st.text(st.sampled_from("the hello ab\n.é你🎉👍🏽"), max_size=30)


def pieces(tokenizer, prompt, ids, cuts=(), **options):
    """Everything pushed in the groups that `cuts` make."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, **options)
    edges = [0, *sorted(c for c in cuts if c < len(ids)), len(ids)]
    out = [detokenizer.push(ids[a:b]) for a, b in pairwise(edges)]
    return [*out, detokenizer.flush()]


def in_context(tokenizer, prompt, ids, skip):
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    return tokenizer.decode([*prompt, *ids], skip_special_tokens=skip)[len(before) :]


@given(
    prompt=TEXTS,
    ids=st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=40),
    cuts=st.lists(st.integers(0, 40)),
    skip=st.booleans(),
)
def test_byte_level_equals_the_full_decode(prompt, ids, cuts, skip):
    """For any tokens, valid UTF-8 or not."""
    prompt_ids = BYTE_LEVEL.encode(prompt)
    out = pieces(BYTE_LEVEL, prompt_ids, ids, cuts, skip_special_tokens=skip)
    assert "".join(out) == in_context(BYTE_LEVEL, prompt_ids, ids, skip)


@given(prompt=TEXTS, text=TEXTS, cuts=st.lists(st.integers(0, 90)), skip=st.booleans())
def test_sentencepiece_equals_the_full_decode(prompt, text, cuts, skip):
    prompt_ids = [1, *SENTENCEPIECE.encode(prompt)]
    ids = SENTENCEPIECE.encode(text)
    out = pieces(SENTENCEPIECE, prompt_ids, ids, cuts, skip_special_tokens=skip)
    assert "".join(out) == in_context(SENTENCEPIECE, prompt_ids, ids, skip)


@given(
    ids=st.lists(
        st.integers(1, 20) | st.integers(0, SENTENCEPIECE.vocab_size - 1) | st.integers(260, 300),
        max_size=40,
    ),
    cuts=st.lists(st.integers(0, 40)),
    skip=st.booleans(),
)
def test_sentencepiece_does_not_depend_on_the_pushes(ids, cuts, skip):
    """Nor does a text change, once it is out; without bad bytes it equals the full decode."""
    prompt_ids = [1, *SENTENCEPIECE.encode("hello")]
    out = "".join(pieces(SENTENCEPIECE, prompt_ids, ids, cuts, skip_special_tokens=skip))
    assert out == "".join(pieces(SENTENCEPIECE, prompt_ids, ids, skip_special_tokens=skip))
    full = in_context(SENTENCEPIECE, prompt_ids, ids, skip)
    if "\ufffd" not in full:
        assert out == full


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE])
def test_half_a_character_is_held_back(tokenizer):
    detokenizer = IncrementalDetokenizer(tokenizer, tokenizer.encode("a"))
    ids = tokenizer.encode("𐍈", add_special_tokens=False)[-4:]
    assert [detokenizer.push([i]) for i in ids] == ["", "", "", "𐍈"]
    assert detokenizer.push(ids[:2]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_bad_bytes_do_not_spoil_their_neighbours():
    ids = [4 + byte for byte in "é".encode() + b"\xff" + "é".encode()]
    assert "".join(pieces(SENTENCEPIECE, [1], ids)) == "é\ufffdé"


def test_output_goes_on_within_a_character_of_the_prompt():
    ids = BYTE_LEVEL.encode("𐍈")
    assert "".join(pieces(BYTE_LEVEL, ids[:2], ids[2:])) == "𐍈"


def test_first_word_keeps_its_space_after_a_prompt():
    ids = SENTENCEPIECE.encode("the hello")
    assert "".join(pieces(SENTENCEPIECE, SENTENCEPIECE.encode("the"), ids)) == " the hello"
    assert "".join(pieces(SENTENCEPIECE, [1], ids)) == "the hello"


def test_the_window_is_bounded(monkeypatch):
    """An endless run of text that might be incomplete is neither held for ever nor decoded anew."""
    longest = 0
    decode = SENTENCEPIECE.decode

    def watched(ids, **options):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids, **options)

    monkeypatch.setattr(SENTENCEPIECE, "decode", watched)
    ids = SENTENCEPIECE.encode("the hello a b c " * 200, add_special_tokens=False)
    pieces(SENTENCEPIECE, [1], ids, cuts=range(len(ids)))
    assert longest <= 2 * _MAX_HELD_TOKENS


@pytest.mark.slow
@examples(200)
@given(data=st.data())
def test_the_real_tokenizer(smollm2_dir, data):
    tokenizer = _real(smollm2_dir)
    text = data.draw(st.text(max_size=60))
    ids = tokenizer.encode(text) + data.draw(st.lists(st.integers(0, 49151), max_size=20))
    cuts = data.draw(st.lists(st.integers(0, 80)))
    prompt = tokenizer.encode("Hello!")
    assert "".join(pieces(tokenizer, prompt, ids, cuts)) == in_context(tokenizer, prompt, ids, True)


_REAL: dict[str, Tokenizer] = {}


def _real(folder) -> Tokenizer:
    if "" not in _REAL:
        _REAL[""] = Tokenizer((folder / "tokenizer.json").read_text())
    return _REAL[""]
