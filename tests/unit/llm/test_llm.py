"""`LLM` on a tiny model with random weights: what goes in, what comes out, in which order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_folder import write_tiny_folder

from octavo import LLM, SamplingParams
from octavo.errors import ConfigError, ContextLengthError, EngineError, InvalidRequestError
from octavo.types import RequestOutput

OPTIONS: dict[str, Any] = {
    "load_format": "dummy",
    "num_threads": 1,
    "num_gpu_blocks_override": 64,
    "max_num_batched_tokens": 64,
    "quantization": "none",
}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), **OPTIONS) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_is_left(llm: LLM) -> Iterator[None]:
    yield
    assert not llm._engine().has_work
    assert not llm._owners
    llm._engine().check_integrity()


def generate(llm: LLM, prompts: Any, params: Any = GREEDY, **options: Any) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False, **options)


def test_every_way_to_write_a_prompt(llm: LLM) -> None:
    text = "hello world"
    ids = llm.get_tokenizer().encode(text)
    ways = [text, ids, {"prompt": text}, {"prompt_token_ids": ids, "cache_salt": "s"}]
    [one], [two], *rest = (generate(llm, way) for way in (text, ids))
    assert rest == []
    together = generate(llm, ways)
    assert {tuple(o.outputs[0].token_ids) for o in [one, two, *together]} == {
        tuple(one.outputs[0].token_ids)
    }
    assert [o.prompt for o in together] == [text, None, text, None]
    assert all(o.prompt_token_ids == ids for o in together)
    assert len(one.outputs[0].token_ids) == 8
    assert one.outputs[0].finish_reason == "length"
    assert one.finished


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [[i + 1] * (1 + i * 5 % 17) for i in range(20)]
    params = [GREEDY.replace(max_tokens=1 + i * 7 % 11) for i in range(20)]
    together = generate(llm, prompts, params)
    assert [o.request_id for o in together] == [str(i) for i in range(20)]
    for prompt, param, output in zip(prompts, params, together, strict=True):
        assert output.prompt_token_ids == prompt
        [alone] = generate(llm, [prompt], param)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids


def test_no_prompts_no_outputs(llm: LLM) -> None:
    assert generate(llm, []) == []


def test_n_outputs_of_a_seed_are_repeatable_and_differ(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=7, max_tokens=6, ignore_eos=True)
    [first], [again] = generate(llm, [[5, 6]], params), generate(llm, [[5, 6]], params)
    tokens = [choice.token_ids for choice in first.outputs]
    assert [choice.index for choice in first.outputs] == [0, 1, 2, 3]
    assert len(set(map(tuple, tokens))) == 4
    assert [choice.token_ids for choice in again.outputs] == tokens


def test_a_repeated_prompt_comes_from_the_cache(llm: LLM) -> None:
    prompt = [9] * 40
    generate(llm, [prompt])
    [again] = generate(llm, [prompt])
    assert again.num_cached_tokens == 32
    [salted] = generate(llm, {"prompt_token_ids": prompt, "cache_salt": "mine"})
    assert salted.num_cached_tokens == 0


def test_each_output_has_its_own_times(llm: LLM) -> None:
    params = [GREEDY.replace(max_tokens=1), GREEDY.replace(max_tokens=60)]
    short, long = (o.metrics for o in generate(llm, [[1, 2], [3, 4]], params))
    assert 0 < short.first_token_s <= short.e2e_s < long.e2e_s
    assert short.queue_s >= 0


def test_streams_may_be_open_side_by_side(llm: LLM) -> None:
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    expected = [o.outputs[0].token_ids for o in generate(llm, prompts)]
    streams = [llm.stream(prompt, GREEDY) for prompt in prompts]
    got: list[list[int]] = [[] for _ in prompts]
    for _ in range(8):
        for tokens, stream in zip(got, streams, strict=True):
            tokens += next(stream).token_ids
    assert got == expected
    assert all(next(stream, None) is None for stream in streams)


def test_a_stream_stays_open_while_others_are_served(llm: LLM) -> None:
    [expected] = generate(llm, [[1, 2, 3]])
    stream = llm.stream([1, 2, 3], GREEDY)
    tokens = list(next(stream).token_ids)
    generate(llm, [[4, 5], [6]])
    closed = llm.stream([7, 7], GREEDY)
    next(closed)
    closed.close()
    for delta in stream:
        tokens += delta.token_ids
    assert tokens == expected.outputs[0].token_ids


def test_ctrl_c_leaves_a_working_engine(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [3] * 100
    [expected] = generate(llm, {"prompt_token_ids": prompt, "cache_salt": "a"})
    other = llm.stream([1, 2, 3], GREEDY)
    next(other)
    runner = llm._engine()._runner
    submit = runner.submit

    def interrupted(plan: Any) -> Any:
        monkeypatch.setattr(runner, "submit", submit)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(llm, {"prompt_token_ids": prompt, "cache_salt": "b"})
    with pytest.raises(EngineError, match="another call"):
        list(other)
    [output] = generate(llm, {"prompt_token_ids": prompt, "cache_salt": "b"})
    assert output.num_cached_tokens == 0
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids


def test_stop_strings_and_stop_tokens(llm: LLM) -> None:
    [free] = generate(llm, [[5, 5]])
    token = free.outputs[0].token_ids[2]
    first = free.outputs[0].token_ids.index(token)
    [stopped] = generate(llm, [[5, 5]], GREEDY.replace(stop_token_ids=[token]))
    assert stopped.outputs[0].finish_reason == "stop"
    assert stopped.outputs[0].stop_reason == token
    assert stopped.outputs[0].token_ids == free.outputs[0].token_ids[: first + 1]
    text = free.outputs[0].text
    if text:
        [cut] = generate(llm, [[5, 5]], GREEDY.replace(stop=text[-1]))
        assert cut.outputs[0].text == text[: text.index(text[-1])]


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", InvalidRequestError, "empty"),
        ({}, InvalidRequestError, "exactly one"),
        ({"prompt": "x", "prompt_token_ids": [1]}, InvalidRequestError, "exactly one"),
        ({"prompt": "x", "extra": 1}, InvalidRequestError, "extra"),
        ({"prompt": 5}, InvalidRequestError, "string"),
        ({"prompt_token_ids": "abc"}, InvalidRequestError, "list of token ids"),
        ({"prompt_token_ids": 5}, InvalidRequestError, "list of token ids"),
        ({"prompt": "x", "cache_salt": 5}, InvalidRequestError, "cache_salt"),
        (["a"], InvalidRequestError, "integers"),
        (5, InvalidRequestError, "list of token ids"),
        ([512], InvalidRequestError, "512"),
        ([-1], InvalidRequestError, "-1"),
        ([1] * 128, ContextLengthError, "128"),
    ],
    ids=repr,
)
def test_a_bad_prompt_is_named_and_nothing_runs(
    llm: LLM, prompt: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        generate(llm, [[1, 2], prompt])


def test_lists_must_be_as_long_as_the_prompts(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="sampling_params has 1 entries for 2 prompts"):
        generate(llm, [[1], [2]], [GREEDY])


def test_priorities_need_their_policy(llm: LLM, folder: Path) -> None:
    with pytest.raises(ConfigError, match="scheduling_policy"):
        generate(llm, [[1], [2]], priority=[1, 0])
    with LLM(str(folder), **OPTIONS, scheduling_policy="priority", max_num_seqs=1) as urgent:
        first, second = generate(urgent, [[1], [2]], priority=[1, 0])
        assert second.metrics.e2e_s < first.metrics.e2e_s
        with pytest.raises(ConfigError, match="priority has 1 entries"):
            generate(urgent, [[1], [2]], priority=[1])


def test_stream_is_for_one_output(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="n must be 1"):
        llm.stream([1], SamplingParams(n=2))


def test_chat_uses_the_models_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    [one] = llm.chat(messages, GREEDY, use_tqdm=False)
    assert llm.get_tokenizer().decode(one.prompt_token_ids) == "user: hi\n"
    assert len(llm.chat([messages, messages], GREEDY, use_tqdm=False)) == 2
    with pytest.raises(InvalidRequestError, match="image_url"):
        llm.chat([{"role": "user", "content": [{"type": "image_url"}]}], GREEDY)


def test_without_a_tokenizer_token_ids_still_work(tmp_path: Path, llm: LLM) -> None:
    bare = write_tiny_folder(tmp_path / "bare", has_tokenizer=False)
    with LLM(str(bare), **OPTIONS) as plain:
        [output] = generate(plain, [[5, 5]])
        assert output.outputs[0].token_ids == generate(llm, [[5, 5]])[0].outputs[0].token_ids
        assert output.outputs[0].text == ""
        with pytest.raises(ConfigError, match="no tokenizer"):
            generate(plain, "text")
        with pytest.raises(InvalidRequestError, match="no chat template"):
            plain.chat([{"role": "user", "content": "hi"}])


def test_a_closed_llm_says_so(folder: Path) -> None:
    with LLM(str(folder), **OPTIONS) as llm:
        pass
    for use in (lambda: llm.generate([1]), lambda: llm.info):
        with pytest.raises(EngineError, match="closed"):
            use()


def test_a_stream_of_a_closed_llm_says_so(folder: Path) -> None:
    llm = LLM(str(folder), load_format="dummy")
    stream = llm.stream([5, 6, 7], SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        list(stream)


def test_a_seeded_llm_repeats_itself_and_prompts_differ(folder: Path) -> None:
    params = SamplingParams(temperature=2.0, max_tokens=12, ignore_eos=True)
    runs = []
    for _ in range(2):
        with LLM(str(folder), load_format="dummy", seed=3) as llm:
            outputs = llm.generate([[5, 6, 7], [5, 6, 7]], params, use_tqdm=False)
            runs.append([output.outputs[0].token_ids for output in outputs])
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


def test_the_progress_bar_counts_each_prompt_once(
    llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.generate([5, 6, 7], SamplingParams(n=3, max_tokens=4, ignore_eos=True))
    assert "1/1" in capsys.readouterr().err


def test_options_are_checked_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="max_model_len"):
        LLM("no-such-model", max_modl_len=5)
