"""`octavo models`: what can be served by name."""

from __future__ import annotations

import argparse

from octavo.checkpoint.catalogue import BUILTIN_MODELS, installed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(namespace: argparse.Namespace) -> int:
    here = {model.name: model for model in installed()}
    print(f"{'NAME':32} {'SOURCE':9} {'SIZE':>9}  PATH")
    for model in here.values():
        size = f"{model.num_bytes / 1e6:,.0f} MB"
        print(f"{model.name:32} {model.source:9} {size:>9}  {model.path}")
    for name, builtin in BUILTIN_MODELS.items():
        if name not in here:
            size = f"{builtin.num_bytes / 1e6:,.0f} MB"
            print(f"{name:32} {'built-in':9} {size:>9}  (fetched on first use)")
    return 0
