"""The CPU: cores and memory as far as the scheduler's affinity and the control group allow.

Inside a container /proc shows the host, so both cgroup versions are read as well; a machine
without /proc (macOS) falls back to sysconf.
"""

from __future__ import annotations

import math
import os
import platform
import re
import resource
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from octavo.config.sections import DeviceInfo
from octavo.kernels.cpu.library import is_available

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_PROC = Path("/proc")


class CpuPlatform:
    """This machine's CPU, or the part of it that this process may use."""

    def __init__(self, cgroup_root: Path = _CGROUP_ROOT, proc: Path = _PROC) -> None:
        self.torch_device = torch.device("cpu")
        self._cgroup_root = cgroup_root
        self._proc = proc

    @classmethod
    def find(cls, index: int) -> CpuPlatform | None:
        """The CPU is always there, and there is one."""
        return cls() if index == 0 else None

    def info(self) -> DeviceInfo:
        native = is_available()
        return DeviceInfo(
            kind="cpu",
            name=f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            total_memory_bytes=self.memory_total_bytes(),
            free_memory_bytes=self.memory_free_bytes(),
            num_cores=self.num_cores(),
            # Most CPUs have no bfloat16 GEMM: 2-5x slower than float32 beyond one token.
            default_dtype="float32",
            dtypes=("float32", "bfloat16", "float16"),
            attention_backends=("native", "torch") if native else ("torch",),
            quantizations=("int8",) if native else (),
        )

    def active(self) -> AbstractContextManager[None]:
        return nullcontext()

    def synchronize(self) -> None:
        """CPU operations have run when they return."""

    def num_cores(self) -> int:
        """Cores by affinity, or the control group's quota where that is lower; at least 1."""
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else (os.cpu_count() or 1)
        quota, period = (self._cgroup_text("cpu", "cpu.max").split() or ["max", "100000"])[:2]
        if quota == "max":  # also where there is no cgroup v2
            quota = self._cgroup_text("cpu", "cpu.cfs_quota_us")
            period = self._cgroup_text("cpu", "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():  # v1 writes -1 for no limit
            cores = min(cores, math.ceil(int(quota) / int(period)))
        return max(cores, 1)

    def memory_total_bytes(self) -> int:
        total = self._meminfo_bytes("MemTotal")
        limit = self._memory_limit_bytes()
        return total if limit is None else min(total, limit)

    def memory_used_bytes(self) -> int:
        """Resident memory of this process."""
        try:
            pages = int((self._proc / "self" / "statm").read_text().split()[1])
        except OSError:
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE")

    def trim_memory(self) -> None:
        """The system takes and gives on its own."""

    def memory_peak_bytes(self) -> int:
        """Largest resident memory of this process so far."""
        try:
            status = (self._proc / "self" / "status").read_text()
        except OSError:
            status = ""
        if match := re.search(r"VmHWM:\s*(\d+) kB", status):
            return int(match[1]) * 1024
        # Second best: on Linux it may count what the parent held, and is in KiB.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if platform.system() == "Darwin" else peak * 1024

    def memory_free_bytes(self) -> int:
        free = self._meminfo_bytes("MemAvailable")
        limit = self._memory_limit_bytes()
        if limit is None:
            return free
        used = self._cgroup_int("memory", "memory.current", "memory.usage_in_bytes") or 0
        # Cached file pages count as used but are given up on demand; those that a process has
        # mapped, weights say, would be missed.
        stat = dict(
            line.split(maxsplit=1)
            for line in self._cgroup_text("memory", "memory.stat").splitlines()
        )
        inactive, active, mapped = (
            int(stat.get(f"total_{name}", stat.get(name, 0)))
            for name in ("inactive_file", "active_file", "file_mapped")
        )
        return max(min(free, limit - used + max(inactive + active - mapped, 0)), 0)

    def _memory_limit_bytes(self) -> int | None:
        return self._cgroup_int("memory", "memory.max", "memory.limit_in_bytes")

    def _meminfo_bytes(self, field: str) -> int:
        try:
            lines = (self._proc / "meminfo").read_text().splitlines()
        except OSError:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        values = dict(line.split(":", 1) for line in lines)
        return int(values[field].split()[0]) * 1024

    def _cgroup_int(self, controller: str, *files: str) -> int | None:
        """The first of the files that holds a number; None for "max" or no control group."""
        texts = (self._cgroup_text(controller, file) for file in files)
        return next((int(text) for text in texts if text.isdigit()), None)

    def _cgroup_text(self, controller: str, file: str) -> str:
        """A control file of this process's group, or of the root; empty where neither has it.

        /proc/self/cgroup: "0::/path" for version 2, "4:memory:/path" for version 1, whose files
        lie under a folder per controller.
        """
        folders = [self._cgroup_root, self._cgroup_root / controller]
        try:
            lines = (self._proc / "self" / "cgroup").read_text().splitlines()
        except OSError:
            lines = []
        for line in lines:
            _, controllers, path = line.split(":", 2)
            if not controllers:
                folders.insert(0, self._cgroup_root / path.lstrip("/"))
            elif controller in controllers.split(","):
                folders.insert(0, self._cgroup_root / controller / path.lstrip("/"))
        for folder in folders:
            try:
                return (folder / file).read_text().strip()
            except OSError:
                continue
        return ""
