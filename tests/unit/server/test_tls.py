"""TLS with real certificates, made here."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from support.live_server import LiveServer

from octavo.config.server import ServerConfig
from octavo.errors import ConfigError
from octavo.server.tls import make_context

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "stream": True}


class Authority:
    """Signs certificates, and writes them below `folder`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = _name(name)
        certificate = self._sign(name, self.key, is_authority=True)
        self.file = str(_write(folder / f"{name}.pem", certificate))

    def issue(self, name: str, password: bytes | None = None) -> dict[str, str]:
        """The options with which a server, or client, called `name` shows itself."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _write(self.folder / f"{name}.pem", self._sign(name, key))
        secret: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if password is not None:
            secret = serialization.BestAvailableEncryption(password)
        path = self.folder / f"{name}.key"
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
        path.write_bytes(key.private_bytes(*form, secret))
        return {"ssl_certfile": str(certificate), "ssl_keyfile": str(path)}

    def _sign(
        self, name: str, key: ec.EllipticCurvePrivateKey, is_authority: bool = False
    ) -> x509.Certificate:
        now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        return (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
            .add_extension(x509.SubjectAlternativeName([address]), critical=False)
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _write(path: Path, certificate: x509.Certificate) -> Path:
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "authority")


def client(authority: Authority, own: dict[str, str] | None = None) -> httpx.Client:
    context = ssl.create_default_context(cafile=authority.file)
    if own is not None:
        context.load_cert_chain(own["ssl_certfile"], own["ssl_keyfile"])
    return httpx.Client(verify=context, timeout=20)


def test_both_ports_speak_tls(
    start_server: Callable[..., LiveServer], authority: Authority
) -> None:
    server = start_server(**authority.issue("server"), admin_port=0)
    assert server.url.startswith("https://")
    with client(authority) as http:
        reply = http.post(f"{server.url}/v1/chat/completions", json=CHAT)
        assert reply.status_code == 200
        assert reply.text.endswith("data: [DONE]\n\n")
        assert http.get(f"{server.admin_url}/admin/requests").status_code == 200
        assert http.post(f"{server.url}/v1/chat/completions", json={}).status_code == 400
    with pytest.raises(httpx.ConnectError, match="certificate"):
        httpx.get(f"{server.url}/livez")
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(server.url.replace("https", "http") + "/livez")


def test_old_versions_are_refused(
    start_server: Callable[..., LiveServer], authority: Authority
) -> None:
    server = start_server(**authority.issue("server"))
    port = server.doors.sock.getsockname()[1]

    def version(most: ssl.TLSVersion) -> str | None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.maximum_version = most
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as sock,
            context.wrap_socket(sock) as wrapped,
        ):
            return wrapped.version()

    assert version(ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    assert version(ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    with pytest.warns(match="TLSv1_1"), pytest.raises(OSError, match=r".+"):
        version(ssl.TLSVersion.TLSv1_1)


def test_clients_may_have_to_show_a_certificate_too(
    start_server: Callable[..., LiveServer], authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger").issue("intruder")
    server = start_server(**authority.issue("server"), ssl_ca_certs=authority.file, ssl_cert_reqs=2)
    with client(authority, authority.issue("alice")) as http:
        assert http.get(f"{server.url}/v1/models").status_code == 200
    for own in (None, stranger):
        with client(authority, own) as http, pytest.raises(httpx.TransportError):
            http.get(f"{server.url}/v1/models")


def test_a_renewed_certificate_is_taken_up_and_a_broken_one_is_not(
    start_server: Callable[..., LiveServer],
    authority: Authority,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = authority.issue("renewed")
    server = start_server(**options)

    def serial() -> int:
        context = ssl.create_default_context(cafile=authority.file)
        address = ("127.0.0.1", server.doors.sock.getsockname()[1])
        with (
            socket.create_connection(address, timeout=10) as sock,
            context.wrap_socket(sock, server_hostname="127.0.0.1") as wrapped,
        ):
            shown = wrapped.getpeercert(binary_form=True)
        assert shown is not None
        return x509.load_der_x509_certificate(shown).serial_number

    first = serial()
    authority.issue("renewed")
    assert serial() == first
    server.call(server.doors.reload)
    second = serial()
    assert second != first
    Path(options["ssl_keyfile"]).write_text("no key")
    server.call(server.doors.reload)
    assert "no change of certificate" in caplog.text
    assert serial() == second


def test_an_encrypted_key_is_opened_by_the_environment(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServerConfig(**authority.issue("sealed", b"open sesame"))
    begun = time.monotonic()
    for password in ("", "wrong"):
        monkeypatch.setenv("OCTAVO_SSL_KEYFILE_PASSWORD", password)
        with pytest.raises(ConfigError, match="OCTAVO_SSL_KEYFILE_PASSWORD"):
            make_context(config)
    assert time.monotonic() - begun < 5, "nobody was asked on the terminal"
    monkeypatch.setenv("OCTAVO_SSL_KEYFILE_PASSWORD", "open sesame")
    assert make_context(config) is not None


def test_wrong_files_and_combinations_are_refused(authority: Authority, tmp_path: Path) -> None:
    one, other = authority.issue("one"), authority.issue("other")
    (tmp_path / "empty.pem").touch()
    empty, certfile = str(tmp_path / "empty.pem"), one["ssl_certfile"]
    for options in (
        {"ssl_certfile": "none.pem"},
        {"ssl_certfile": empty},
        {"ssl_certfile": certfile},  # with no key in it
        {"ssl_certfile": certfile, "ssl_keyfile": other["ssl_keyfile"]},
        one | {"ssl_ca_certs": empty, "ssl_cert_reqs": 2},
    ):
        with pytest.raises(ConfigError, match="Cannot use"):
            make_context(ServerConfig.from_options(**options))
    for options in (
        {"ssl_keyfile": one["ssl_keyfile"]},
        {"ssl_ca_certs": authority.file, "ssl_cert_reqs": 2},
        one | {"ssl_ca_certs": authority.file},
        one | {"ssl_cert_reqs": 2},
        one | {"ssl_cert_reqs": 3},
    ):
        with pytest.raises(ConfigError, match="ssl_c"):
            ServerConfig.from_options(**options)
    assert make_context(ServerConfig()) is None
