"""`octavo chat`: a conversation in the terminal, with the model in this process."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time

from octavo.cli.flags import add_config_file, add_options, split_options
from octavo.cli.sampling import add_sampling_flags, sampling_params
from octavo.config import EngineArgs
from octavo.errors import InvalidRequestError
from octavo.llm import LLM
from octavo.types import SamplingParams

_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default=argparse.SUPPRESS,
        help="built-in name, hub id, folder or .gguf file (default: smollm2-135m)",
    )
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--stats", action="store_true", help="print speed after each answer")
    add_config_file(parser)
    add_sampling_flags(parser)
    add_options(parser, EngineArgs, "model", "seed")


def run(namespace: argparse.Namespace) -> int:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() history and editing

    (options,) = split_options(namespace, EngineArgs)
    params = sampling_params(namespace, max_tokens=1024, temperature=0.7, top_p=0.95)
    with LLM(**options) as llm:
        print(f"{llm.info.model} on {llm.info.device}. {_HELP}.")
        Conversation(llm, params, namespace.system, namespace.stats).run()
    return 0


class Conversation:
    """The messages so far; the prefix cache keeps what they cost."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None, stats: bool) -> None:
        self._llm = llm
        self._params = params
        self._start = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._start)
        self._stats = stats

    def run(self) -> None:
        """Read lines until the end of input or /exit."""
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                print()
                return
            if line == "/exit":
                return
            if line == "/reset":
                self._messages = list(self._start)
            elif line.startswith("/"):
                print(_HELP)
            elif line:
                self._answer(line)

    def _answer(self, line: str) -> None:
        self._messages.append({"role": "user", "content": line})
        start_s, pieces, num_tokens = time.perf_counter(), [], 0
        try:
            prompt = self._llm.chat_prompt(self._messages)
            for delta in self._llm.stream(prompt, self._params):
                pieces.append(delta.text)
                num_tokens += len(delta.token_ids)
                print(delta.text, end="", flush=True)
        except InvalidRequestError as error:
            self._messages.pop()
            print(f"{error} /reset starts anew.", file=sys.stderr)
            return
        except KeyboardInterrupt:
            pass  # keep what has been said
        print()
        self._messages.append({"role": "assistant", "content": "".join(pieces)})
        if self._stats:
            seconds = time.perf_counter() - start_s
            print(f"[{num_tokens} tokens, {num_tokens / seconds:.1f} per second]")
