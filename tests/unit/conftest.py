"""Thousands of small tests: what each of them pays for what none of them needs is felt."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What was imported is there to stay: no collection needs to look at it, again and again."""
    gc.disable()
    try:
        result = yield
    finally:
        gc.freeze()
        gc.enable()
    return result


@pytest.fixture(scope="session", autouse=True)
def frugal_libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """HTTP clients read all authorities that they trust, for 50 ms each, and a process that imports
    numpy begins with a thread per core, for 100 ms: no test needs them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_DIR", str(tmp_path_factory.mktemp("authorities")))
        patch.setenv("OPENBLAS_NUM_THREADS", "1")
        yield


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A test that runs a command sets up logging, to a stderr that ends with the test."""
    loggers = [logging.getLogger(name) for name in ("octavo", "octavo.console")]
    before = [(one, one.handlers[:], one.propagate, one.level) for one in loggers]
    yield
    for one, handlers, propagate, level in before:
        one.handlers[:], one.propagate = handlers, propagate
        one.setLevel(level)


@pytest.fixture(scope="module", autouse=True)
def keep_what_is_left() -> None:
    """Likewise what the tests before have imported: an engine that closes collects, every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """With tiny tensors, more than one only makes them wait for each other."""
    torch = sys.modules.get("torch")
    if torch is None:  # a module that does not use it shall not pay for its import
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
