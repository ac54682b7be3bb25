"""`Connection` and `Mailbox` against a scripted other side: no engine, no child process."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from octavo.checkpoint import Checkpoint
from octavo.config import EngineArgs
from octavo.engine import client
from octavo.engine.client import Connection
from octavo.engine.messages import (
    Abort,
    Configure,
    Failed,
    Outputs,
    Ping,
    Pong,
    Ready,
    Shutdown,
    ToServer,
    encode_frame,
    receive,
)
from octavo.engine.process import Mailbox
from octavo.engine.supervisor import _start_s
from octavo.errors import ConfigError, EngineDeadError, EngineError
from octavo.types import (
    EngineInfo,
    StepOutputs,
)

INFO = EngineInfo(
    model="m",
    architecture="X",
    dtype="float32",
    device="cpu",
    max_model_len=100,
    vocab_size=10,
    eos_token_ids=(),
    kv_cache_dtype="float32",
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
        self.num_kills = 0

    def kill(self) -> None:
        self.num_kills += 1

    def poll(self) -> int | None:
        return self.returncode


class Peer:
    """An engine process's place, and this side's view of it."""

    def __init__(self) -> None:
        self.sock, self.theirs = socket.socketpair()
        self.process = Child()
        self.is_stopped = False
        self.num_dumps = 0

    def send(self, *messages: ToServer) -> None:
        for message in messages:
            self.theirs.sendall(encode_frame(message))

    async def receive(self) -> Any:
        return await asyncio.to_thread(receive, self.theirs)

    def die(self, returncode: int = -9) -> None:
        self.process.returncode = returncode
        self.theirs.close()

    def kill(self) -> None:
        self.is_stopped = True
        self.sock.close()

    def dump_stacks(self) -> None:
        self.num_dumps += 1

    def stop(self) -> None:
        self.is_stopped = True
        self.sock.close()

    def autopsy(self) -> None:
        self.is_stopped = True
        self.sock.close()


async def connect(peer: Peer) -> Connection:
    return await Connection.open(peer, EngineArgs(), CHECKPOINT)  # type: ignore[arg-type]


def with_connection(body: Callable[[Connection, Peer], Awaitable[None]]) -> None:
    """Run `body` with a connection whose peer has called itself ready."""

    async def main() -> None:
        peer = Peer()
        peer.send(Ready(INFO))
        connection = await connect(peer)
        assert isinstance(await peer.receive(), Configure)
        await asyncio.wait_for(body(connection, peer), 20)
        await connection.close()
        assert peer.is_stopped
        peer.theirs.close()

    asyncio.run(main())


def test_the_engine_is_not_sent_what_it_does_not_need() -> None:
    async def main() -> None:
        peer = Peer()
        peer.send(Ready(INFO))
        connection = await connect(peer)
        configure = await peer.receive()
        assert isinstance(configure, Configure)
        assert configure.checkpoint.tokenizer_json is None
        assert configure.checkpoint.chat_template is None
        assert configure.checkpoint.tokenizer_config == {}
        assert connection.info == INFO
        await connection.close()
        assert await peer.receive() == Shutdown()
        peer.theirs.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("messages", "returncode", "cause"),
    [
        ([], -9, "signal 9"),
        ([], 3, "status 3"),
        ([Failed("RuntimeError", "RuntimeError: out of luck")], 1, "out of luck"),
    ],
)
def test_messages_are_taken_until_the_end_and_its_cause(
    messages: list[ToServer], returncode: int, cause: str
) -> None:
    async def body(connection: Connection, peer: Peer) -> None:
        outputs = Outputs(StepOutputs(request_ids=[3], token_ids=[4]))
        peer.send(outputs, Pong(), *messages)
        peer.die(returncode)
        taken: list[ToServer] = []
        last_words = await connection.listen(taken.append)
        assert cause in (await connection.autopsy(last_words)).cause
        assert taken == [outputs, Pong()]
        assert peer.is_stopped

    with_connection(body)


def test_a_message_that_makes_no_sense_ends_the_connection() -> None:
    async def body(connection: Connection, peer: Peer) -> None:
        peer.theirs.sendall(b"\x00\x00\x00\x01\xc1")
        assert "cannot be taken in" in await connection.listen(lambda message: None)

    with_connection(body)


def test_a_kill_asks_for_stacks_first_and_names_its_own_cause() -> None:
    async def body(connection: Connection, peer: Peer) -> None:
        killing = asyncio.create_task(connection.kill("It stood still."))
        await asyncio.sleep(0.01)
        assert (peer.num_dumps, peer.process.num_kills) == (1, 0)
        last_words = await connection.listen(lambda message: None)  # it need not even end
        await killing
        assert peer.process.num_kills == 1
        assert (await connection.autopsy(last_words)).cause == "It stood still."

    with_connection(body)


def test_a_slow_start_is_waited_for_as_long_as_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_START_PING_S", 0.05)

    async def main() -> None:
        peer = Peer()
        opening = Connection.open(peer, EngineArgs(), CHECKPOINT, silence_s=0.3)  # type: ignore[arg-type]
        connecting = asyncio.create_task(opening)
        assert isinstance(await peer.receive(), Configure)
        begun_s = time.monotonic()
        for _ in range(10):
            assert await peer.receive() == Ping()
            peer.send(Pong())
        assert time.monotonic() - begun_s > 0.3  # it asks every 0.05 s, however fast the answer
        with pytest.raises(EngineDeadError, match="has not answered"):
            await connecting
        assert peer.is_stopped
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
        connecting = asyncio.create_task(connect(peer))
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
    ours.sendall(encode_frame(Ping()))
    pong = encode_frame(Pong())
    assert ours.recv(len(pong), socket.MSG_WAITALL) == pong
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


def test_a_restart_may_take_as_long_as_packing_the_weights_again() -> None:
    found = dataclasses.replace(INFO, startup_s={"total": 2.0, "saved": 96.0, "load": 0.1})
    assert _start_s(found) == 98.0
    assert _start_s(INFO) == 0.0
