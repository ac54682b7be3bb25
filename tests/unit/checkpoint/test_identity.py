"""Files are the same ones until somebody writes to them, whatever else is done to hide it."""

from __future__ import annotations

import os
import random
import shutil
import time

import pytest

from octavo.checkpoint.identity import identify


@pytest.fixture
def files(tmp_path):
    (tmp_path / "model").mkdir()
    paths = [tmp_path / "model" / f"{name}.safetensors" for name in "ab"]
    for path in paths:
        path.write_bytes(random.Random(path.name).randbytes(300_000))
    return paths


def wait_for_the_next_tick(tmp_path):
    """File times move in steps, of some milliseconds as a rule."""
    probe = tmp_path / "probe"
    probe.touch()
    before = probe.stat().st_ctime_ns
    while probe.stat().st_ctime_ns == before:
        time.sleep(0.001)
        probe.touch()


def test_reading_and_moving_change_nothing(files, tmp_path):
    before = identify(files)
    for path in files:
        path.read_bytes()
    assert identify(files) == before
    (tmp_path / "model").rename(tmp_path / "moved")
    link = tmp_path / "link"  # as in the hub's cache
    link.symlink_to(tmp_path / "moved" / "a.safetensors")
    assert identify([link, tmp_path / "moved" / "b.safetensors"]) == before


def test_one_byte_in_place_with_the_old_time_set_back(files, tmp_path):
    before, times = identify(files), files[1].stat()
    wait_for_the_next_tick(tmp_path)
    with files[1].open("r+b") as file:
        file.seek(150_001)
        byte = file.read(1)
        file.seek(150_001)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(files[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    assert files[1].stat().st_mtime_ns == times.st_mtime_ns
    assert identify(files) != before


def test_other_files_of_the_same_size_at_the_same_place(files, tmp_path):
    before = identify(files)
    times = files[0].stat()
    other = tmp_path / "other"
    other.write_bytes(bytes(300_000))
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(files[0])
    assert identify(files) != before
    shutil.copy2(files[1], other)
    assert identify([files[1]]) != identify([files[0]])


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 20_000])
def test_samples_have_the_first_and_the_last_byte(tmp_path, monkeypatch, size):
    """Content counts even where times tell nothing."""
    path = tmp_path / "file"
    fixed = os.stat_result((0o644, 1, 1, 1, 0, 0, size, 0, 0, 0))
    monkeypatch.setattr(os, "fstat", lambda fd: fixed)
    seen = set()
    for content in {bytes(size), b"\1" + bytes(size - 1), bytes(size - 1) + b"\1"} if size else ():
        path.write_bytes(content)
        seen.add(identify([path]))
    assert len(seen) == min(size, 2) + (size > 0)


def test_a_file_that_is_gone(files):
    files[0].unlink()
    with pytest.raises(FileNotFoundError):
        identify(files)
