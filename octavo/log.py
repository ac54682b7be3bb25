"""Logger factory: `logger = get_logger(__name__)`. Formatting is set up once, by the process that
owns stderr.
"""

from __future__ import annotations

import logging

from octavo import env

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def get_logger(name: str) -> logging.Logger:
    return logging.getLogger(name)


def setup_logging(prefix: str = "") -> None:
    """Log to stderr at OCTAVO_LOG_LEVEL. `prefix` names the process, e.g. "engine"."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter(f"{prefix + ' ' if prefix else ''}{_FORMAT}", "%H:%M:%S")
    )
    root = logging.getLogger("octavo")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(env.get("OCTAVO_LOG_LEVEL").upper())
