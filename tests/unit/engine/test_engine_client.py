"""`EngineClient` and `Mailbox` against a scripted other side: no engine, no child process."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from octavo.checkpoint import Checkpoint
from octavo.config import EngineArgs
from octavo.engine.client import EngineClient
from octavo.engine.messages import (
    Abort,
    Add,
    Configure,
    Failed,
    Outputs,
    Ready,
    Shutdown,
    ToServer,
    encode_frame,
    receive,
)
from octavo.engine.process import Mailbox
from octavo.errors import ConfigError, EngineDeadError, EngineError
from octavo.types import (
    EngineInfo,
    EngineRequest,
    Finish,
    SamplingParams,
    Started,
    StepOutputs,
    TokenLogprobs,
)

INFO = EngineInfo(
    model="m",
    architecture="X",
    dtype="float32",
    device="cpu",
    max_model_len=100,
    vocab_size=10,
    eos_token_ids=(),
    block_size=16,
    num_blocks=7,
    kv_capacity_tokens=112,
    max_num_seqs=3,
    max_num_batched_tokens=30,
    enable_prefix_caching=True,
)
CHECKPOINT = Checkpoint(
    model="m",
    path=Path("m"),
    weights_format="none",
    weight_files=(),
    config={},
    tokenizer_json="a long text",
    tokenizer_config={"x": 10**30},  # real ones hold such numbers; msgpack cannot
    chat_template="t",
)


class Child:
    """What stands for the child process's handle."""

    def __init__(self) -> None:
        self.returncode: int | None = None
        self.ended = threading.Event()

    def wait(self, timeout: float | None = None) -> int:
        assert self.ended.wait(10)
        assert self.returncode is not None
        return self.returncode


class Peer:
    """An engine process's place, and this side's view of it."""

    def __init__(self) -> None:
        self.sock, self.theirs = socket.socketpair()
        self.process = Child()
        self.is_stopped = False

    def send(self, *messages: ToServer) -> None:
        for message in messages:
            self.theirs.sendall(encode_frame(message))

    async def receive(self) -> Any:
        return await asyncio.to_thread(receive, self.theirs)

    def die(self, returncode: int = -9) -> None:
        self.process.returncode = returncode
        self.process.ended.set()
        self.theirs.close()

    def stop(self) -> None:
        self.is_stopped = True
        self.process.ended.set()


def request(request_id: int) -> EngineRequest:
    return EngineRequest(
        request_id=request_id, prompt_token_ids=(1,), params=SamplingParams(), max_total_len=9
    )


def with_client(body: Callable[[EngineClient, Peer], Awaitable[None]]) -> None:
    """Run `body` with a client that its peer has called ready."""

    async def main() -> None:
        peer = Peer()
        peer.send(Ready(INFO))
        client = await EngineClient.connect(peer, EngineArgs(), CHECKPOINT)  # type: ignore[arg-type]
        assert isinstance(await peer.receive(), Configure)
        try:
            await asyncio.wait_for(body(client, peer), 20)
        finally:
            if not peer.process.ended.is_set():
                peer.process.returncode = 0
            await client.close()
            assert peer.is_stopped
            peer.theirs.close()

    asyncio.run(main())


def test_the_engine_is_not_sent_what_it_does_not_need() -> None:
    async def main() -> None:
        peer = Peer()
        peer.send(Ready(INFO))
        client = await EngineClient.connect(peer, EngineArgs(), CHECKPOINT)  # type: ignore[arg-type]
        configure = await peer.receive()
        assert isinstance(configure, Configure)
        assert configure.checkpoint.tokenizer_json is None
        assert configure.checkpoint.chat_template is None
        assert configure.checkpoint.tokenizer_config == {}
        assert client.info == INFO
        await client.close()
        peer.theirs.close()

    asyncio.run(main())


def test_outputs_reach_their_streams_and_merge() -> None:
    async def body(client: EngineClient, peer: Peer) -> None:
        seen: list[StepOutputs] = []
        client.add_listener(seen.append)
        ids = [client.next_request_id() for _ in range(2)]
        one, two = (client.submit(request(i)) for i in ids)
        assert client.num_live == 2
        assert [(await peer.receive()).request.request_id for _ in range(2)] == ids
        chosen = TokenLogprobs((5,), (-1.0,), 1)
        peer.send(
            Outputs(
                StepOutputs(
                    request_ids=ids,
                    token_ids=[5, 6],
                    started=[Started(ids[0], 16, 0.5)],
                    logprobs={ids[0]: chosen},
                    prompt_logprobs={ids[0]: [chosen, chosen]},
                )
            ),
            Outputs(StepOutputs(request_ids=[ids[0], 99], token_ids=[7, 8])),
            Outputs(StepOutputs(finished=[Finish(ids[0], "stop"), Finish(99, "stop")])),
        )
        while len(seen) < 3:
            await asyncio.sleep(0.001)
        update = await one.next()
        assert update.token_ids == [5, 7]
        assert update.logprobs == [chosen]
        assert update.prompt_logprobs == [chosen, chosen]
        assert update.started == Started(ids[0], 16, 0.5)
        assert update.finish == Finish(ids[0], "stop")
        assert (await two.next()).token_ids == [6]
        assert client.num_live == 1

    with_client(body)


