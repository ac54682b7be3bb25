"""Changes to inputs that keep most of their structure, so that they get past the first check."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

INTERESTING_INTS = (
    *(0, 1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 255, 256, 4095, 4096, 65535, 65536),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1),
)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "\x00", "../../etc/passwd", "a/b", "é" * 40, "x" * 5000),
    *([], {}, [[]], [0], ["x"], {"": None}, {"x": {"x": 1}}, [None, 1, "2", [3], {"4": 5}]),
    *(-1, -(2**63) - 1, 2**64, 10**30, 0.0, -0.5, 1e-30, 1e308),
    *INTERESTING_INTS,
)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One blind change."""
    raw = bytearray(data)
    at = rng.randrange(len(raw) + 1)
    match rng.randrange(6):
        case 0:
            return bytes(raw[:at])
        case 1 if at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)
        case 2:
            raw[at:at] = rng.randbytes(rng.randrange(1, 9))
        case 3:
            del raw[at : at + rng.randrange(1, 17)]
        case 4:
            end = min(len(raw), at + rng.randrange(1, 65))
            raw[at:at] = raw[at:end]
        case _:
            size = rng.choice((1, 2, 4, 8))
            value = rng.choice(INTERESTING_INTS) % (1 << 8 * size)
            raw[at : at + size] = value.to_bytes(size, rng.choice(("little", "big")))  # type: ignore[arg-type]
    return bytes(raw)


def mutate_tree(tree: Any, rng: random.Random, words: Sequence[Any] = ()) -> Any:
    """A JSON-like value with one node changed: replaced, removed, doubled, moved or nested.

    `words` are further values, and keys where they are strings.
    """
    tree = copy.deepcopy(tree)
    places: list[tuple[Any, Any]] = []
    _collect(tree, places)
    if not places:
        return rng.choice(_VALUES)
    parent, key = rng.choice(places)
    match rng.randrange(7):
        case 0:
            del parent[key]
        case 1:
            other, other_key = rng.choice(places)
            parent[key] = copy.deepcopy(other[other_key])
        case 2 if isinstance(parent, list):
            parent[key:key] = [copy.deepcopy(parent[key])] * rng.choice((1, 2, 40))
        case 2 | 3 if isinstance(parent, dict):
            names = [word for word in words if isinstance(word, str)] or ["x"]
            parent[rng.choice(names)] = copy.deepcopy(rng.choice((*_VALUES, *words)))
        case 4:
            parent[key] = _near(parent[key], rng)
        case 5 if rng.random() < 0.1:
            for _ in range(rng.choice((10, 70))):
                parent[key] = [parent[key]]
        case _:
            parent[key] = copy.deepcopy(rng.choice((*_VALUES, *words)))
    return tree


def mutate_json(data: bytes, rng: random.Random, words: Sequence[Any] = ()) -> bytes:
    """JSON text with one node changed; now and then the text itself."""
    if rng.random() < 0.15:
        return mutate_bytes(data, rng)
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):  # a UnicodeDecodeError is one
        return mutate_bytes(data, rng)
    text = json.dumps(mutate_tree(tree, rng, words), ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.05:
        text = text.replace(
            '"x"', rng.choice(('"\\ud800"', "NaN", "-Infinity", "1e999", "9" * 5000))
        )
    return text.encode("utf-8", "surrogatepass")


def repeated(
    mutate: Callable[[bytes, random.Random], bytes], data: bytes, rng: random.Random
) -> bytes:
    """One to four changes, few more often than many."""
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        data = mutate(data, rng)
    return data


def _collect(tree: Any, places: list[tuple[Any, Any]]) -> None:
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        places.append((tree, key))
        _collect(tree[key], places)


def _near(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool) or value is None:
        return rng.choice((True, False, None, 0, 1))
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, -value, value * 2, value << 32, 0.5))
    if isinstance(value, float):
        return rng.choice((-value, value * 1e300, value + 0.5, 1, 0.0))
    if isinstance(value, str):
        return rng.choice((value + "x", value[:-1], value * 100, value.upper(), [value]))
    if isinstance(value, bytes):
        return mutate_bytes(value, rng)
    return rng.choice((str(value)[:50], [value], None))
