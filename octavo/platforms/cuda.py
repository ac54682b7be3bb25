"""NVIDIA GPUs, through torch."""

from __future__ import annotations

import gc
import importlib.util
import platform

import torch

from octavo.config.sections import DeviceInfo, DType


class CudaPlatform:
    """One CUDA device."""

    def __init__(self, index: int) -> None:
        self.torch_device = torch.device("cuda", index)

    @classmethod
    def find(cls, index: int) -> CudaPlatform | None:
        """The device with this index, or None where there is none."""
        present = torch.cuda.is_available() and index < torch.cuda.device_count()
        return cls(index) if present else None

    def info(self) -> DeviceInfo:
        properties = torch.cuda.get_device_properties(self.torch_device)
        # Before Ampere there is no bfloat16 in the tensor cores.
        dtypes: tuple[DType, ...] = (
            ("bfloat16", "float16", "float32") if properties.major >= 8 else ("float16", "float32")
        )
        backends, missing = _attention_backends()
        return DeviceInfo(
            kind="cuda",
            name=properties.name,
            total_memory_bytes=properties.total_memory,
            free_memory_bytes=self.memory_free_bytes(),
            num_cores=torch.get_num_threads(),
            default_dtype=dtypes[0],
            dtypes=dtypes,
            attention_backends=backends,
            missing_backends=missing,
            supports_graphs=True,
            reads_host_memory=_reads_host_memory(),
        )

    def active(self) -> torch.cuda.device:
        return torch.cuda.device(self.torch_device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def memory_used_bytes(self) -> int:
        return torch.cuda.memory_reserved(self.torch_device)

    def memory_peak_bytes(self) -> int:
        return torch.cuda.max_memory_reserved(self.torch_device)

    def trim_memory(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.torch_device)

    def memory_free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.torch_device)[0]


def _reads_host_memory() -> bool:
    """Where a GPU knows the host's memory by the addresses that the host has for it: CUDA on Linux
    itself, not within Windows.
    """
    return torch.version.hip is None and "microsoft" not in platform.release().lower()


def _attention_backends() -> tuple[tuple[str, ...], dict[str, str]]:
    """Those installed, preferred first, and how to get others. torch's CUDA builds bring Triton;
    FlashInfer, which leaves decodes to it, is for NVIDIA alone.
    """
    if importlib.util.find_spec("triton") is None:
        return ("torch",), {}
    if torch.version.hip is not None:
        return ("triton", "torch"), {}
    if importlib.util.find_spec("flashinfer") is None:
        return ("triton", "torch"), {"flashinfer": "pip install 'octavo[flashinfer]'"}
    return ("triton", "flashinfer", "torch"), {}
