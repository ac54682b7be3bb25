"""Server-sent events, as a client reads them (WHATWG HTML, 9.2)."""

from __future__ import annotations

import re

_LINE_END = re.compile(rb"\r\n|\n|\r")


class EventParser:
    """Bytes as they arrive, cut anywhere, to the data of whole events."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[str]:
        """Data of each event that the chunk completes; comments and other fields are skipped."""
        text = self._rest + chunk
        held = b""
        if text.endswith(b"\r"):  # the \n of \r\n may be in the next chunk
            text, held = text[:-1], b"\r"
        *lines, rest = _LINE_END.split(text)
        self._rest = rest + held
        events = []
        for line in lines:
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data).decode("utf-8", "replace"))
                self._data = []
            elif line.startswith(b"data:"):
                value = line[5:]
                self._data.append(value[1:] if value.startswith(b" ") else value)
        return events
