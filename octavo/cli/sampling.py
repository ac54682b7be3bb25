"""Sampling flags that `chat` and `generate` share."""

from __future__ import annotations

import argparse
from typing import Any

from octavo.types import SamplingParams

_FLAGS: tuple[tuple[str, type, str], ...] = (
    ("max-tokens", int, "most tokens to generate"),
    ("temperature", float, "0 is greedy"),
    ("top-p", float, "keep the most likely tokens that hold this share"),
    ("top-k", int, "keep so many of the most likely tokens"),
    ("min-p", float, "drop tokens less likely than this share of the likeliest"),
    ("repetition-penalty", float, "above 1 discourages tokens that occurred before"),
    ("seed", int, "makes the output repeatable"),
)


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling options")
    for name, kind, text in _FLAGS:
        # "seed" is an engine option as well; here it is the request's.
        metavar = {int: "N", float: "X"}[kind]
        group.add_argument(
            f"--{name}", type=kind, dest=f"sampling_{name}", metavar=metavar, help=text
        )
    group.add_argument(
        "--stop",
        action="append",
        dest="sampling_stop",
        metavar="TEXT",
        help="stop string; repeatable",
    )


def sampling_params(namespace: argparse.Namespace, **defaults: Any) -> SamplingParams:
    """Raises InvalidRequestError for a value out of range."""
    given = {
        name.removeprefix("sampling_").replace("-", "_"): value
        for name, value in vars(namespace).items()
        if name.startswith("sampling_") and value is not None
    }
    return SamplingParams(**{**defaults, **given})
