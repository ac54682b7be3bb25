"""`launch.compiling` compiles what its own thread would launch, and nothing else."""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from octavo.kernels import launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each launch was to warm up alone."""
    seen: list[bool] = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *, warmup: seen.append(warmup))
    return seen


def in_thread(function) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_other_threads_launch_as_ever(launches: list[bool]) -> None:
    run = JITFunction.run
    with launch.compiling():
        JITFunction.run(None, warmup=False)
        in_thread(lambda: JITFunction.run(None, warmup=False))
    JITFunction.run(None, warmup=False)
    assert launches == [True, False, False]
    assert JITFunction.run is run


def test_two_at_once_leave_everything_as_it_was(launches: list[bool]) -> None:
    run = JITFunction.run
    inside = threading.Barrier(2, timeout=0.2)

    def compile_something() -> None:
        with launch.compiling():
            try:
                inside.wait()  # never both
            except threading.BrokenBarrierError:
                JITFunction.run(None, warmup=False)

    threads = [threading.Thread(target=compile_something) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert launches == [True, True]
    assert JITFunction.run is run
