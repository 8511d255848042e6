"""Reads traces: Mooncake's JSON lines, Azure's CSV, the log of `twinring serve`. Decides which lines are requests and
says why others are not; whether to go on without them is the caller's choice. Knows nothing of what the tokens are.

Formats: Qin et al., Mooncake, FAST '25; Patel et al., Splitwise, ISCA '24; docs/simulator.md."""

from __future__ import annotations

import csv
import io
import itertools
import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from simulator.requests import TRACE_BLOCK_TOKENS, SimRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    LineParser = Callable[[str], SimRequest | None]  # None: a line of another kind, which is no fault

MAX_LINES_TOLD = 3
MAX_WINDOW_NBYTES = 1 << 31  # of files compressed with --long
MOONCAKE_COUNTS = ("timestamp", "input_length", "output_length")
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
LOG_MESSAGE = "request ended"


@dataclass(frozen=True, slots=True)
class BadLine:
    number: int  # from 1
    reason: str


@dataclass(frozen=True, slots=True)
class Trace:
    requests: tuple[SimRequest, ...]  # by time; the first at 0
    bad_lines: tuple[BadLine, ...] = ()
    has_prefixes: bool = True  # else every prompt shares nothing with any other, because the trace does not say

    def notes(self) -> list[str]:
        """What a reader of the results must know."""
        notes = [] if self.has_prefixes else ["the trace names no prefixes: no prompt shares anything with another"]
        if self.bad_lines:
            notes.append(f"{len(self.bad_lines)} lines of the trace left out ({self._reasons()})")
        return notes

    def bad_lines_text(self) -> str:
        return f"{len(self.bad_lines)} lines of the trace cannot be read ({self._reasons()})"

    def _reasons(self) -> str:
        told = "; ".join(f"line {bad.number}: {bad.reason}" for bad in self.bad_lines[:MAX_LINES_TOLD])
        return told + (", ..." if len(self.bad_lines) > MAX_LINES_TOLD else "")


def read_trace(path: Path) -> Trace:
    """The format is told from the content. ValueError where the file holds no request, or needs `zstandard`."""
    with open_lines(path) as lines:
        return parse_trace(lines)


def open_lines(path: Path) -> io.TextIOBase:
    if path.suffix != ".zst":
        return path.open(encoding="utf-8", errors="replace")
    if find_spec("zstandard") is None:
        raise ValueError(f"{path} needs zstandard: pip install zstandard, or decompress it with zstd -d --long=27")
    from zstandard import ZstdDecompressor

    compressed = path.open("rb")
    reader = ZstdDecompressor(max_window_size=MAX_WINDOW_NBYTES).stream_reader(compressed, closefd=True)
    return io.TextIOWrapper(io.BufferedReader(reader), encoding="utf-8", errors="replace")


def parse_trace(lines: Iterable[str]) -> Trace:
    """Of any of the three formats. ValueError where no line holds a request."""
    lines = iter(lines)
    head: list[str] = []
    first = ""
    while not first.strip() and (line := next(lines, None)) is not None:
        head.append(first := line)
    lines = itertools.chain(head, lines)  # blank lines too: they count
    if first.lstrip("\ufeff").upper().startswith(AZURE_COLUMNS[0]):
        return parse_azure(lines)
    if '"logger"' in first:
        return parse_log(lines)
    return parse_mooncake(lines)


def parse_mooncake(lines: Iterable[str]) -> Trace:
    """ValueError where no line holds a request."""
    return _trace(enumerate(lines, start=1), _mooncake_request)


def parse_azure(lines: Iterable[str]) -> Trace:
    """The first line that is not blank names the columns. ValueError where no line holds a request."""
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    _, header = next(numbered, (0, ""))
    names = [name.strip() for name in header.lstrip("\ufeff").split(",")]
    if not set(AZURE_COLUMNS) <= set(names):
        raise ValueError(f"the columns must be {', '.join(AZURE_COLUMNS)}, not {header.strip()!r}")
    return _without_prefixes(_trace(numbered, lambda line: _azure_request(names, line)))


def parse_log(lines: Iterable[str]) -> Trace:
    """Lines of `twinring serve` that say `request ended`; others are passed over. The log says how long prompts were,
    not what was in them. ValueError where no line holds a request."""
    return _without_prefixes(_trace(enumerate(lines, start=1), _log_request))


