"""Tensors of .safetensors files, mapped and read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from octavo.errors import WeightsError


def iter_safetensors(files: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every (name, tensor) of all files, in their stored dtype, on the CPU.

    A tensor is a view of the mapped file, which stays mapped as long as there are any.

    Raises:
        WeightsError: a file is damaged, or two files hold the same name.
    """
    origin: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118  # not a dict
                    if name in origin:
                        raise WeightsError(
                            f"Tensor {name!r} is in both {origin[name].name} and {path.name} of "
                            f"{path.parent}; remove the file that does not belong there."
                        )
                    origin[name] = path
                    yield name, _read(file, name)
        except (SafetensorError, OSError, _BadTensorError) as error:
            raise WeightsError(f"{path} cannot be read: {error}. Download it again.") from error


class _BadTensorError(Exception):
    """A header that the library takes, and torch does not."""


def _read(file: Any, name: str) -> torch.Tensor:
    try:
        tensor: torch.Tensor = file.get_tensor(name)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise _BadTensorError(f"tensor {name!a}: {error}") from error
    return tensor
