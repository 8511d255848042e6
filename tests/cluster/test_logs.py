"""Log lines are JSON that a collector can take apart, whatever is logged."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.logs import configure_logging


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    root = logging.getLogger("twinring")
    before = root.handlers[:], root.level, root.propagate
    configure_logging("info")
    yield logging.getLogger("twinring.cluster")
    root.handlers[:], root.propagate = before[0], before[2]
    root.setLevel(before[1])


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_line_has_its_fields(capsys: pytest.CaptureFixture[str], log: logging.Logger) -> None:
    configure_logging("info")  # again: the stream is the one that is captured now, and lines do not double
    fields = {"request_id": "r1", "reason": 'two\nlines, "quoted"', "set": {1}}
    log.info("request ended: %s", "stop", extra={"fields": fields})
    log.debug("not at this level")
    (line,) = lines(capsys)
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "logger": "twinring.cluster",
        "message": "request ended: stop",
        "request_id": "r1",
        "reason": 'two\nlines, "quoted"',
        "set": "{1}",
    }


def test_a_traceback_stays_on_its_line(capsys: pytest.CaptureFixture[str], log: logging.Logger) -> None:
    configure_logging("info")
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("it failed")
    (line,) = lines(capsys)
    assert line["level"] == "error"
    assert "Traceback" in line["exception"] and "ValueError: broken" in line["exception"]
