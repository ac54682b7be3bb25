"""`ServerConfig`: where the HTTP server listens and what it lets in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from octavo import env
from octavo.config.options import from_options, option
from octavo.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for every interface")
    port: int = option(8000, "TCP port; 0 takes a free one and logs it")
    api_key: str | None = option(
        None, "clients must send it as `Authorization: Bearer KEY`", repr=False
    )
    served_model_name: str | None = option(
        None, "name(s) that clients use, separated by commas (default: the model as given)"
    )
    generation_config: str = option(
        "auto",
        "sampling defaults: auto takes the model's generation_config.json, vllm neutral ones",
        ("auto", "vllm"),
    )
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
    read_timeout_s: float = option(60.0, "time a client has to send its headers, and its body")
    keep_alive_s: float = option(30.0, "how long an idle connection stays open")
    shutdown_timeout_s: float = option(30.0, "time that running requests have after SIGTERM")
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
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535, not {self.port}.")
        for field in dataclasses.fields(self):
            may_be_0 = field.name.startswith(("max_queue_", "max_engine_"))
            least = 0 if may_be_0 else 1
            if field.name.startswith(("max_", "num_")) and _below(getattr(self, field.name), least):
                raise ConfigError(f"{field.name} must be at least {least}.")
            if field.name.endswith("_s") and not 0 <= getattr(self, field.name) < 1e9:
                raise ConfigError(f"{field.name} must be a number of seconds, 0 or more.")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii()):
            raise ConfigError("api_key must be a non-empty ASCII string.")
        if self.served_model_name is not None and not self.served_names(""):
            raise ConfigError("served_model_name must hold at least one name.")
        if self.otlp_traces_endpoint is not None and not _is_http_url(self.otlp_traces_endpoint):
            raise ConfigError(
                "otlp_traces_endpoint must be a URL of http or https, such as "
                f"http://localhost:4318/v1/traces, not {self.otlp_traces_endpoint!r}."
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

    def served_names(self, model: str) -> tuple[str, ...]:
        """The names under which `model` is served; the first is the one that answers carry."""
        names = (self.served_model_name or model).split(",")
        return tuple(name.strip() for name in names if name.strip())


def _below(value: int | None, least: int) -> bool:
    return value is not None and value < least


def _is_http_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        return False
