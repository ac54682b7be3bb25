"""On a GPU weights are read while kernels compile: stubs stand in for both."""

from __future__ import annotations

import threading

import pytest
import torch

from octavo.platforms.cpu import CpuPlatform
from octavo.runner.runner import ModelRunner


class Failure(Exception):
    pass


class Runner(ModelRunner):
    """Nothing but the two jobs, each of which waits until the other has begun."""

    def __init__(self, kind: str = "cuda", load: object = None, compile_: object = None) -> None:
        self._device = torch.device(kind)
        self._platform = CpuPlatform()  # there need be no GPU
        self._both = threading.Barrier(2 if kind == "cuda" else 1, timeout=10)
        self._results = {"load": load, "compile": compile_}
        self.seen: dict[str, tuple[int, bool]] = {}
        self.stopped = False

    def _begin(self, job: str) -> None:
        self._both.wait()
        self.seen[job] = threading.get_ident(), torch.is_inference_mode_enabled()

    def _load(self, packed_model: object, progress: bool) -> None:
        self._begin("load")
        if isinstance(error := self._results["load"], BaseException):
            raise error

    def _compile_kernels(self, stop: threading.Event) -> None:
        self._begin("compile")
        if isinstance(error := self._results["compile"], BaseException):
            raise error
        if self._results["load"] is not None:
            self.stopped = stop.wait(10)

    def run(self) -> None:
        with torch.inference_mode():
            self._load_and_compile(None, False)


def test_both_at_once_and_loading_where_ctrl_c_arrives() -> None:
    runner = Runner()
    runner.run()
    (load_thread, load_infers), (compile_thread, compile_infers) = (
        runner.seen[job] for job in ("load", "compile")
    )
    assert load_thread == threading.get_ident() != compile_thread
    assert load_infers
    assert compile_infers


@pytest.mark.parametrize("error", [Failure("no such file"), KeyboardInterrupt()])
def test_nothing_more_is_compiled_for_weights_that_cannot_be_read(error: BaseException) -> None:
    runner = Runner(load=error)
    with pytest.raises(type(error)):
        runner.run()
    assert runner.stopped


def test_a_compiler_that_fails_is_heard() -> None:
    with pytest.raises(Failure, match="no compiler"):
        Runner(compile_=Failure("no compiler")).run()


def test_of_two_failures_the_weights_count() -> None:
    with pytest.raises(Failure, match="weights"):
        Runner(load=Failure("weights"), compile_=Failure("compiler")).run()


def test_a_cpu_compiles_nothing() -> None:
    runner = Runner("cpu")
    runner.run()
    assert set(runner.seen) == {"load"}
