"""`octavo bench`: measure speed. `offline` drives an engine in this process, `serve` any
OpenAI-compatible server. The last line on stdout is one JSON object; everything else is on stderr.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from octavo import env
from octavo.bench import loads
from octavo.bench.report import OfflineReport, ServeReport, check_output, write_json
from octavo.bench.workloads import WORKLOADS
from octavo.cli.flags import add_config_file, add_options, split_options
from octavo.config import EngineArgs
from octavo.errors import ConfigError

_RANDOM_LENS = (512, 128)  # input and output, tokens
_RANDOM_REQUESTS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    modes = parser.add_subparsers(dest="mode", metavar="MODE", required=True)
    offline = "an engine in this process: token ids in, token ids out, all at once"
    _add_offline(modes.add_parser("offline", help=offline, description=offline))
    serve = "a running server, over OpenAI's API"
    _add_serve(modes.add_parser("serve", help=serve, description=serve))


def run(namespace: argparse.Namespace) -> int:
    return _run_offline(namespace) if namespace.mode == "offline" else _run_serve(namespace)


def _add_load(parser: argparse.ArgumentParser, *, required: bool) -> None:
    source = parser.add_mutually_exclusive_group(required=required)
    source.add_argument("--workload", choices=WORKLOADS, help="a named load of seeded token ids")
    source.add_argument(
        "--requests",
        type=Path,
        metavar="FILE.jsonl",
        help='lines of {"prompt_token_ids": [...], "max_tokens": n}',
    )


def _add_offline(parser: argparse.ArgumentParser) -> None:
    _add_load(parser, required=True)
    parser.add_argument(
        "--warmup",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run a few short requests of the load's shape first",
    )
    parser.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="runs, each with fresh prompts"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the report there")
    add_config_file(parser)
    add_options(parser, EngineArgs)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="(default: %(default)s)")
    add("--model", help="name to ask for (default: the first that the server lists)")
    add("--endpoint", choices=("completions", "chat"), default="completions")
    add("--api-key", help="sent as a bearer token (default: OCTAVO_API_KEY)")
    _add_load(parser, required=False)
    add("--input-len", type=int, metavar="N", help="random prompts of N tokens instead")
    add("--output-len", type=int, metavar="N", help="tokens to generate for them")
    add("--num-prompts", type=int, metavar="N", help="requests to send (default: all of the load)")
    add(
        "--request-rate",
        type=float,
        default=math.inf,
        metavar="R",
        help="mean arrivals per second, Poisson (default: inf, all at once)",
    )
    add("--max-concurrency", type=int, metavar="N", help="most requests under way at once")
    add(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="generate all tokens asked for; --no-ignore-eos for servers that refuse the field",
    )
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        help="scale random token ids to it (default: found by trying)",
    )
    add("--seed", type=int, default=0, help="of arrivals and random prompts")
    add("--timeout-s", type=float, default=600.0, metavar="X", help="for each request")
    add(
        "--slo", metavar="ttft:MS,tpot:MS,e2e:MS", help="limits that goodput counts by; any of them"
    )
    add("--output", type=Path, metavar="DIR", help="write report.json, requests.jsonl, report.png")


def _run_offline(namespace: argparse.Namespace) -> int:
    (options,) = split_options(namespace, EngineArgs)
    args = EngineArgs.from_options(**options)
    if namespace.requests is not None:
        load = loads.from_file(namespace.requests)
    else:
        load = loads.workload(namespace.workload)
    if namespace.output is not None:
        check_output(namespace.output, is_folder=False)
    from octavo.bench.offline import run_offline

    report = run_offline(args, load, warmup=namespace.warmup, num_repeats=namespace.repeat)
    if namespace.output is not None:
        write_json(namespace.output, report.as_json())
    _print(report)
    return 0


def _print(report: OfflineReport | ServeReport) -> None:
    print(report.summary(), file=sys.stderr)
    print(json.dumps(report.as_json()), flush=True)


def _serve_load(namespace: argparse.Namespace) -> loads.Load:
    wants_random = namespace.input_len is not None or namespace.output_len is not None
    if wants_random and (namespace.workload or namespace.requests):
        raise ConfigError("--input-len and --output-len exclude --workload and --requests.")
    if namespace.requests is not None:
        return loads.from_file(namespace.requests)
    if namespace.workload is not None:
        return loads.workload(namespace.workload)
    input_len = _RANDOM_LENS[0] if namespace.input_len is None else namespace.input_len
    output_len = _RANDOM_LENS[1] if namespace.output_len is None else namespace.output_len
    return loads.random_sizes(
        input_len, output_len, namespace.num_prompts or _RANDOM_REQUESTS, namespace.seed
    )


def _run_serve(namespace: argparse.Namespace) -> int:
    try:
        from octavo.bench.serve import ServeOptions, parse_slo, run_serve, write_output

        if namespace.output is not None:
            import octavo.bench.plot  # noqa: F401  # a missing matplotlib shows before the run
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ConfigError(
            f"bench serve needs the package {package!r}: pip install 'octavo[bench]'."
        ) from error
    if namespace.output is not None:
        check_output(namespace.output, is_folder=True)
    options = ServeOptions(
        base_url=namespace.base_url,
        model=namespace.model,
        endpoint=namespace.endpoint,
        api_key=namespace.api_key or env.get("OCTAVO_API_KEY") or None,
        num_prompts=namespace.num_prompts,
        request_rate=namespace.request_rate,
        max_concurrency=namespace.max_concurrency,
        ignore_eos=namespace.ignore_eos,
        vocab_size=namespace.vocab_size,
        seed=namespace.seed,
        timeout_s=namespace.timeout_s,
        slo=parse_slo(namespace.slo) if namespace.slo else None,
    )
    run = run_serve(_serve_load(namespace), options)
    if namespace.output is not None:
        write_output(namespace.output, run)
    _print(run.report)
    return 0 if run.report.figures.num_requests else 1
