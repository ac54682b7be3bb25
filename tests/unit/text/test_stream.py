from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_tokenizers import byte_level_json

from octavo.text.stream import OutputAssembler, prompt_logprob_entries
from octavo.text.tokenizer import Tokenizer
from octavo.types import Finish, SamplingParams, TokenLogprobs

TOKENIZER = Tokenizer(byte_level_json())
PROMPT = TOKENIZER.encode("hello")
EOS = 1


def run(params, ids, finish=None, size=1):
    """All pushes of an output, `size` tokens each; the last one carries `finish`."""
    assembler = OutputAssembler(params, TOKENIZER, PROMPT)
    deltas = []
    for start in range(0, len(ids), size):
        last = start + size >= len(ids)
        deltas.append(assembler.push(ids[start : start + size], [], finish if last else None))
        if assembler.stopped:
            break
    return assembler, deltas


@pytest.mark.parametrize("size", [1, 2, 100])
def test_plain(size):
    ids = TOKENIZER.encode(" world 你好")
    assembler, deltas = run(SamplingParams(), ids, Finish(0, "length"), size)
    assert assembler.text == "".join(delta.text for delta in deltas) == " world 你好"
    completion = assembler.completion(3)
    assert (completion.index, completion.token_ids) == (3, ids)
    assert (completion.finish_reason, completion.stop_reason) == ("length", None)
    assert completion.logprobs is completion.cumulative_logprob is None
    assert deltas[-1].finish_reason == "length"
    assert not assembler.stopped


def test_eos_is_a_token_but_no_text():
    ids = [*TOKENIZER.encode(" a"), EOS]
    for options in ({}, {"skip_special_tokens": False}):
        assembler, deltas = run(SamplingParams(**options), ids, Finish(0, "stop"), 100)
        assert assembler.text == " a"
        assert assembler.completion().token_ids == ids
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", None)
    shown = SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True)
    assert run(shown, ids, Finish(0, "stop"))[0].text == " a</s>"


def test_stop_token():
    ids = TOKENIZER.encode(" a.")
    assembler, _ = run(SamplingParams(), ids, Finish(0, "stop", stop_token_id=ids[-1]))
    assert assembler.text == TOKENIZER.decode(ids[:-1])
    assert assembler.completion().stop_reason == ids[-1]


@given(size=st.integers(1, 30), include=st.booleans())
def test_stop_string_drops_the_tokens_after_it(size, include):
    ids = TOKENIZER.encode("hello world the END of it")
    params = SamplingParams(stop=["END", "zzz"], include_stop_str_in_output=include)
    assembler, deltas = run(params, ids, Finish(0, "length"), size)
    assert assembler.stopped
    assert assembler.text == "".join(d.text for d in deltas)
    assert assembler.text == "hello world the " + ("END" if include else "")
    completion = assembler.completion()
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "END")
    assert TOKENIZER.decode(completion.token_ids).endswith("END")
    assert completion.token_ids == [i for d in deltas for i in d.token_ids]
    assert assembler.push([5], [], Finish(0, "abort")).token_ids == []
    assert assembler.completion().finish_reason == "stop"


def test_held_text_comes_out_at_the_finish():
    ids = TOKENIZER.encode("a EN")
    assembler, deltas = run(SamplingParams(stop="END"), ids, Finish(0, "length"))
    assert assembler.text == "a EN"
    assert "EN" in deltas[-1].text
    assert not assembler.stopped


def test_min_tokens_blinds_the_search():
    ids = TOKENIZER.encode("END of END")
    first = run(SamplingParams(stop="END"), ids, Finish(0, "length"))[0]
    assert first.text == ""
    late = run(SamplingParams(stop="END", min_tokens=4), ids, Finish(0, "length"))[0]
    assert late.text == "END of "


def test_without_detokenisation():
    assembler = OutputAssembler(SamplingParams(detokenize=False), TOKENIZER, PROMPT)
    assert assembler.push([5, 6], [], None).text == ""
    assert assembler.push([EOS], [], Finish(0, "stop")).token_ids == [EOS]
    assert assembler.completion().token_ids == [5, 6, EOS]
    assert OutputAssembler(SamplingParams(), None, PROMPT).push([5], [], None).text == ""


def test_finish_without_tokens():
    assembler = OutputAssembler(SamplingParams(), TOKENIZER, PROMPT)
    half = TOKENIZER.encode("𐍈")[:1]
    assert assembler.push(half, [], None).text == ""
    delta = assembler.push([], [], Finish(0, "abort"))
    assert (delta.text, delta.finish_reason) == ("\ufffd", "abort")


def test_logprobs():
    the, hello = TOKENIZER.encode("the")[0], TOKENIZER.encode("hello")[0]
    assembler = OutputAssembler(SamplingParams(logprobs=2), TOKENIZER, PROMPT)
    positions = [
        TokenLogprobs((hello, the, hello), (-2.0, -0.5, -2.0), 2),
        TokenLogprobs((the, hello), (-3.0, -1.0), 17),
    ]
    delta = assembler.push([hello, the], positions, None)
    assert delta.logprobs is not None
    first, second = delta.logprobs
    assert list(first) == [hello, the]
    assert (first[hello].rank, first[the].rank, second[the].rank) == (2, 1, 17)
    assert first[hello].decoded_token == TOKENIZER.token_text(hello)
    completion = assembler.completion()
    assert completion.logprobs == [first, second]
    assert completion.cumulative_logprob == -5.0
    entries = prompt_logprob_entries(positions, TOKENIZER)
    assert entries[0] is None
    assert entries[1:] == [first, second]


def test_logprobs_end_with_the_stop_string():
    ids = TOKENIZER.encode("a END b")
    positions = [TokenLogprobs((i,), (-1.0,), 1) for i in ids]
    assembler = OutputAssembler(SamplingParams(stop="END", logprobs=0), TOKENIZER, PROMPT)
    delta = assembler.push(ids, positions, None)
    assert delta.logprobs is not None
    assert len(delta.logprobs) == len(delta.token_ids) < len(ids)
