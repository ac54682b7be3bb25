"""API keys: who may call, and what for.

Keys are 256 random bits, so that one round of SHA-256 hides them as well as a slow password hash
would: there is nothing to guess. Only digests are kept, here and in the file. A caller's key is
compared with every digest, in constant time and without stopping at a hit: how long an answer takes
tells neither how close a guess was nor whose key it is.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec
import yaml

from octavo.config.server import ServerConfig
from octavo.errors import ConfigError
from octavo.log import get_logger

logger = get_logger(__name__)

CHECK_EVERY_S = 1.0  # how often the file's stat is compared

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Access(StrEnum):
    """What a route asks of its caller. The last three are scopes, which a key can have."""

    OPEN = "open"  # nothing: for probes, which carry no credentials
    ANY = "any key"
    INFER = "infer"
    METRICS = "metrics"
    ADMIN = "admin"


SCOPES = (Access.INFER, Access.METRICS, Access.ADMIN)


@dataclass(frozen=True, slots=True)
class Key:
    name: str
    digest: bytes = field(repr=False)
    scopes: frozenset[Access]
    expires_s: float | None = None  # Unix time
    max_streams: int | None = None

    @property
    def is_expired(self) -> bool:
        return self.expires_s is not None and time.time() >= self.expires_s


class Entry(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One key as the file has it."""

    name: str
    scopes: list[str]
    sha256: str
    expires: Any = None  # a date or a time; UTC where it names no zone
    max_streams: int | None = None

    def to_key(self) -> Key:
        """Raises ValueError for what a key cannot be."""
        if not _NAME.fullmatch(self.name):
            raise ValueError("name must be 1 to 64 letters, digits, dots, dashes or underscores")
        if not self.scopes or not set(self.scopes) <= set(SCOPES):
            raise ValueError(f"scopes must be some of {', '.join(SCOPES)}")
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError("sha256 must be 64 hexadecimal digits in small letters")
        if self.max_streams is not None and self.max_streams < 1:
            raise ValueError("max_streams must be at least 1")
        scopes = frozenset(map(Access, self.scopes))
        digest, expires_s = bytes.fromhex(self.sha256), _unix_time(self.expires)
        return Key(self.name, digest, scopes, expires_s, self.max_streams)


def _unix_time(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = datetime.datetime.fromisoformat(value)
    elif isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        value = datetime.datetime.combine(value, datetime.time())
    if not isinstance(value, datetime.datetime):
        raise ValueError("expires must be a date or time, such as 2027-01-31")
    return (value if value.tzinfo else value.replace(tzinfo=datetime.UTC)).timestamp()


def digest_of(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def new_key(
    name: str, scopes: Iterable[str], expires: str | None = None, max_streams: int | None = None
) -> tuple[str, str]:
    """A fresh key, and its entry for the file.

    Raises:
        ConfigError: something of it is malformed.
    """
    key = f"octavo-{secrets.token_urlsafe(32)}"
    sha256 = digest_of(key.encode()).hex()
    entry = Entry(
        name=name, scopes=list(scopes), sha256=sha256, expires=expires, max_streams=max_streams
    )
    try:
        entry.to_key()
    except ValueError as exc:
        raise ConfigError(f"There can be no such key: {exc}.") from None
    text = yaml.safe_dump([msgspec.to_builtins(entry)], sort_keys=False, default_flow_style=None)
    return key, text


def append_entry(path: Path, text: str) -> None:
    """Add an entry to the file, which is made, for its owner alone, where there is none.

    Raises:
        ConfigError: the file is malformed, has that name already, or cannot be written.
    """
    try:
        before = path.read_text() if path.exists() else ""
        if before and not before.endswith("\n"):
            text = "\n" + text
        parse_entries(before + text, path)
        path.touch(0o600)
        with path.open("a") as file:
            file.write(text)
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"Cannot write the key file {path}: {exc}.") from None


def parse_entries(text: str, path: Path) -> tuple[Key, ...]:
    """Raises ConfigError, naming the entry, for anything that is not a list of entries."""
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        raise ConfigError(f"The key file {path} is not valid YAML.") from None
    # An empty file is one that is being written, more likely than a wish to lock everybody out.
    if not isinstance(content, list) or not content:
        raise ConfigError(f"The key file {path} must hold a list of at least one key.")
    keys: dict[str, Key] = {}
    for i, item in enumerate(content):
        try:
            key = msgspec.convert(item, Entry).to_key()
        except ValueError as exc:  # msgspec's is one
            raise ConfigError(f"The key file {path}, entry {i + 1}: {exc}.") from None
        if key.name in keys:
            raise ConfigError(f"The key file {path} names {key.name!r} twice.")
        keys[key.name] = key
    return tuple(keys.values())


class KeyRing:
    """The keys that are valid now: one from the command line or environment, and those of a file,
    which is read again when it changes. A file that has become unusable changes nothing.
    """

    def __init__(self, fixed: Iterable[Key] = (), path: Path | None = None) -> None:
        """Raises ConfigError for a file that cannot be used."""
        self._fixed = tuple(fixed)
        self._path = path
        self._keys = self._fixed
        self._version: tuple[int, ...] | None = None
        self._checked_s = time.monotonic()
        self._complaint = ""
        self.reload()

    @classmethod
    def from_config(cls, config: ServerConfig) -> KeyRing:
        fixed = []
        if config.api_key is not None:
            scopes = frozenset((Access.INFER, Access.METRICS))
            fixed.append(Key("api-key", digest_of(config.api_key.encode()), scopes))
        path = config.api_key_file
        ring = cls(fixed, Path(path) if path is not None else None)
        if config.admin_port is not None and ring.required and not ring.has(Access.ADMIN):
            logger.warning("no key has the scope admin: nobody can use the admin routes")
        return ring

    @property
    def required(self) -> bool:
        """Whether there are any keys. Without them everybody may call."""
        return bool(self._keys)

    def has(self, scope: Access) -> bool:
        return any(scope in key.scopes for key in self._keys)

    def find(self, token: bytes) -> Key | None:
        """The key that `token` is, expired or not."""
        digest, found = digest_of(token), None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found

    def refresh(self) -> None:
        """Read the file again if it has changed; at most one stat a second. Never raises."""
        now_s = time.monotonic()
        if self._path is None or now_s - self._checked_s < CHECK_EVERY_S:
            return
        self._checked_s = now_s
        try:
            if _version(self._path.stat()) != self._version:
                self.reload()
        except (OSError, ConfigError) as exc:
            if str(exc) != self._complaint:
                logger.error("the API keys stay as they were: %s", exc)
            self._complaint = str(exc)

    def reload(self) -> None:
        """Read the file now. Raises ConfigError, and keeps the old keys, if it cannot be used."""
        if self._path is None:
            return
        try:
            with self._path.open() as file:
                facts = os.fstat(file.fileno())
                self._version = _version(facts)
                if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    raise ConfigError(
                        f"Others than its owner can write to the key file {self._path}, and give "
                        f"themselves a key: chmod go-w {self._path}"
                    )
                keys = self._fixed + parse_entries(file.read(), self._path)
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"Cannot read the key file {self._path}: {exc}.") from None
        names = [key.name for key in keys]
        if len(set(names)) != len(names):
            raise ConfigError("The name 'api-key' belongs to the key of --api-key.")
        self._keys, self._complaint = keys, ""
        logger.info("API keys: %s", ", ".join(names))


def _version(facts: os.stat_result) -> tuple[int, ...]:
    return (facts.st_mtime_ns, facts.st_ctime_ns, facts.st_size, facts.st_ino)
