"""Starts of `octavo serve` on a CPU: the first, which packs the weights, and the second, which maps
them.

    python benchmarks/start.py [--model FOLDER] [--rounds 5]

Without --model, a random Llama of 1.2 billion parameters in bfloat16 is made, 2.5 GB, under --work.
Files are in the page cache. Per start: seconds until ready and of the load phase, CPU seconds of
both processes until then, and memory that the engine shares with nobody. Linux only: reads /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import httpx
from streams import Server, cpu_s

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}


def make_checkpoint(folder: Path) -> None:
    """Random weights in the names and shapes that the model itself asks for."""
    import torch
    from safetensors.torch import save_file

    from octavo.checkpoint.builtin import ensure_builtin
    from octavo.models import create_model

    folder.mkdir()
    tokenizer = ensure_builtin("smollm2-135m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    (folder / "config.json").write_text(json.dumps(SHAPE))
    with torch.device("meta"):
        slots = create_model(SHAPE, 2048).weight_slots()
    tensors = {
        name: torch.empty(slot.shape, dtype=torch.bfloat16).uniform_(-0.03, 0.03)
        for name, slot in slots.items()
    }
    save_file(tensors, folder / "model.safetensors")


def start(model: str, packed: Path) -> dict[str, float]:
    """Start, measure, wait until packed weights are kept, and stop."""
    server = Server(model)
    try:
        pids = server.processes()
        metrics = httpx.get(f"{server.url}/metrics").text
        load = re.search(r'startup_seconds\{.*?phase="load".*?\} (\S+)', metrics)
        status = Path(f"/proc/{pids['engine']}/status").read_text()
        anonymous = re.search(r"RssAnon:\s+(\d+) kB", status)
        assert load is not None
        assert anonymous is not None
        figures = {
            "ready, s": server.ready_s,
            "load, s": float(load[1]),
            "engine CPU, s": cpu_s(pids["engine"]),
            "server CPU, s": cpu_s(pids["server"]),
            "own memory, MB": int(anonymous[1]) / 1e3,
        }
        deadline_s = time.monotonic() + 60
        while not list(packed.glob("*.packed")) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        return figures
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", default=tempfile.gettempdir())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="octavo-start-", dir=arguments.work) as work:
        model = arguments.model
        if model is None:
            model = f"{work}/model"
            make_checkpoint(Path(model))
        os.environ["OCTAVO_HOME"] = f"{work}/home"
        packed = Path(work) / "home" / "packed"
        rounds: dict[str, list[dict[str, float]]] = {"first": [], "second": []}
        for _ in range(arguments.rounds):
            shutil.rmtree(packed, ignore_errors=True)
            for which, figures in rounds.items():
                figures.append(start(model, packed))
                print(which, {name: round(value, 2) for name, value in figures[-1].items()})
    for which, figures in rounds.items():
        medians = {name: statistics.median(f[name] for f in figures) for name in figures[0]}
        print(f"{which:6}", {name: round(value, 2) for name, value in medians.items()})


if __name__ == "__main__":
    main()
