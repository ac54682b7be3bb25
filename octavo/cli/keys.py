"""`octavo keys new`: an API key for a person or a program, and its hash for the server's file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from octavo.server.keys import SCOPES, append_entry, new_key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    new = actions.add_parser("new", help="make a key; it is shown this once")
    new.add_argument("--name", required=True, help="whose key it is: what logs and limits go by")
    new.add_argument(
        "--scope",
        action="append",
        choices=[scope.value for scope in SCOPES],
        help="what it may do; may be repeated (default: infer)",
    )
    new.add_argument("--expires", metavar="DATE", help="such as 2027-01-31; UTC unless it says so")
    new.add_argument("--max-streams", type=int, metavar="N", help="most requests at a time")
    new.add_argument("--file", type=Path, help="append the hash to this file, for --api-key-file")


def run(namespace: argparse.Namespace) -> int:
    scopes = namespace.scope or ["infer"]
    key, entry = new_key(namespace.name, scopes, namespace.expires, namespace.max_streams)
    if namespace.file is None:
        print(f"{key}\n\n# for the file of --api-key-file:\n{entry}", end="")
        return 0
    append_entry(namespace.file, entry)
    print(key)
    print(f"octavo: {namespace.name!r} has been added to {namespace.file}", file=sys.stderr)
    return 0
