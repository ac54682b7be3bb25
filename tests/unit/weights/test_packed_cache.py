"""The folder of packed weights: what is found there, who may write, and what must go."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from octavo.checkpoint.catalogue import packed_folder
from octavo.config.sections import ModelConfig
from octavo.errors import CheckpointError, WeightsError
from octavo.weights import packed_cache
from octavo.weights.packed import Packed
from octavo.weights.packed_cache import Keeper, PackedCache
from octavo.weights.packed_file import map_packed

SIZE = 200_000  # bytes of one model's tensors, about
NEVER = threading.Event()


class FakeModel:
    """Holds whatever it is loaded with, unless it is told to refuse it."""

    packing = "test-1"

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        data = torch.randint(256, (SIZE,), dtype=torch.uint8, generator=generator)
        self.tensors = {"w": Packed("Q8_0", (1, SIZE), data)}
        self.refuses = False

    def packed(self) -> dict[str, Packed]:
        return self.tensors

    def load_packed(self, tensors: dict[str, Packed]) -> None:
        if self.refuses:
            raise WeightsError("w is of another shape.")
        self.tensors = dict(tensors)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(os.urandom(1000))
    return make_config(path)


def make_config(path: Path) -> ModelConfig:
    return ModelConfig(
        model="org/tiny",
        path=path.parent,
        load_format="safetensors",
        weight_files=(path,),
        hf_config={"architectures": ["X"], "hidden_size": 8},
        architecture="X",
        dtype="float32",
        max_model_len=8,
        vocab_size=8,
        eos_token_ids=(),
        seed=0,
        packed_cache_bytes=1 << 30,
    )


@pytest.fixture
def log(caplog, monkeypatch):
    """What is logged; the command's own set-up, which other tests may have called, is undone."""
    monkeypatch.setattr(logging.getLogger("octavo"), "propagate", True)
    caplog.set_level(logging.INFO, logger="octavo")
    return caplog


def cache_of(config: ModelConfig, packing: str = "test-1") -> PackedCache:
    return PackedCache.of(config, packing)


def is_loaded(cache: PackedCache, expected: FakeModel) -> bool:
    model = FakeModel(seed=99)
    if cache.try_load(model) is None:
        return False
    assert torch.equal(model.tensors["w"].data, expected.tensors["w"].data)
    return True


def files() -> list[str]:
    return sorted(path.name for path in packed_folder().iterdir())


def test_what_is_kept_is_found_by_the_next(config, log):
    model, cache = FakeModel(), cache_of(config)
    assert cache.try_load(FakeModel()) is None
    cache.keep(model.packed(), NEVER)
    assert is_loaded(cache_of(config), model)
    assert cache_of(config).try_load(FakeModel()).num_bytes == cache.path.stat().st_size
    assert files() == [".lock", cache.path.name]
    assert cache.path.name.startswith("tiny-")
    assert len(log.messages) == 1
    assert "kept" in log.messages[0]
    cache.keep(model.packed(), NEVER)  # it is there: nothing to do
    assert len(log.messages) == 1


def test_the_keeper_does_it_in_a_thread(config):
    model, cache = FakeModel(), cache_of(config)
    keeper = Keeper(cache, model.packed())
    keeper.stop()  # before it has begun
    keeper = Keeper(cache, model.packed())
    keeper.start()
    keeper.stop()  # lets it finish
    assert is_loaded(cache, model)


@pytest.mark.parametrize(
    ("change", "packing"),
    [
        ({"hf_config": {"architectures": ["X"], "hidden_size": 9}}, "test-1"),
        ({"load_format": "gguf"}, "test-1"),
        ({}, "test-2"),
    ],
)
def test_everything_that_matters_is_part_of_the_key(config, change, packing):
    cache_of(config).keep(FakeModel().packed(), NEVER)
    other = cache_of(dataclasses.replace(config, **change), packing)
    assert other.path != cache_of(config).path
    assert not is_loaded(other, FakeModel())


