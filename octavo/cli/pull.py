"""`octavo pull`: fetch a model ahead of its first use."""

from __future__ import annotations

import argparse

from octavo.checkpoint import locate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="built-in name or hub id")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--download-dir", help="where hub downloads are kept (default: HF_HOME)")


def run(namespace: argparse.Namespace) -> int:
    checkpoint = locate(
        namespace.model, revision=namespace.revision, download_dir=namespace.download_dir
    )
    print(f"{namespace.model} is in {checkpoint.path}")
    return 0
