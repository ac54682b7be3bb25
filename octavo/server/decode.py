"""From raw bytes to a request struct, strictly: nothing is coerced, ignored or guessed.

Refused with a 400: broken UTF-8, lone surrogates, NaN and Infinity, duplicated keys, nesting beyond
`MAX_NESTING`, unknown fields (with the nearest known name), and known fields of OpenAI's or vLLM's
API that are not supported, unless their value asks for nothing.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from typing import Any, TypeVar

import msgspec

from octavo.errors import InvalidRequestError
from octavo.server.fields import IGNORED, UNSUPPORTED

MAX_NESTING = 64
MAX_CONTAINERS = 50_000  # objects and arrays in one body

_MAX_QUOTED = 300  # characters of a name that a client made up

S = TypeVar("S", bound=msgspec.Struct)

_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NOT_BRACKETS = bytes(b for b in range(256) if b not in b"[]{}")
_VALIDATION = re.compile(r"(.*?)(?: - at `(?:key in )?`?\$?\.?(.*?)`)?", re.DOTALL)


def decode_body(body: bytes, schema: type[S]) -> S:
    """The body as `schema`, or InvalidRequestError."""
    fields = parse_object(body)
    _screen(fields, schema)
    return convert(fields, schema)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`, with everything refused that JSON parsers disagree about."""
    if not body.strip():
        raise _invalid_json("The request body is empty; send a JSON object.")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise _invalid_json(f"The body is not valid UTF-8 (byte {exc.start}).") from None
    _check_nesting(body)
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except json.JSONDecodeError as exc:
        raise _invalid_json(f"The body is not valid JSON: {exc}.") from None
    except ValueError:  # Python refuses integers of more than 4,300 digits
        raise _invalid_json("A number in the body has too many digits.") from None
    if not isinstance(value, dict):
        raise _invalid_json(f"The body must be a JSON object, not {_json_type(value)}.")
    if "\\ud" in text or "\\uD" in text:
        _check_surrogates(value)
    return value


def convert(value: Any, schema: type[S]) -> S:
    """`value` as `schema`; msgspec's complaint becomes an InvalidRequestError that names the
    field.
    """
    try:
        return msgspec.convert(value, schema, strict=True)
    except msgspec.ValidationError as exc:
        raise _validation_error(str(exc)) from None


def _check_nesting(body: bytes) -> None:
    brackets = _STRINGS.sub(b"", body).translate(None, _NOT_BRACKETS)
    if len(brackets) > 2 * MAX_CONTAINERS:
        raise _invalid_json(f"The body has more than {MAX_CONTAINERS} objects and arrays.")
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_NESTING:
            raise _invalid_json(f"The body is nested deeper than {MAX_NESTING} levels.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidRequestError(
                    f"The field {key[:100]!r} appears twice; send it once.",
                    key[:100],
                    "duplicate_parameter",
                )
            seen.add(key)
    return result


def _no_constant(name: str) -> Any:
    raise _invalid_json(f"{name} is not valid JSON; send a finite number or null.")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _invalid_json(f"The number {digits[:40]} is too large.")
    return value


def _check_surrogates(value: dict[str, Any]) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _invalid_json(
            "A string holds half of a surrogate pair (\\ud800 to \\udfff), which is no character."
        ) from None


def _screen(fields: dict[str, Any], schema: type[msgspec.Struct]) -> None:
    """Take out fields that ask for nothing; refuse those that ask for what is not there."""
    for name in [name for name in fields if name not in schema.__struct_fields__]:
        value = fields.pop(name)
        if name in IGNORED:
            if not isinstance(value, IGNORED[name]):
                raise InvalidRequestError(
                    f"{name} must not be {_json_type(value)}.", name, "invalid_type"
                )
        elif name in UNSUPPORTED:
            harmless, advice = UNSUPPORTED[name]
            if not any(type(value) is type(h) and value == h for h in harmless):
                raise InvalidRequestError(
                    f"{name} is not supported with this value: {advice}",
                    name,
                    "unsupported_parameter",
                )
        else:
            raise _unknown_field(name, schema)


def _unknown_field(name: str, schema: type[msgspec.Struct]) -> InvalidRequestError:
    near = difflib.get_close_matches(name[:100], schema.__struct_fields__, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else " Remove it."
    return InvalidRequestError(
        f"Unknown field {name[:100]!r}.{hint}", name[:100], "unknown_parameter"
    )


def _validation_error(message: str) -> InvalidRequestError:
    match = _VALIDATION.fullmatch(message)
    detail, path = match.groups() if match else (message, None)
    detail, path = detail[:_MAX_QUOTED], path and path[:_MAX_QUOTED]
    where = f"{path}: " if path else ""
    if missing := re.fullmatch(r"Object missing required field `(.*)`", detail):
        param = f"{path}.{missing[1]}" if path else missing[1]
        return InvalidRequestError(
            f"The field {param!r} is required.", param, "missing_required_parameter"
        )
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", detail, re.DOTALL):
        param = f"{path}.{unknown[1][:100]}" if path else unknown[1][:100]
        return InvalidRequestError(
            f"Unknown field {param!r}; remove it.", param, "unknown_parameter"
        )
    return InvalidRequestError(f"{where}{detail}.", path or None, "invalid_type")


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return names.get(type(value), "null" if value is None else "a number")


def _invalid_json(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, None, "invalid_json")
