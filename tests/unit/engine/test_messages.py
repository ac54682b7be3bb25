"""Every message survives the trip through its frame."""

from __future__ import annotations

import dataclasses
import math
import socket
import threading
from pathlib import Path

import msgspec
import pytest

from octavo.checkpoint import Checkpoint
from octavo.config import EngineArgs
from octavo.engine import messages
from octavo.engine.messages import (
    Abort,
    Add,
    Configure,
    Failed,
    Outputs,
    Ready,
    Shutdown,
    encode_frame,
    frame_length,
    receive,
    to_engine_decoder,
    to_server_decoder,
)
from octavo.types import (
    EngineInfo,
    EngineRequest,
    Finish,
    SamplingParams,
    Started,
    StepOutputs,
    StepStats,
    TokenLogprobs,
)

PARAMS = SamplingParams(
    n=2,
    presence_penalty=0.5,
    frequency_penalty=-0.5,
    repetition_penalty=1.25,
    temperature=0.75,
    top_p=0.5,
    top_k=40,
    min_p=0.125,
    seed=-(2**63),
    stop=["end", "Ende 🙂"],
    stop_token_ids=[3, 4],
    ignore_eos=True,
    max_tokens=None,
    min_tokens=2,
    logprobs=5,
    prompt_logprobs=0,
    skip_special_tokens=False,
    spaces_between_special_tokens=False,
    include_stop_str_in_output=True,
    logit_bias={7: -100.0, 8: 2.5},
    allowed_token_ids=[1, 2, 7, 8],
    bad_words=["no", "never"],
)
REQUEST = EngineRequest(
    request_id=2**40,
    prompt_token_ids=(1, 2, 3),
    params=PARAMS,
    max_total_len=100,
    stop_token_ids=(0, 3),
    bad_words_token_ids=((5,), (6, 7)),
    seed=2**63 - 1,
    priority=-3,
    cache_salt="s\u00e4lz",
    arrival_s=12.5,
    deadline_s=20.25,
    client="tenant",
    output_token_ids=(4, 9),
)
CHECKPOINT = Checkpoint(
    model="org/model",
    path=Path("/models/a"),
    weights_format="gguf",
    weight_files=(Path("/models/a/x.gguf"), Path("/models/a/y.gguf")),
    config={"architectures": ["X"], "rope_scaling": {"factor": 2.0, "list": [1, None, True]}},
    generation_config={"eos_token_id": [1, 2]},
    tokenizer_config={"bos_token": {"content": "<s>"}},
    tokenizer_json="{}",
    chat_template="{{ messages }}",
)
INFO = EngineInfo(
    model="m",
    architecture="X",
    dtype="float32",
    device="cpu",
    max_model_len=100,
    vocab_size=10,
    eos_token_ids=(1, 2),
    kv_cache_dtype="float32",
    block_size=16,
    num_blocks=7,
    kv_capacity_tokens=112,
    max_num_seqs=3,
    max_num_batched_tokens=30,
    enable_prefix_caching=False,
    scheduling_policy="priority",
    startup_s={"load": 0.25},
    memory_bytes={"weights": 2**40},
)
OUTPUTS = StepOutputs(
    request_ids=[1, 2],
    token_ids=[30, 40],
    logprobs={2: TokenLogprobs((40, 41), (-0.5, -math.inf), 1)},
    prompt_logprobs={2: [TokenLogprobs((5,), (-1.5,), 12)]},
    chunks=[(2, 16), (5, 100)],
    started=[Started(2, 16, 0.125)],
    finished=[
        Finish(1, "stop", 30),
        Finish(2, "length"),
        Finish(3, "abort"),
        Finish(4, "error", None, "what happened"),
    ],
    stats=StepStats(num_running=2, kv_usage=0.5, step_s=0.01),
)


def payload(message: messages.ToEngine | messages.ToServer) -> bytes:
    frame = encode_frame(message)
    body = frame[messages.HEADER_BYTES :]
    assert frame_length(frame[: messages.HEADER_BYTES]) == len(body)
    return body


def test_the_samples_leave_no_field_at_its_default() -> None:
    """So that a field which is lost on the way shows."""
    for sample, skip in ((PARAMS, {"max_tokens", "detokenize"}), (REQUEST, set()), (INFO, set())):
        for field in dataclasses.fields(sample):  # type: ignore[arg-type]
            if field.default is not dataclasses.MISSING and field.name not in skip:
                assert getattr(sample, field.name) != field.default, field.name


@pytest.mark.parametrize(
    "message",
    [
        Configure(EngineArgs(model="x", max_model_len=5, async_scheduling=False), CHECKPOINT),
        Configure(EngineArgs(), CHECKPOINT),
        Add(REQUEST),
        Abort([1, 2**40]),
        Shutdown(),
    ],
    ids=lambda message: type(message).__name__,
)
def test_to_the_engine(message: messages.ToEngine) -> None:
    assert to_engine_decoder.decode(payload(message)) == message


def test_what_arrives_has_its_types() -> None:
    received = to_engine_decoder.decode(payload(Configure(EngineArgs(), CHECKPOINT)))
    assert isinstance(received, Configure)
    assert isinstance(received.checkpoint.path, Path)
    assert all(isinstance(path, Path) for path in received.checkpoint.weight_files)
    added = to_engine_decoder.decode(payload(Add(REQUEST)))
    assert isinstance(added, Add)
    assert isinstance(added.request.params, SamplingParams)
    assert added.request.params.logit_bias == {7: -100.0, 8: 2.5}
    assert isinstance(added.request.prompt_token_ids, tuple)


@pytest.mark.parametrize(
    "message",
    [Ready(INFO), Outputs(OUTPUTS), Outputs(StepOutputs()), Failed("ConfigError", "why")],
    ids=lambda message: type(message).__name__,
)
def test_to_the_server(message: messages.ToServer) -> None:
    assert to_server_decoder.decode(payload(message)) == message


def test_a_message_for_the_other_side_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        to_server_decoder.decode(payload(Shutdown()))
    with pytest.raises(msgspec.ValidationError):
        to_engine_decoder.decode(payload(Ready(INFO)))


def test_an_absurd_length_is_refused() -> None:
    with pytest.raises(ValueError, match="out of step"):
        frame_length(b"\xff\xff\xff\xff")


def test_frames_arrive_whole_however_the_socket_cuts_them() -> None:
    ours, theirs = socket.socketpair()
    long = dataclasses.replace(REQUEST, prompt_token_ids=tuple(range(300_000)))
    sent = [Add(long), Abort([1]), Add(REQUEST)]

    def send() -> None:
        with ours:
            for byte in b"".join(map(encode_frame, sent[1:])):
                ours.send(bytes([byte]))
            ours.sendall(encode_frame(sent[0]))

    thread = threading.Thread(target=send)
    thread.start()
    with theirs:
        assert [receive(theirs) for _ in range(3)] == [*sent[1:], sent[0]]
        assert receive(theirs) is None
    thread.join()


def test_a_stream_that_ends_within_a_frame_is_over() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(encode_frame(Abort([1]))[:-1])
        assert receive(theirs) is None
