"""Choosing a device, and what a CPU says of itself inside and outside of control groups."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import pytest
import torch

from octavo import platforms
from octavo.cli import doctor
from octavo.errors import ConfigError
from octavo.kernels.cpu.library import is_available
from octavo.platforms import CpuPlatform, CudaPlatform, detect

GIB = 1 << 30


def machine(tmp_path, files):
    """A CPU platform that reads these files instead of /proc and /sys/fs/cgroup."""
    defaults = {
        "proc/meminfo": f"MemTotal: {64 << 20} kB\nMemAvailable: {32 << 20} kB\n",
        "proc/self/statm": "100 25 3 1 0 9 0\n",
        "proc/self/cgroup": "0::/\n",
    }
    for name, text in (defaults | files).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return CpuPlatform(tmp_path / "cgroup", tmp_path / "proc")


def test_this_machine():
    info = detect("cpu").info()
    assert info.kind == "cpu"
    assert 1 <= info.num_cores <= (os.cpu_count() or 1)
    assert 0 < info.free_memory_bytes <= info.total_memory_bytes
    assert info.default_dtype == "float32" == info.dtypes[0]
    assert info.attention_backends[-1] == "torch"
    assert ("native" in info.attention_backends) == is_available() == bool(info.quantizations)
    platform = detect("cpu")
    platform.synchronize()
    assert platform.torch_device == torch.device("cpu")
    assert platform.memory_used_bytes() > 10 << 20  # this process holds torch


def test_without_limits_the_machine_is_what_there_is(tmp_path):
    platform = machine(tmp_path, {"cgroup/memory.max": "max\n", "cgroup/cpu.max": "max 100000\n"})
    info = platform.info()
    assert (info.total_memory_bytes, info.free_memory_bytes) == (64 * GIB, 32 * GIB)
    assert info.num_cores == len(os.sched_getaffinity(0))
    assert platform.memory_used_bytes() == 25 * os.sysconf("SC_PAGE_SIZE")


def test_cgroup_v2_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    info = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod\n",
            "cgroup/pod/memory.max": str(8 * GIB),
            "cgroup/pod/memory.current": str(5 * GIB),
            "cgroup/pod/memory.stat": f"anon 1\ninactive_file {GIB // 2}\nactive_file {GIB // 2}\n",
            "cgroup/pod/cpu.max": "250000 100000\n",
        },
    ).info()
    assert info.total_memory_bytes == 8 * GIB
    assert info.free_memory_bytes == 4 * GIB  # cached files can be given up
    assert info.num_cores == 3  # two and a half


def test_cgroup_v1_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    info = machine(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/box\n2:cpu,cpuacct:/\n0::/\n",
            "cgroup/memory/box/memory.limit_in_bytes": str(8 * GIB),
            "cgroup/memory/box/memory.usage_in_bytes": str(7 * GIB),
            "cgroup/memory/box/memory.stat": "total_inactive_file 0\n",
            "cgroup/cpu/cpu.cfs_quota_us": "400000",
            "cgroup/cpu/cpu.cfs_period_us": "100000",
        },
    ).info()
    assert (info.total_memory_bytes, info.free_memory_bytes) == (8 * GIB, GIB)
    assert info.num_cores == 4


def test_a_missing_device_is_a_config_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="'cuda' was asked for"):
        detect("cuda")
    with pytest.raises(ConfigError, match="known: auto, cuda, cpu"):
        detect("tpu")
    with pytest.raises(ConfigError, match="malformed"):
        detect("cuda:x")
    assert isinstance(detect("auto"), CpuPlatform)


@pytest.mark.parametrize(("major", "dtype"), [(9, "bfloat16"), (7, "float16")])
def test_cuda_dtypes_follow_its_generation(monkeypatch, major, dtype):
    class Properties:
        name, total_memory = "Some GPU", 80 * GIB

    Properties.major = major
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GIB, 80 * GIB))
    platform = detect("auto")
    assert isinstance(platform, CudaPlatform)
    assert detect("cuda:1").torch_device == torch.device("cuda", 1)
    with pytest.raises(ConfigError):
        detect("cuda:2")
    info = platform.info()
    assert (info.kind, info.default_dtype, info.supports_graphs) == ("cuda", dtype, True)
    assert (info.total_memory_bytes, info.free_memory_bytes) == (80 * GIB, 70 * GIB)


@pytest.mark.parametrize(
    ("packages", "hip", "available", "missing"),
    [
        ({"triton", "flashinfer"}, None, ("triton", "flashinfer", "torch"), set()),
        ({"triton"}, None, ("triton", "torch"), {"flashinfer"}),
        ({"triton", "flashinfer"}, "7.0", ("triton", "torch"), set()),
        ({"flashinfer"}, None, ("torch",), set()),  # decodes would have no kernel
    ],
)
def test_attention_on_a_gpu_follows_what_is_installed(
    monkeypatch, capsys, packages, hip, available, missing
):
    class Properties:
        name, total_memory, major = "Some GPU", 80 * GIB, 9

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in packages or None)
    info = CudaPlatform(0).info()
    assert info.attention_backends == available
    assert set(info.missing_backends) == missing
    doctor._show_device(info, is_chosen=True)
    shown = capsys.readouterr().out
    assert f"(available: {', '.join(available)}" in shown
    assert ("pip install 'octavo[flashinfer]'" in shown) == bool(missing)


def test_other_kinds_plug_in_by_entry_point(monkeypatch):
    class Entry:
        name = "abacus"

        def load(self):
            return lambda index: CpuPlatform() if index == 0 else None

    def entry_points(group):
        return [Entry()] if group == platforms.ENTRY_POINT_GROUP else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert isinstance(detect("abacus"), CpuPlatform)
    with pytest.raises(ConfigError, match="'abacus:1'"):
        detect("abacus:1")
