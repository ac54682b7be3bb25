"""What must hold for every input, whatever the parser: only typed errors come out, memory stays in
proportion to the input, nothing hangs, and nothing but the given files is touched.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from octavo.errors import OctavoError

MAX_S = 5.0  # for one input
BASE_BYTES, BYTES_PER_INPUT_BYTE = 16 << 20, 256  # what Python and numpy may allocate
HEADROOM_BYTES = 3 << 30  # of address space, for all code together
_MEASURE_EVERY = 16  # tracemalloc makes an input several times slower

# Events of Python's audit hooks that no parser has any business to cause.
_FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")
_FORBIDDEN_PREFIXES = ("socket.", "ctypes.")
_STRICT = ("open", "import", "compile", "exec")

_watch = {"on": False, "strict": False}
_count = 0
_is_installed: list[bool] = []


class ViolationError(Exception):
    """An input made a parser do what it must not."""


class HangError(ViolationError):
    """One input took longer than `MAX_S`."""


@contextlib.contextmanager
def judged(num_input_bytes: int, *, strict: bool = False) -> Iterator[None]:
    """Run a parser on an input inside this: typed errors end the block, all else comes out.

    With `strict`, opening files, importing and running code are violations too.
    """
    global _count
    _count += 1
    measures = _count % _MEASURE_EVERY == 0 and not tracemalloc.is_tracing()
    if measures:
        tracemalloc.start()
    signal.setitimer(signal.ITIMER_REAL, MAX_S)
    _watch.update(on=True, strict=strict)
    try:
        yield
    except OctavoError as error:
        str(error).encode()  # it must be possible to print it
        if not str(error):
            raise ViolationError(f"{type(error).__name__} without a message") from error
    finally:
        _watch.update(on=False, strict=False)
        signal.setitimer(signal.ITIMER_REAL, 0)
        peak = tracemalloc.get_traced_memory()[1] if measures else 0
        if measures:
            tracemalloc.stop()
    bound = BASE_BYTES + BYTES_PER_INPUT_BYTE * num_input_bytes
    if peak > bound:
        raise ViolationError(f"{peak} bytes allocated for an input of {num_input_bytes}")


def expect(condition: bool, what: str) -> None:
    """Not `assert`: it must hold under -O, too."""
    if not condition:
        raise ViolationError(what)


def install() -> None:
    """Watch this process from now on: alarms, audit hooks, address space."""
    if _is_installed:
        return
    _is_installed.append(True)
    signal.signal(signal.SIGALRM, _on_alarm)
    sys.addaudithook(_on_event)  # for good
    limit_address_space()


def limit_address_space() -> None:
    """A ceiling above what is mapped now: a huge allocation fails, not the machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + HEADROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def scratch_folder() -> Path:
    """A folder for the inputs as files: in memory where the system has such a place."""
    shm = Path("/dev/shm")
    folder = tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None, prefix="octavo-fuzz-")
    _kept.append(folder)
    return Path(folder.name)


_kept: list[Any] = []  # removed with the process


def _on_alarm(signum: int, frame: FrameType | None) -> None:
    raise HangError(f"one input took longer than {MAX_S} s")


def _on_event(event: str, args: tuple[Any, ...]) -> None:
    if not _watch["on"]:
        return
    is_bad = event in _FORBIDDEN or event.startswith(_FORBIDDEN_PREFIXES)
    if is_bad or (_watch["strict"] and event in _STRICT):
        raise ViolationError(f"the input caused {event} {args!r:.200}")
