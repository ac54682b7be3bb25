"""`octavo generate`: complete one prompt, printing it as it comes."""

from __future__ import annotations

import argparse
import sys

from octavo.cli.flags import add_config_file, add_options, split_options
from octavo.cli.sampling import add_sampling_flags, sampling_params
from octavo.config import EngineArgs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="text to complete; - reads it from standard input")
    parser.add_argument("--chat", action="store_true", help="treat it as a user's chat message")
    add_config_file(parser)
    add_sampling_flags(parser)
    add_options(parser, EngineArgs, "seed")


def run(namespace: argparse.Namespace) -> int:
    from octavo.llm import LLM

    (options,) = split_options(namespace, EngineArgs)
    prompt = sys.stdin.read() if namespace.prompt == "-" else namespace.prompt
    params = sampling_params(namespace, max_tokens=256)
    with LLM(**options) as llm:
        message = [{"role": "user", "content": prompt}]
        for delta in llm.stream(llm.chat_prompt(message) if namespace.chat else prompt, params):
            print(delta.text, end="", flush=True)
    print()
    return 0