def test_and_what_does_not_matter_is_not(config):
    cache_of(config).keep(FakeModel().packed(), NEVER)
    other = dataclasses.replace(config, seed=5, max_model_len=7, packed_cache_bytes=1)
    assert is_loaded(cache_of(other), FakeModel())


def test_another_version_packs_again(config, monkeypatch):
    cache_of(config).keep(FakeModel().packed(), NEVER)
    monkeypatch.setattr(packed_cache, "__version__", "9.9")
    assert not is_loaded(cache_of(config), FakeModel())


def test_a_checkpoint_that_changes_in_place_is_never_served_from_before(config):
    cache_of(config).keep(FakeModel().packed(), NEVER)
    path = config.weight_files[0]
    path.write_bytes(os.urandom(1000))
    assert not is_loaded(cache_of(config), FakeModel())
    cache_of(config).keep(FakeModel(1).packed(), NEVER)
    assert is_loaded(cache_of(config), FakeModel(1))


def test_a_checkpoint_that_changes_while_it_is_read_is_not_kept(config, log):
    cache = cache_of(config)  # the model's files are read between this and `keep`
    config.weight_files[0].write_bytes(os.urandom(1000))
    cache.keep(FakeModel().packed(), NEVER)
    assert files() == [".lock"]
    assert "have changed" in log.messages[-1]


def test_a_checkpoint_that_is_gone(config):
    config.weight_files[0].unlink()
    with pytest.raises(CheckpointError, match=r"m\.safetensors"):
        cache_of(config)


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "empty", "other key"])
def test_a_damaged_file_is_ignored_and_written_again(config, log, damage):
    model, cache = FakeModel(), cache_of(config)
    cache.keep(model.packed(), NEVER)
    whole = cache.path.read_bytes()
    flipped = bytearray(whole)
    flipped[60] ^= 1
    cache.path.write_bytes(
        {
            "cut": whole[:-1000],
            "flipped": bytes(flipped),
            "foreign": os.urandom(5000),
            "empty": b"",
            "other key": whole.replace(cache.key.encode(), b"0" * 64),
        }[damage]
    )
    assert cache.try_load(FakeModel()) is None
    assert "is removed" in log.messages[-1]
    cache.keep(model.packed(), NEVER)
    assert is_loaded(cache, model)


def test_what_does_not_fit_the_model_is_written_again(config, log):
    cache = cache_of(config)
    cache.keep(FakeModel().packed(), NEVER)
    stubborn = FakeModel()
    stubborn.refuses = True
    assert cache.try_load(stubborn) is None
    assert "of another shape" in log.messages[-1]
    cache.keep(FakeModel(1).packed(), NEVER)
    assert is_loaded(cache, FakeModel(1))


# ---- disks


def only_warning(messages: list[str]) -> str:
    [message] = messages
    assert "--packed-cache-bytes 0" in message
    assert "OCTAVO_HOME" in message
    return message


def test_a_disk_that_becomes_full_while_writing(config, log, monkeypatch):
    def write_packed(file, *args, saved_s):
        file.write(bytes(100_000))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packed_cache, "write_packed", write_packed)
    cache_of(config).keep(FakeModel().packed(), NEVER)
    assert files() == [".lock"]
    assert "No space left" in only_warning(log.messages)


