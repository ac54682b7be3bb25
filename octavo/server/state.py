"""What every handler works with: one `ServerState` per server process."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import octavo
from octavo.config.server import ServerConfig
from octavo.engine.protocol import AsyncEngine
from octavo.errors import ConfigError, InvalidRequestError
from octavo.server.admission import Admission
from octavo.server.errors import model_not_found
from octavo.server.keys import KeyRing
from octavo.server.live import LiveRequests
from octavo.server.metrics import QueueMetrics, ServerMetrics
from octavo.server.tracing import Tracing
from octavo.text.chat_template import ChatTemplate
from octavo.text.prepare import Limits
from octavo.text.tokenizer import Tokenizer
from octavo.types import SamplingParams

P = ParamSpec("P")
T = TypeVar("T")

# Text beyond so many characters is tokenised in a thread: 2,000 take about 0.3 ms.
OFFLOAD_CHARS = 2048

_DEFAULT_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling fields of a checkpoint's generation_config.json.

    Raises:
        ConfigError: one of them is out of range.
    """
    found = {name: generation_config.get(name) for name in _DEFAULT_NAMES}
    defaults = {name: value for name, value in found.items() if value is not None}
    try:
        SamplingParams(**defaults)
    except InvalidRequestError as exc:
        raise ConfigError(
            f"The model's generation_config.json cannot be used: {exc} "
            "Start with --generation-config vllm to ignore it."
        ) from None
    return defaults


@dataclass(slots=True)
class ServerState:
    """The engine, the model's text side, and what the server counts.

    `generation_defaults` holds sampling fields for requests that leave them out.
    """

    engine: AsyncEngine
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    generation_defaults: Mapping[str, Any]
    served_model_names: tuple[str, ...]
    config: ServerConfig
    keys: KeyRing
    tracing: Tracing = field(default_factory=Tracing)
    limits: Limits = field(init=False)
    admission: Admission = field(init=False)
    metrics: ServerMetrics = field(init=False)
    started_s: int = field(init=False)  # Unix time
    fingerprint: str = field(init=False)
    draining: bool = field(init=False, default=False)
    live_requests: LiveRequests = field(init=False, default_factory=LiveRequests)
    request_drain: Callable[[], None] = field(init=False, default=lambda: None)
    live: dict[int, None] = field(init=False, default_factory=dict)  # engine ids, in order
    _pool: ThreadPoolExecutor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        info = self.engine.info
        self.limits = Limits.from_info(info)
        self.admission = Admission(self.config, info)
        self.engine.add_listener(self.admission.on_step)
        self.metrics = ServerMetrics(info, self.model_name, self.engine.counts)
        self.metrics.registry.register(QueueMetrics(self.admission))
        self.engine.add_listener(self.metrics.on_step)
        self.started_s = int(time.time())
        facts = (
            f"{octavo.__version__}|{info.model}|{info.dtype}|{info.kv_cache_dtype}|{info.device}"
        )
        self.fingerprint = f"fp_{hashlib.sha256(facts.encode()).hexdigest()[:12]}"
        self._pool = ThreadPoolExecutor(self.config.num_text_threads, "text")

    @property
    def model_name(self) -> str:
        return self.served_model_names[0]

    def check_model(self, name: str | None) -> str:
        """The name to answer with. ApiError 404 for one that is not served; none means ours."""
        if name is None:
            return self.model_name
        if name not in self.served_model_names:
            raise model_not_found(name, self.served_model_names)
        return name

    def need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequestError(
                "This model has no tokenizer: send prompt as token ids to /v1/completions.",
                "prompt",
            )
        return self.tokenizer

    async def offload(
        self, num_chars: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """`work(...)`, in a thread where `num_chars` of text would hold up the event loop."""
        if num_chars <= OFFLOAD_CHARS:
            return work(*args, **kwargs)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, lambda: work(*args, **kwargs))

    def abort_all(self) -> None:
        """End every request that is still running; their clients get an error that says so."""
        self.engine.abort(list(self.live))

    def close(self) -> None:
        self.tracing.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
