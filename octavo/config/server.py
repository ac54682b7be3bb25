"""`ServerConfig`: where the HTTP server listens and what it lets in."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from octavo import env
from octavo.config.options import from_options, option
from octavo.errors import ConfigError

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/,*]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for every interface")
    port: int = option(8000, "TCP port; 0 takes a free one and logs it")
    api_key: str | None = option(
        None, "clients must send it as `Authorization: Bearer KEY`", repr=False
    )
    api_key_file: str | None = option(
        None, "YAML file of hashed keys (octavo keys new makes them); read again when it changes"
    )
    max_streams_per_key: int | None = option(
        None, "most generating requests of one key at a time; a key's own max_streams wins"
    )
    allowed_origins: str | None = option(
        None, "web origins whose pages may call, separated by commas (default: none)"
    )
    admin_host: str = option("127.0.0.1", "address of the admin routes")
    admin_port: int | None = option(
        None, "TCP port of the admin routes; 0 takes a free one (default: no admin routes)"
    )
    ssl_keyfile: str | None = option(None, "private key, PEM (default: it is in the certfile)")
    ssl_certfile: str | None = option(None, "certificate chain, PEM; makes both ports speak TLS")
    ssl_ca_certs: str | None = option(None, "authorities whose client certificates are taken, PEM")
    ssl_cert_reqs: int = option(0, "client certificates: 0 none, 1 checked if sent, 2 required")
    served_model_name: str | None = option(
        None, "name(s) that clients use, separated by commas (default: the model as given)"
    )
    generation_config: str = option(
        "auto",
        "sampling defaults: auto takes the model's generation_config.json, vllm neutral ones",
        ("auto", "vllm"),
    )
    max_connections: int = option(4096, "most connections at a time; beyond them probes only")
    max_body_bytes: int = option(8 * 2**20, "largest request body")
    max_header_bytes: int = option(64 * 2**10, "most bytes of request line and headers together")
    max_prompts: int = option(128, "most prompts in one completions request")
    max_sequences: int = option(512, "most sequences (prompts times n) in one request")
    max_messages: int = option(4096, "most messages in one chat request")
    max_queue_requests: int | None = option(
        None, "most sequences that wait for the engine (default: 4 times max_num_seqs; 0: no limit)"
    )
    max_queue_tokens: int | None = option(
        None,
        "most prompt tokens that wait (default: 256 times max_num_batched_tokens; 0: no limit)",
    )
    request_timeout_s: float = option(
        0.0, "longest that a request may take; its own timeout can be shorter (0: no limit)"
    )
    write_timeout_s: float = option(
        60.0, "a client that reads nothing of its answer for so long is cut off (0: never)"
    )
    sse_keep_alive_interval_s: float = option(
        15.0, "a stream that has nothing to say for so long sends a comment (0: never)"
    )
    read_timeout_s: float = option(60.0, "time a client has to send its headers, and its body")
    # Longer than the 60 s of nginx and most balancers: who closes an idle connection must be the
    # side that sends the requests, or one of them meets a closed connection now and then.
    keep_alive_s: float = option(75.0, "how long an idle connection stays open")
    drain_grace_s: float = option(
        1.0, "after SIGTERM: how long new connections are still taken, for balancers to notice"
    )
    drain_timeout_s: float = option(30.0, "after SIGTERM: time that running requests have")
    stall_timeout_s: float = option(
        60.0, "an engine that has work and finishes no step for so long is replaced"
    )
    max_engine_restarts: int = option(
        10, "restarts of a dead engine in a row, without progress, before the server ends"
    )
    spare_engine: bool = option(
        True, "keep a process at hand that has imported torch, for a restart in a second"
    )
    flight_recorder: bool = option(
        True, "keep the engine's last steps, and write them to crash_dir when it dies"
    )
    crash_dir: str | None = option(
        None, "folder for flight recordings, which hold prompts (default: OCTAVO_HOME/crashes)"
    )
    num_text_threads: int = option(2, "threads that tokenise and render long prompts")
    access_log: bool = option(False, "log every request")
    log_format: str | None = option(
        None, "json logs one object a line (default: OCTAVO_LOG_FORMAT, or text)", ("text", "json")
    )

    otlp_traces_endpoint: str | None = option(
        None,
        "URL of a collector that takes OTLP over HTTP, such as http://localhost:4318/v1/traces "
        "(default: no traces)",
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            may_be_0 = field.name.startswith(("max_queue_", "max_engine_"))
            least = 0 if may_be_0 else 1
            if field.name.startswith(("max_", "num_")) and value < least:
                raise ConfigError(f"{field.name} must be at least {least}.")
            if field.name.endswith("_s") and not 0 <= value < 1e9:
                raise ConfigError(f"{field.name} must be a number of seconds, 0 or more.")
            if field.name.endswith("port") and not 0 <= value <= 65535:
                raise ConfigError(f"{field.name} must be between 0 and 65535, not {value}.")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii()):
            raise ConfigError("api_key must be a non-empty ASCII string.")
        if self.served_model_name is not None and not self.served_names(""):
            raise ConfigError("served_model_name must hold at least one name.")
        for origin in self.origins():
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"allowed_origins holds {origin!r}; write each as a browser sends it, such as "
                    "https://chat.example:8443, in small letters and without a path or wildcard."
                )
        if self.otlp_traces_endpoint is not None and not _is_http_url(self.otlp_traces_endpoint):
            raise ConfigError(
                "otlp_traces_endpoint must be a URL of http or https, such as "
                f"http://localhost:4318/v1/traces, not {self.otlp_traces_endpoint!r}."
            )
        self._check_admin()
        self._check_tls()

    def _check_admin(self) -> None:
        if self.admin_port is None or self.has_keys or is_loopback(self.admin_host):
            return
        raise ConfigError(
            f"The admin routes would be open to anybody who reaches {self.admin_host}: set "
            "--api-key-file with a key of scope admin, or keep --admin-host on 127.0.0.1."
        )

    def _check_tls(self) -> None:
        if self.ssl_cert_reqs not in (0, 1, 2):
            raise ConfigError(f"ssl_cert_reqs must be 0, 1 or 2, not {self.ssl_cert_reqs}.")
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            raise ConfigError("ssl_keyfile and ssl_ca_certs need ssl_certfile.")
        if bool(self.ssl_ca_certs) != bool(self.ssl_cert_reqs):
            raise ConfigError(
                "Client certificates need both: ssl_ca_certs says whose, and ssl_cert_reqs (1 or "
                "2) that they are checked."
            )

    @classmethod
    def from_options(cls, **options: Any) -> ServerConfig:
        """Build from keyword options; an absent api_key comes from OCTAVO_API_KEY.

        Raises ConfigError for an option that is unknown or malformed.
        """
        if options.get("api_key") is None:
            options["api_key"] = env.get("OCTAVO_API_KEY") or None
        return from_options(cls, options)

    @property
    def crash_folder(self) -> Path | None:
        """Where flight recordings go; None if there are to be none."""
        if not self.flight_recorder:
            return None
        return Path(self.crash_dir).expanduser() if self.crash_dir else env.home() / "crashes"

    @property
    def has_keys(self) -> bool:
        return self.api_key is not None or self.api_key_file is not None

    def origins(self) -> tuple[str, ...]:
        """The web origins whose pages may call."""
        names = (self.allowed_origins or "").split(",")
        return tuple(name.strip() for name in names if name.strip())

    def served_names(self, model: str) -> tuple[str, ...]:
        """The names under which `model` is served; the first is the one that answers carry."""
        names = (self.served_model_name or model).split(",")
        return tuple(name.strip() for name in names if name.strip())


def is_loopback(host: str) -> bool:
    """True for an address that only this machine can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_http_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False
