"""Every error that Octavo raises on purpose. Each message says what is wrong and what to do.

OctavoError
├── ConfigError             an option, flag or combination of them cannot be honoured
├── CheckpointError         a model folder, file or hub id cannot be found or read
│   └── WeightsError        a tensor is missing, unexpected, doubled or of the wrong shape
├── UnsupportedModelError   the architecture or a feature of it is not implemented
├── InvalidRequestError     a request is malformed; costs its sender a 400 and nobody else anything
│   ├── ContextLengthError  prompt and context do not fit together
│   └── CapacityError       the request could never fit the KV cache
└── EngineError             the engine itself failed
    └── EngineDeadError     the engine process is gone
"""

from __future__ import annotations


class OctavoError(Exception):
    """Base of all of Octavo's own errors."""


class ConfigError(OctavoError):
    """An option cannot be honoured."""


class CheckpointError(OctavoError):
    """A checkpoint cannot be found or read."""


class WeightsError(CheckpointError):
    """A tensor of a checkpoint is missing, unexpected, doubled or of the wrong shape."""


class UnsupportedModelError(OctavoError):
    """The architecture, or a feature that the checkpoint asks for, is not implemented."""


class InvalidRequestError(OctavoError):
    """A request is malformed.

    Args:
        message: what is wrong and what to do, in words for the sender.
        param: the request field at fault, if one is.
        code: OpenAI's machine-readable code, if there is one.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(InvalidRequestError):
    """The prompt does not fit the model's context."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param, "context_length_exceeded")


class CapacityError(InvalidRequestError):
    """The request could never fit the KV cache, however long it waited."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param, "kv_cache_too_small")


class EngineError(OctavoError):
    """The engine failed."""


class EngineDeadError(EngineError):
    """The engine process has ended; the message carries its cause."""
