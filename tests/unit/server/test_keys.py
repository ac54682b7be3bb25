"""Keys in a file: what it may hold, when it is read again, and who may write to it."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.live_server import LiveServer

from octavo.cli.main import main
from octavo.config.server import ServerConfig
from octavo.errors import ConfigError
from octavo.server import keys
from octavo.server.keys import Access, KeyRing, append_entry, new_key, parse_entries

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
DIGEST = hashlib.sha256(b"k").hexdigest()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def add(path: Path, name: str, *scopes: str, **options: object) -> str:
    key, entry = new_key(name, scopes or ("infer",), **options)  # type: ignore[arg-type]
    append_entry(path, entry)
    return key


def entry(**changed: object) -> str:
    fields: dict[str, object] = {"name": "a", "scopes": "[infer]", "sha256": DIGEST} | changed
    lines = [f"{name}: {value}" for name, value in fields.items() if value is not None]
    return "- " + "\n  ".join(lines) + "\n"


def test_the_file_has_no_key_in_it_and_belongs_to_its_owner(path: Path) -> None:
    key = add(path, "alice", "infer", "metrics", max_streams=3, expires="2999-01-01")
    assert len(key) > 43
    assert key not in path.read_text()
    assert hashlib.sha256(key.encode()).hexdigest() in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    (found,) = parse_entries(path.read_text(), path)
    assert (found.name, found.max_streams, found.is_expired) == ("alice", 3, False)
    assert found.scopes == {Access.INFER, Access.METRICS}
    assert found.digest.hex() not in repr(found)
    assert KeyRing(path=path).find(key.encode()) == found


def test_keys_are_random_and_found_by_value(path: Path) -> None:
    made = {name: add(path, name) for name in ("a", "b", "c")}
    ring = KeyRing(path=path)
    assert len(set(made.values())) == 3
    for name, key in made.items():
        found = ring.find(key.encode())
        assert found is not None
        assert found.name == name
        assert ring.find(key[:-1].encode()) is None
    assert ring.find(b"") is None


@given(st.binary(max_size=100))
def test_nothing_else_is_a_key(token: bytes) -> None:
    (key,) = parse_entries(entry(), Path("f"))
    assert (KeyRing([key]).find(token) is None) == (token != b"k")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "at least one key"),
        ("[]", "at least one key"),
        ("name: a\n", "must hold a list"),
        ("- [\n", "not valid YAML"),
        ("- 5\n", "entry 1: Expected `object`"),
        (entry() + entry(), "names 'a' twice"),
        (entry(name="''"), "name must be"),
        (entry(name="a b"), "name must be"),
        (entry(name=None), "entry 1: .*`name`"),
        (entry(key="octavo-x"), "unknown field `key`"),
        (entry(scopes="[]"), "scopes must be some of infer, metrics, admin"),
        (entry(scopes="[root]"), "scopes must be some of"),
        (entry(scopes="[open]"), "scopes must be some of"),
        (entry(scopes="infer"), "Expected `array`"),
        (entry(sha256="secret"), "64 hexadecimal"),
        (entry(sha256=DIGEST.upper()), "64 hexadecimal"),
        (entry(max_streams=0), "at least 1"),
        (entry(max_streams="many"), "Expected `int"),
        (entry(expires="soon"), "entry 1"),
        (entry(expires=5), "date or time"),
    ],
)
def test_a_malformed_file_ends_the_start(path: Path, text: str, says: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        KeyRing(path=path)
    assert DIGEST not in str(caught.value)


@pytest.mark.parametrize("expires", ["2020-01-01", "2020-01-01T00:00:00Z", "'2020-01-01 10:00'"])
def test_expiry_may_be_a_date_or_a_time(expires: str) -> None:
    (key,) = parse_entries(entry(expires=expires), Path("f"))
    assert key.is_expired
    (key,) = parse_entries(entry(expires=expires.replace("2020", "2999")), Path("f"))
    assert not key.is_expired


def test_a_file_that_others_can_write_is_refused(path: Path) -> None:
    add(path, "a")
    for mode in (0o620, 0o602):
        path.chmod(mode)
        with pytest.raises(ConfigError, match="chmod go-w"):
            KeyRing(path=path)
    path.chmod(0o644)  # hashes of random keys tell a reader nothing
    KeyRing(path=path)
    with pytest.raises(ConfigError, match="Cannot read"):
        KeyRing(path=path.with_name("none"))


def test_names_are_unique_with_the_key_of_the_command_line(path: Path) -> None:
    add(path, "api-key")
    with pytest.raises(ConfigError, match="api-key"):
        KeyRing.from_config(ServerConfig(api_key="s", api_key_file=str(path)))


def test_a_change_of_the_file_is_noticed_and_a_broken_one_changes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = add(path, "first")
    ring = KeyRing(path=path)
    second = add(path, "second")
    ring.refresh()
    assert ring.find(second.encode()) is None  # looked a moment ago
    monkeypatch.setattr(keys, "CHECK_EVERY_S", 0.0)
    ring.refresh()
    assert ring.find(second.encode()) is not None
    good = path.read_text()
    for break_it in (lambda: path.write_text("- ["), lambda: path.write_text(""), path.unlink):
        break_it()
        caplog.clear()
        for _ in range(5):
            ring.refresh()
        assert ring.find(first.encode()) is not None
        errors = [r for r in caplog.records if r.levelno == logging.ERROR]
        assert len(errors) == 1, "said once, not at every request"
    path.write_text(good.replace("first", "renamed"))
    ring.refresh()
    found = ring.find(first.encode())
    assert found is not None
    assert found.name == "renamed"


def test_a_file_that_is_replaced_is_noticed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same size, same time: as a mounted secret is swapped."""
    monkeypatch.setattr(keys, "CHECK_EVERY_S", 0.0)
    add(path, "a")
    ring = KeyRing(path=path)
    other = path.with_name("new.yaml")
    key = add(other, "b")
    facts = path.stat()
    os.utime(other, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    other.replace(path)
    ring.refresh()
    assert ring.find(key.encode()) is not None


def test_refresh_looks_at_the_file_once_a_second(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(path, "a")
    ring = KeyRing(path=path)
    looks = []
    stat = Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **kw: looks.append(self) or stat(self, **kw))
    monkeypatch.setattr(keys, "CHECK_EVERY_S", 30.0)
    for _ in range(100):
        ring.refresh()
    assert looks == []


def test_a_server_takes_up_new_keys_and_drops_old_ones(
    path: Path, start_server: Callable[..., LiveServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "CHECK_EVERY_S", 0.0)
    old = add(path, "old")
    server = start_server(api_key_file=str(path))

    def status(key: str) -> int:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.post(
            f"{server.url}/v1/chat/completions", json=CHAT, headers=headers
        ).status_code

    assert status(old) == 200
    path.unlink()
    new = add(path, "new")
    assert (status(new), status(old)) == (200, 401)


def test_an_expired_key_is_told_so_and_a_wrong_one_is_not(
    path: Path, start_server: Callable[..., LiveServer], caplog: pytest.LogCaptureFixture
) -> None:
    key = add(path, "old", expires="2020-01-01")
    server = start_server(api_key_file=str(path), access_log=True)
    with caplog.at_level(logging.DEBUG):
        for token, code in ((key, "expired_api_key"), ("octavo-wrong", "invalid_api_key")):
            headers = {"authorization": f"Bearer {token}"}
            reply = httpx.get(f"{server.url}/v1/models", headers=headers)
            assert reply.status_code == 401
            assert reply.json()["error"]["code"] == code
            assert token not in reply.text
            assert token not in caplog.text


def test_the_name_of_the_key_is_known_to_handlers_and_logs(
    path: Path, start_server: Callable[..., LiveServer], caplog: pytest.LogCaptureFixture
) -> None:
    key = add(path, "alice")
    server = start_server(api_key_file=str(path), access_log=True)
    with caplog.at_level(logging.INFO):
        url = f"{server.url}/v1/models/fake%0Aforged?x=1"
        httpx.get(url, headers={"authorization": f"Bearer {key}"})
        server.wait_for(lambda: "alice GET" in caplog.text)
    assert "alice GET /v1/models/fake%0Aforged 404" in caplog.text
    assert key not in caplog.text


def test_the_command_makes_a_key_once(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--scope", "infer", "--scope", "admin", "--max-streams", "2")
    assert main(["keys", "new", "--name", "bob", *options, "--file", str(path)]) == 0
    key = capsys.readouterr().out.strip()
    found = KeyRing(path=path).find(key.encode())
    assert found is not None
    assert (found.name, found.max_streams) == ("bob", 2)
    assert found.scopes == {Access.INFER, Access.ADMIN}
    assert main(["keys", "new", "--name", "bob", "--file", str(path)]) == 1
    assert "twice" in capsys.readouterr().err
    assert main(["keys", "new", "--name", "b b"]) == 1
    assert main(["keys", "new", "--name", "carol", "--expires", "never"]) == 1
    capsys.readouterr()
    assert main(["keys", "new", "--name", "carol"]) == 0
    key, text = capsys.readouterr().out.split("\n", 1)
    (found,) = parse_entries(text, path)
    assert (found.name, found.digest) == ("carol", keys.digest_of(key.encode()))


def test_a_file_without_a_last_newline_is_appended_to(path: Path) -> None:
    path.write_text(entry().rstrip("\n"))
    add(path, "b")
    assert [key.name for key in parse_entries(path.read_text(), path)] == ["a", "b"]