def test_abort_sends_only_what_is_live() -> None:
    async def body(client: EngineClient, peer: Peer) -> None:
        client.submit(request(1))
        assert isinstance(await peer.receive(), Add)
        client.abort([55])  # says nothing
        client.abort([1, 55])
        assert await peer.receive() == Abort([1])

    with_client(body)


def test_an_idle_engine_is_never_called_stalled() -> None:
    async def body(client: EngineClient, peer: Peer) -> None:
        await asyncio.sleep(0.02)
        assert time.monotonic() - client.last_progress_s < 0.01
        client.submit(request(1))
        await asyncio.sleep(0.02)
        assert time.monotonic() - client.last_progress_s >= 0.02

    with_client(body)


@pytest.mark.parametrize(
    ("messages", "returncode", "cause"),
    [
        ([], -9, "signal 9"),
        ([], 3, "status 3"),
        ([Failed("RuntimeError", "RuntimeError: out of luck")], 1, "out of luck"),
    ],
)
def test_death_ends_every_stream(messages: list[ToServer], returncode: int, cause: str) -> None:
    async def body(client: EngineClient, peer: Peer) -> None:
        streams = [client.submit(request(i)) for i in (1, 2)]
        peer.send(*messages)
        peer.die(returncode)
        for stream in streams:
            update = await stream.next()
            assert update.finish is not None
            assert update.finish.reason == "error"
            assert cause in update.finish.message
        assert not client.is_alive
        assert client.num_live == 0
        with pytest.raises(EngineDeadError, match=cause):
            client.submit(request(3))
        client.abort([1])

    with_client(body)


def test_a_message_that_makes_no_sense_ends_every_stream() -> None:
    async def body(client: EngineClient, peer: Peer) -> None:
        stream = client.submit(request(1))
        peer.theirs.sendall(b"\x00\x00\x00\x01\xc1")
        update = await stream.next()
        assert update.finish is not None
        assert "cannot be taken in" in update.finish.message
        assert not client.is_alive

    with_client(body)


def test_close_ends_every_stream_and_says_shutdown() -> None:
    async def main() -> None:
        peer = Peer()
        peer.send(Ready(INFO))
        client = await EngineClient.connect(peer, EngineArgs(), CHECKPOINT)  # type: ignore[arg-type]
        stream = client.submit(request(1))
        await client.close()
        assert (await stream.next()).finish is not None
        received = [await peer.receive() for _ in range(3)]
        assert received[-1] == Shutdown()
        peer.theirs.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("message", "error", "says"),
    [
        (Failed("ConfigError", "no room"), ConfigError, "no room"),
        (Failed("MemoryError", "MemoryError: gone"), EngineError, "gone"),
        (Failed("os", "a name that is no error"), EngineError, "no error"),
        (None, EngineDeadError, "signal 9"),
    ],
)
def test_a_start_that_fails_says_why(
    message: ToServer | None, error: type[Exception], says: str
) -> None:
    async def main() -> None:
        peer = Peer()
        connecting = asyncio.create_task(
            EngineClient.connect(peer, EngineArgs(), CHECKPOINT)  # type: ignore[arg-type]
        )
        assert isinstance(await peer.receive(), Configure)
        if message is not None:
            peer.send(message)
        peer.die()
        with pytest.raises(error, match=says):
            await connecting
        assert peer.is_stopped

    asyncio.run(main())


# ---- the engine's end


def test_the_mailbox_passes_messages_both_ways() -> None:
    ours, theirs = socket.socketpair()
    mailbox = Mailbox(theirs)
    ours.sendall(encode_frame(Configure(EngineArgs(), _bare())) + encode_frame(Abort([1])))
    assert isinstance(mailbox.receive(), Configure)
    assert list(mailbox.drain(wait=True)) == [Abort([1])]
    assert list(mailbox.drain(wait=False)) == []
    for _ in range(3):
        mailbox.send(Failed("X", "y" * 100_000))
    reader = threading.Thread(target=mailbox.close)
    reader.start()
    received = b""
    while len(received) < 3 * len(encode_frame(Failed("X", "y" * 100_000))):
        received += ours.recv(1 << 16)
    reader.join(10)
    assert not reader.is_alive()
    ours.close()
    assert mailbox.receive() is None
    theirs.close()


def test_a_message_that_cannot_be_read_ends_the_mailbox() -> None:
    ours, theirs = socket.socketpair()
    mailbox = Mailbox(theirs)
    ours.sendall(b"\x00\x00\x00\x01\xc1")
    assert mailbox.receive() is None
    mailbox.close()
    ours.close()
    theirs.close()


def test_a_server_that_is_gone_does_not_hold_up_the_end() -> None:
    ours, theirs = socket.socketpair()
    mailbox = Mailbox(theirs)
    ours.close()
    mailbox.send(Failed("X", "y"))
    mailbox.close()
    assert mailbox.receive() is None
    theirs.close()


def _bare() -> Checkpoint:
    return Checkpoint(model="m", path=Path("m"), weights_format="none", weight_files=(), config={})
