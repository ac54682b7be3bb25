"""`octavo doctor`: what this machine has, what would be chosen, and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys

import octavo
from octavo import env
from octavo.checkpoint.catalogue import BUILTIN_MODELS, installed, packed_files, packed_folder
from octavo.config import DeviceInfo

_PACKAGES = {
    "torch": "the engine",
    "triton": "kernels on a GPU",
    "flashinfer-python": "attention on a GPU, if asked for",
    "tokenizers": "text",
    "safetensors": "weights",
    "gguf": "GGUF files",
    "huggingface-hub": "downloads",
    "msgspec": "server",
    "starlette": "server",
    "uvicorn": "server",
    "uvloop": "server",
    "httptools": "server",
    "prometheus-client": "server",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(namespace: argparse.Namespace) -> int:
    print(f"octavo {octavo.__version__}, Python {platform.python_version()}, {platform.platform()}")
    _show_packages()
    num_problems = _show_devices()
    _show_environment()
    _show_models()
    print("\nAll is well." if not num_problems else f"\n{num_problems} problem(s), see above.")
    return min(num_problems, 1)


def _show_packages() -> None:
    print("\nPackages")
    for name, purpose in _PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        print(f"  {name:18} {version:12} {purpose}")


def _show_devices() -> int:
    print("\nDevices")
    try:
        import torch

        from octavo.errors import ConfigError
        from octavo.platforms import detect
    except ImportError as error:
        print(f"  torch cannot be imported: {error}. Install it with: pip install torch")
        return 1
    chosen = detect("auto").info()
    for kind in ("cuda", "cpu"):
        try:
            info = detect(kind).info()
        except ConfigError:
            print(f"  {kind}: none found by torch {torch.__version__}")
            continue
        _show_device(info, is_chosen=info.kind == chosen.kind)
    return 0


def _show_device(info: DeviceInfo, *, is_chosen: bool) -> None:
    free, total = info.free_memory_bytes / 2**30, info.total_memory_bytes / 2**30
    print(f"  {info.kind}: {info.name}{'  <- chosen by --device auto' if is_chosen else ''}")
    print(f"    memory      {free:.1f} of {total:.1f} GiB free")
    print(f"    CPU cores   {info.num_cores} usable of {os.cpu_count()}")
    print(
        f"    dtype       {info.default_dtype}, {_why(info)} (supported: {', '.join(info.dtypes)})"
    )
    backends = ", ".join(info.attention_backends)
    missing = "".join(
        f"; not installed: {name}, {how}" for name, how in info.missing_backends.items()
    )
    print(f"    attention   {info.attention_backends[0]} (available: {backends}{missing})")
    print(f"    graphs      {'yes' if info.supports_graphs else 'no'}")


def _why(info: DeviceInfo) -> str:
    if info.default_dtype == "float32":
        return "as half-precision matmuls are slower than float32 here"
    return "as it halves the bytes to read"


def _show_environment() -> None:
    print("\nEnvironment")
    for variable in env.VARIABLES.values():
        value = (
            "set" if "KEY" in variable.name or "TOKEN" in variable.name else env.get(variable.name)
        )
        shown = value if env.get(variable.name) else "not set"
        print(f"  {variable.name:18} {shown:24} {variable.meaning}")
    print(f"  caches are in {env.home()}")
    sizes = [stat.st_size for _, stat in packed_files()]
    print(
        f"  packed weights of {len(sizes)} models, {sum(sizes) / 1e9:.1f} GB, in {packed_folder()}"
    )


def _show_models() -> None:
    print("\nModels")
    names = {model.name for model in installed()}
    for name in {**dict.fromkeys(BUILTIN_MODELS), **dict.fromkeys(sorted(names))}:
        print(f"  {name:32} {'here' if name in names else 'fetched on first use'}")
    sys.stdout.flush()
