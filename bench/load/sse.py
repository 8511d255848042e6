"""Server-sent events out of a stream of bytes that may be cut anywhere (WHATWG HTML, section 9.2.6). Gives the data of
each event; other fields and comments are skipped. Knows nothing of what the data means."""

from __future__ import annotations

import re

LINE_END = re.compile(rb"\r\n|\n|\r")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventParser:
    """Invariant: _rest is the beginning of a line that has not ended yet, _data the lines of an event likewise."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []
        self._at_start = True

    def feed(self, data: bytes) -> list[str]:
        """The events that end in these bytes. ValueError where a line is not UTF-8."""
        buffer = self._rest + data
        if self._at_start:
            if len(buffer) < len(BYTE_ORDER_MARK) and BYTE_ORDER_MARK.startswith(buffer):
                self._rest = buffer
                return []
            buffer, self._at_start = buffer.removeprefix(BYTE_ORDER_MARK), False
        held = b""
        if buffer.endswith(b"\r"):  # its line feed may be in the next bytes
            buffer, held = buffer[:-1], b"\r"
        *lines, rest = LINE_END.split(buffer)
        self._rest = rest + held
        return [event for line in lines if (event := self._take(line)) is not None]

    def close(self) -> list[str]:
        """The event that the end of the stream cut short of its empty line: many servers mean it."""
        events = self.feed(b"\n\n" if not self._rest.endswith(b"\r") else b"\n\n\n")
        assert not self._rest and not self._data
        return events

    def _take(self, line: bytes) -> str | None:
        """The event that an empty line ends."""
        if not line:
            data, self._data = self._data, []
            return "\n".join(data) if data else None
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" ").decode())
        return None
