"""Packed weights on disk: the second start maps them instead of packing again.

A folder of files, each named by its key, which is made of everything that the bytes depend on. They
are written once, under another name, and renamed when they are complete; they are never changed. So
what has its name is whole, and what is mapped stays as it is, whatever other processes do.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from octavo import __version__
from octavo.checkpoint.catalogue import PACKED_SUFFIX, packed_files, packed_folder
from octavo.checkpoint.identity import identify
from octavo.config.sections import ModelConfig
from octavo.errors import CheckpointError, WeightsError
from octavo.log import get_logger
from octavo.weights.packed import Packed, PackedModel, size_of
from octavo.weights.packed_file import (
    Mapped,
    PackedFileError,
    check_packed,
    is_used,
    map_packed,
    write_packed,
)

logger = get_logger(__name__)

_FORMAT = 1  # raise to have everything packed again
_TEMPORARY = ".writing-"
_MIN_FREE_BYTES = 1 << 30  # that stay free on the disk
_LOCK_POLL_S = 0.2
_FINISH_S = 3.0  # that an engine waits at its end: a short script, too, leaves its weights


@dataclass(frozen=True, slots=True)
class PackedCache:
    """The place of one model's packed weights."""

    path: Path
    key: str
    max_bytes: int  # of the whole folder
    checkpoint: tuple[Path, ...]
    identity: str  # of the checkpoint's files, before any of them was read

    @classmethod
    def of(cls, config: ModelConfig, packing: str) -> PackedCache:
        """Raises CheckpointError if a file of the checkpoint cannot be read."""
        try:
            identity = identify(config.weight_files)
        except OSError as error:
            raise CheckpointError(f"{config.path} cannot be read: {error}.") from error
        parts = {
            "format": _FORMAT,
            "octavo": __version__,
            "packing": packing,
            "checkpoint": identity,
            "load_format": config.load_format,
            "config": config.hf_config,
        }
        key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
        name = re.sub(r"[^\w.-]+", "-", Path(config.model).name)[:60].lstrip(".")  # for people
        path = packed_folder() / f"{name or 'model'}-{key[:32]}{PACKED_SUFFIX}"
        return cls(path, key, config.packed_cache_bytes, config.weight_files, identity)

    def try_load(self, model: PackedModel) -> Mapped | None:
        """Load the model, if its weights are here and in order; from what."""
        try:
            mapped = map_packed(self.path, self.key)
            model.load_packed(mapped.tensors)
        except FileNotFoundError:
            return None
        except (PackedFileError, WeightsError) as error:
            logger.warning("%s is of no use and is removed: %s", self.path, error)
            with contextlib.suppress(OSError):
                self.path.unlink()
            return None
        except OSError as error:  # if it can be replaced, all is well; if not, `keep` complains
            logger.info("%s cannot be read: %s", self.path, error)
            return None
        with contextlib.suppress(OSError):  # a folder that is read only does as well
            os.utime(self.path)  # the oldest-used are evicted first
        return mapped

    def keep(self, tensors: dict[str, Packed], stop: threading.Event, saved_s: float = 0.0) -> None:
        """Write the file, unless another process does or something speaks against it, which is
        logged. What was not complete when `stop` is set is given up.

        Args:
            saved_s: what whoever finds it need not spend.
        """
        num_bytes, start_s = size_of(tensors), time.monotonic()
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _lock(self.path.parent / ".lock", stop) as is_mine:
                if not is_mine or self._is_there() or not self._make_room(num_bytes):
                    return
                if self._write(tensors, stop, saved_s):
                    logger.info(
                        "kept %.1f GB of packed weights for the next start in %s (%.1f s)",
                        num_bytes / 1e9,
                        self.path,
                        time.monotonic() - start_s,
                    )
        except OSError as error:
            logger.warning(
                "packed weights are not kept for the next start: %s. Make room in %s or make it "
                "writable, set OCTAVO_HOME to another folder, or say --packed-cache-bytes 0.",
                error,
                self.path.parent,
            )

    def _is_there(self) -> bool:
        """Whether another process has been faster."""
        try:
            with self.path.open("rb") as file:
                check_packed(file, self.key)
        except (OSError, PackedFileError):
            return False
        return True

    def _make_room(self, num_bytes: int) -> bool:
        """Remove what dead processes left and, as far as need be, what was used longest ago; False
        if there is no room even so.

        Raises:
            OSError: the disk has none.
        """
        folder = self.path.parent
        for leftover in folder.glob(f"{_TEMPORARY}*"):  # nobody else writes: this one has the lock
            leftover.unlink(missing_ok=True)
        files = sorted((stat.st_mtime_ns, stat.st_size, path) for path, stat in packed_files())
        excess = sum(size for _, size, _ in files) + num_bytes - self.max_bytes
        victims, freed = [], 0
        for _, size, path in files:
            if excess > freed and not is_used(path):
                victims.append(path)
                freed += size
        excess -= freed
        if excess > 0:
            logger.info(
                "packed weights are not kept for the next start: with these %.1f GB there would be "
                "%.1f GB of them, and --packed-cache-bytes is %.1f GB",
                num_bytes / 1e9,
                (self.max_bytes + excess) / 1e9,
                self.max_bytes / 1e9,
            )
            return False
        if shutil.disk_usage(folder).free + freed < num_bytes + _MIN_FREE_BYTES:
            raise OSError(f"{num_bytes / 1e9:.1f} GB would leave less than 1 GB free on the disk")
        for path in victims:
            logger.info("removing %s to make room", path)
            path.unlink(missing_ok=True)
        return True

    def _write(self, tensors: dict[str, Packed], stop: threading.Event, saved_s: float) -> bool:
        """Whether it was completed."""
        with tempfile.NamedTemporaryFile(
            prefix=_TEMPORARY, dir=self.path.parent, delete=False
        ) as file:
            path = Path(file.name)
            try:
                # On disk before the rename can be. For its owner alone, as temporary files are: who
                # may read the checkpoint is known to its folders as well as to its files.
                if not write_packed(
                    file, self.key, tensors, lambda: not stop.is_set(), saved_s=saved_s
                ):
                    return False
                if identify(self.checkpoint) != self.identity:
                    logger.warning("packed weights are not kept: the model's files have changed")
                    return False
                path.replace(self.path)
                return True
            finally:
                path.unlink(missing_ok=True)


class Keeper:
    """Writes packed weights to the cache in a thread, beside an engine that runs already."""

    def __init__(
        self, cache: PackedCache, tensors: dict[str, Packed], saved_s: float = 0.0
    ) -> None:
        self._cache = cache
        self._tensors = tensors
        self._saved_s = saved_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def _run(self) -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own: requests go first
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        self._cache.keep(self._tensors, self._stop, self._saved_s)
        self._tensors = {}

    def start(self) -> None:
        self._thread.start()
        atexit.register(self.stop)  # for whoever does not close the engine

    def stop(self) -> None:
        """Give up what is not complete within a few seconds; the tensors are free afterwards."""
        atexit.unregister(self.stop)
        if self._thread.is_alive():
            self._thread.join(_FINISH_S)
            self._stop.set()
            self._thread.join()


@contextlib.contextmanager
def _lock(path: Path, stop: threading.Event) -> Iterator[bool]:
    """Hold an exclusive lock, which ends with this process at the latest; False if `stop` was set
    before it was free.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        while not stop.is_set():
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stop.wait(_LOCK_POLL_S)
            else:
                try:
                    yield True
                finally:  # a child that was forked meanwhile still has the file open
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
                return
        yield False
    finally:
        os.close(descriptor)