def test_a_limit_of_the_process_on_the_size_of_files(config, log):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        cache_of(config).keep(FakeModel().packed(), NEVER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files() == [".lock"]
    assert "too large" in only_warning(log.messages)


def test_the_disk_is_not_filled_to_the_brim(config, log, monkeypatch):
    usage = shutil._ntuple_diskusage(1 << 40, 1 << 40, (1 << 30) + SIZE - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    cache_of(config).keep(FakeModel().packed(), NEVER)
    assert files() == [".lock"]
    assert "less than 1 GB free" in only_warning(log.messages)


def test_a_folder_that_cannot_be_made(config, home, log):
    home.write_text("a file")
    cache = cache_of(config)
    assert cache.try_load(FakeModel()) is None
    log.clear()
    cache.keep(FakeModel().packed(), NEVER)
    assert "directory" in only_warning(log.messages)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_still_serves(config, log):
    cache = cache_of(config)
    cache.keep(FakeModel().packed(), NEVER)
    packed_folder().chmod(0o500)
    try:
        assert is_loaded(cache, FakeModel())
        log.clear()
        config.weight_files[0].write_bytes(b"another")
        cache_of(config).keep(FakeModel().packed(), NEVER)
    finally:
        packed_folder().chmod(0o700)
    assert "Permission denied" in only_warning(log.messages)


def test_only_their_owner_may_read_them(config):
    config.weight_files[0].chmod(0o666)
    cache = cache_of(config)
    cache.keep(FakeModel().packed(), NEVER)
    assert cache.path.stat().st_mode & 0o777 == 0o600
    assert packed_folder().stat().st_mode & 0o777 == 0o700


def test_what_others_can_write_to_is_of_no_use(config, log):
    cache = cache_of(config)
    cache.keep(FakeModel().packed(), NEVER)
    cache.path.chmod(0o620)
    assert cache.try_load(FakeModel()) is None
    assert "other users can write to it" in log.messages[-1]
    assert not cache.path.exists()


def test_what_it_took_is_told_to_whom_it_saves_that(config):
    cache = cache_of(config)
    keeper = Keeper(cache, FakeModel().packed(), saved_s=12.5)
    keeper.start()
    keeper.stop()
    assert cache.try_load(FakeModel()).saved_s == 12.5


def test_a_lock_does_not_outlive_its_holder_in_a_child(config):
    packed_folder().mkdir(parents=True)
    with packed_cache._lock(packed_folder() / ".lock", NEVER):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        stop = threading.Event()
        threading.Timer(5, stop.set).start()
        with packed_cache._lock(packed_folder() / ".lock", stop) as is_mine:
            assert is_mine
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def keep_models(config: ModelConfig, *numbers: int) -> list[PackedCache]:
    """Each used a second after the one before."""
    caches = []
    for i in numbers:
        caches.append(cache_of(dataclasses.replace(config, hf_config={"i": i})))
        caches[-1].keep(FakeModel(i).packed(), NEVER)
        if caches[-1].path.exists():
            os.utime(caches[-1].path, (1000 + i, 1000 + i))
    return caches


def there(caches: list[PackedCache]) -> list[bool]:
    return [cache.path.exists() for cache in caches]


def test_what_was_used_longest_ago_goes_first(config):
    config = dataclasses.replace(config, packed_cache_bytes=3 * SIZE + 5000)
    caches = keep_models(config, 0, 1, 2)
    assert there(caches) == [True] * 3
    assert is_loaded(caches[0], FakeModel(0))  # now it is the youngest
    caches += keep_models(config, 3)
    assert there(caches) == [True, False, True, True]


def test_what_is_in_use_stays(config, log):
    config = dataclasses.replace(config, packed_cache_bytes=2 * SIZE + 5000)
    caches = keep_models(config, 0, 1)
    oldest = map_packed(caches[0].path, caches[0].key)
    caches += keep_models(config, 2)
    assert there(caches) == [True, False, True]
    youngest = map_packed(caches[2].path, caches[2].key)
    caches += keep_models(config, 3)
    assert there(caches) == [True, False, True, False]
    assert "--packed-cache-bytes" in log.messages[-1]
    del oldest, youngest


def test_what_is_larger_than_the_limit_costs_the_others_nothing(config, log):
    caches = keep_models(config, 0, 1)
    small = dataclasses.replace(config, packed_cache_bytes=SIZE - 1, hf_config={"i": "large"})
    cache_of(small).keep(FakeModel().packed(), NEVER)
    assert there([*caches, cache_of(small)]) == [True, True, False]
    assert "not kept" in log.messages[-1]


# ---- others who write


def test_many_writers_and_readers(config, monkeypatch):
    """Nobody ever sees a file that is not whole, and only one of them writes it."""
    model, writes, write = FakeModel(), [], packed_cache.write_packed

    def counted(*args, **kwargs):
        writes.append(1)
        return write(*args, **kwargs)

    monkeypatch.setattr(packed_cache, "write_packed", counted)
    caches = [cache_of(config) for _ in range(8)]
    stop, seen = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            seen.append(is_loaded(caches[0], model))

    threads = [
        threading.Thread(target=cache.keep, args=(model.packed(), NEVER)) for cache in caches
    ]
    reader = threading.Thread(target=read)
    for thread in [reader, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    deadline_s = time.monotonic() + 10
    while not (seen and seen[-1]) and time.monotonic() < deadline_s:
        time.sleep(0.001)
    stop.set()
    reader.join()
    assert len(writes) == 1
    assert seen == sorted(seen)  # not there, and then there for good
    assert seen[-1]
    assert files() == [".lock", caches[0].path.name]


def test_a_script_that_just_ends_leaves_its_weights(config):
    """The interpreter does not wait for threads like this one."""
    script = (
        "import sys, time; from pathlib import Path; import test_packed_cache as t\n"
        "free = t.shutil.disk_usage\n"
        "t.shutil.disk_usage = lambda folder: (time.sleep(0.5), free(folder))[1]\n"
        "cache = t.cache_of(t.make_config(Path(sys.argv[1])))\n"
        "t.Keeper(cache, t.FakeModel().packed()).start()"
    )
    here = Path(__file__)
    path = os.pathsep.join((str(here.parent), str(here.parents[3])))
    command = [sys.executable, "-c", script, str(config.weight_files[0])]
    subprocess.run(command, check=True, timeout=60, env={**os.environ, "PYTHONPATH": path})
    assert is_loaded(cache_of(config), FakeModel())


def test_who_waits_for_another_writer_can_be_stopped(config, monkeypatch):
    monkeypatch.setattr(packed_cache, "_FINISH_S", 0.1)
    cache, stop = cache_of(config), threading.Event()
    packed_folder().mkdir(parents=True)
    with packed_cache._lock(packed_folder() / ".lock", NEVER) as is_mine:
        assert is_mine
        keeper = Keeper(cache, FakeModel().packed())
        keeper.start()
        keeper.stop()
        stop.set()
        cache.keep(FakeModel().packed(), stop)
    assert files() == [".lock"]


def test_what_was_stopped_leaves_nothing(config, monkeypatch):
    stop = threading.Event()
    monkeypatch.setattr(packed_cache, "_lock", _lock_then(stop, packed_cache._lock))
    cache_of(config).keep(FakeModel().packed(), stop)
    assert files() == [".lock"]


def _lock_then(stop, lock):
    @contextlib.contextmanager
    def locked(path, given):
        with lock(path, given) as is_mine:
            stop.set()
            yield is_mine

    return locked


KILLED = """
import os, signal, sys, threading
from pathlib import Path
from octavo.weights import packed_cache
from octavo.weights.packed import Packed
import torch

def write_packed(file, key, tensors, go_on, *, saved_s):
    file.write(bytes(10_000))
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

packed_cache.write_packed = write_packed
path = Path(sys.argv[1])
cache = packed_cache.PackedCache(path, "key", 1 << 30, (), packed_cache.identify(()))
cache.keep({"w": Packed("Q8_0", (1, 1), torch.zeros(100, dtype=torch.uint8))}, threading.Event())
"""


@pytest.mark.slow
def test_a_writer_that_was_killed_holds_nobody_up(config):
    cache = cache_of(config)
    done = subprocess.run([sys.executable, "-c", KILLED, str(cache.path)], check=False)
    assert done.returncode == -signal.SIGKILL
    leftovers = [name for name in files() if name.startswith(".writing-")]
    assert len(leftovers) == 1
    assert cache.try_load(FakeModel()) is None
    cache.keep(FakeModel().packed(), NEVER)
    assert is_loaded(cache, FakeModel())
    assert files() == [".lock", cache.path.name]