# --- lines ----------------------------------------------------------------------------------------------------------


def _trace(numbered: Iterator[tuple[int, str]], parse_line: LineParser) -> Trace:
    requests: list[SimRequest] = []
    bad_lines: list[BadLine] = []
    for number, line in numbered:
        if not line.strip():
            continue
        try:
            request = parse_line(line)
        except ValueError as error:
            bad_lines.append(BadLine(number, str(error)))
        else:
            requests += [] if request is None else [request]
    if not requests:
        reasons = Trace((), tuple(bad_lines)).notes() or ["it is empty"]
        raise ValueError(f"no request in the trace: {reasons[0]}")
    requests.sort(key=lambda request: request.at_s)
    start_s = requests[0].at_s
    return Trace(tuple(replace(r, at_s=r.at_s - start_s) for r in requests), tuple(bad_lines))


def _without_prefixes(trace: Trace) -> Trace:
    """Gives every block of every prompt an id of its own."""
    next_id = itertools.count()
    requests = tuple(
        replace(request, hash_ids=tuple(itertools.islice(next_id, len(request.hash_ids)))) for request in trace.requests
    )
    return replace(trace, requests=requests, has_prefixes=False)


def _json_object(line: str) -> dict[str, object]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from error
    if not isinstance(record, dict):
        raise ValueError("not an object")
    return record


def _mooncake_request(line: str) -> SimRequest:
    record = _json_object(line)
    timestamp, num_prompt_tokens, num_output_tokens = (_count(record, name) for name in MOONCAKE_COUNTS)
    hash_ids = record.get("hash_ids")
    if not isinstance(hash_ids, list) or not all(type(hash_id) is int for hash_id in hash_ids):
        raise ValueError("hash_ids is not a list of integers")
    if len(hash_ids) != -(-num_prompt_tokens // TRACE_BLOCK_TOKENS):
        raise ValueError(f"{len(hash_ids)} hash_ids for input_length {num_prompt_tokens}")
    if not num_prompt_tokens or not num_output_tokens:
        raise ValueError("input_length and output_length must be positive")
    return SimRequest(timestamp / 1e3, num_output_tokens, tuple(hash_ids), num_prompt_tokens)


def _azure_request(names: list[str], line: str) -> SimRequest:
    fields = next(csv.reader([line]))
    if len(fields) != len(names):
        raise ValueError(f"{len(fields)} fields for {len(names)} columns")
    record: dict[str, object] = dict(zip(names, fields, strict=True))
    at, *counts = (str(record[name]).strip() for name in AZURE_COLUMNS)
    for name, count in zip(AZURE_COLUMNS[1:], counts, strict=True):
        if not count.isdecimal() or int(count) == 0:
            raise ValueError(f"{name} is {count!r}")
    return _bare_request(_instant(AZURE_COLUMNS[0], at), int(counts[0]), int(counts[1]))


def _log_request(line: str) -> SimRequest | None:
    record = _json_object(line)
    if not str(record.get("message", "")).startswith(LOG_MESSAGE):
        return None
    num_prompt_tokens, num_output_tokens = (_count(record, n) for n in ("num_prompt_tokens", "num_output_tokens"))
    if num_prompt_tokens == 0:
        raise ValueError("num_prompt_tokens is 0")
    e2e_s = record.get("e2e_s", 0.0)  # not there where a request ended before any worker had it
    if not isinstance(e2e_s, int | float) or not 0 <= e2e_s < float("inf"):
        raise ValueError(f"e2e_s is {e2e_s!r}")
    at_s = _instant("time", str(record.get("time"))) - e2e_s
    return _bare_request(at_s, num_prompt_tokens, max(1, num_output_tokens))


def _bare_request(at_s: float, num_prompt_tokens: int, num_output_tokens: int) -> SimRequest:
    """Its ids come later; until then they only say how many."""
    ids = range(-(-num_prompt_tokens // TRACE_BLOCK_TOKENS))
    return SimRequest(at_s, num_output_tokens, tuple(ids), num_prompt_tokens)


def _instant(name: str, text: str) -> float:
    """Seconds since 1970; UTC where the text names no zone."""
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}") from None
    return (instant if instant.tzinfo else instant.replace(tzinfo=UTC)).timestamp()


def _count(record: dict[str, object], name: str) -> int:
    value = record.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is {value!r}")
    return value
