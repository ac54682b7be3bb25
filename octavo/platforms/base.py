"""What the engine asks of a device, whatever its kind."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

from octavo.config.sections import DeviceInfo


class Platform(Protocol):
    """One device of one kind.

    Another package adds a kind by an entry point in the group "octavo.platforms" whose name is
    the kind and whose value is a callable that takes the device index and returns a Platform, or
    None where this machine has no such device.
    """

    torch_device: torch.device

    def info(self) -> DeviceInfo:
        """Facts for `config.resolve`, measured now."""
        ...

    def active(self) -> AbstractContextManager[object]:
        """Within it, whatever this thread does without naming a device is meant for this one."""
        ...

    def synchronize(self) -> None:
        """Wait until everything that was queued on the device has run."""
        ...

    def memory_used_bytes(self) -> int:
        """Device memory that this process holds."""
        ...

    def memory_peak_bytes(self) -> int:
        """The most device memory that this process has held since `trim_memory`, or ever."""
        ...

    def trim_memory(self) -> None:
        """Give back what this process holds and does not use; where that can be done, the peak is
        counted anew from here.
        """
        ...

    def memory_free_bytes(self) -> int:
        """Device memory that this process could still take."""
        ...
