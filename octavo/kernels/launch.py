"""How Octavo's Triton kernels are launched, whatever they compute."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from octavo.log import get_logger

logger = get_logger(__name__)

# Let a kernel start while the one before it drains: each waits (`gdc_wait`) before it touches
# anything that an earlier kernel wrote. Hopper and later, CUDA only. `benchmarks/kernels`
# measures with and without.
programmatic_launch = True


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def takes(x: torch.Tensor) -> bool:
    """Whether the Triton kernels should be given x: some rows on a GPU, of a dtype they know."""
    return x.is_cuda and x.ndim == 2 and x.itemsize <= 4 and _has_triton()


@functools.cache
def _can_overlap(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def overlaps(x: torch.Tensor) -> bool:
    """Whether kernels on x's device should be launched so."""
    return programmatic_launch and _can_overlap(x.device)


def copies_tiles(device: torch.device) -> bool:
    """Whether the device has an engine that copies tiles to its processors: Hopper and later."""
    return _can_overlap(device)


@functools.cache
def has_warpgroups(device: torch.device) -> bool:
    """Whether groups of four warps can share a matrix instruction: Hopper, and nothing since."""
    return _can_overlap(device) and torch.cuda.get_device_capability(device)[0] == 9


def is_amd() -> bool:
    """Whether GPUs are AMD's, which have 64 KiB of shared memory per program, not 227."""
    return torch.version.hip is not None


@functools.cache
def load_gluon(name: str, what: str) -> ModuleType | None:
    """The kernels in `octavo.kernels.NAME`. None where this Triton's Gluon, which is not yet
    settled, has other names than they use: then the log says what is slower for it.
    """
    try:
        return importlib.import_module(f"octavo.kernels.{name}")
    except (ImportError, AttributeError) as error:
        logger.warning("%s more slowly than they could: %s", what, error)
        return None


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; for the interpreter, as if it were an H100."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


_compiling = threading.Lock()  # held while `JITFunction.run` is replaced


class _Compilers(ThreadPoolExecutor):
    """Compiles kernels and loads them, for which Triton has a launcher built by the C compiler."""

    def submit(self, compile_kernel: Callable[[], Any]) -> Future[Any]:  # type: ignore[override]
        def compile_and_load() -> Any:
            kernel = compile_kernel()
            _ = kernel.run
            return kernel

        return super().submit(compile_and_load)


@contextmanager
def compiling(device: torch.device | None = None) -> Iterator[None]:
    """Launch nothing in here: compile what would be launched, each kernel once, in threads, for
    `device` or torch's first. Other threads launch as ever.
    """
    from triton import AsyncCompileMode
    from triton.runtime.jit import JITFunction

    own_thread = threading.get_ident()
    with _compiling:
        launching = JITFunction.run

        def run(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
            warmup = warmup or threading.get_ident() == own_thread
            return launching(self, *args, warmup=warmup, **kwargs)

        JITFunction.run = run
        try:
            set_device = functools.partial(torch.cuda.set_device, device) if device else None
            compilers = _Compilers(thread_name_prefix="compile", initializer=set_device)
            with compilers as pool, AsyncCompileMode(pool):
                yield
        finally:
            JITFunction.run = launching


def options(overlap: bool, num_warps: int, num_stages: int = 2) -> dict[str, int | bool]:
    """Keyword arguments of a launch. The option exists on CUDA alone, so it is left out if off."""
    chosen: dict[str, int | bool] = {"num_warps": num_warps, "num_stages": num_stages}
    return {**chosen, "launch_pdl": True} if overlap else chosen
