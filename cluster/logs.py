"""One JSON object per log line: time, level, logger, message, and the fields a call hands over in extra={"fields":
{...}}."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(level: str) -> None:
    """Our loggers and the HTTP server's go to standard error; other libraries keep theirs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for logger, its_level in ((logging.getLogger("twinring"), level), (logging.getLogger("uvicorn"), "warning")):
        logger.handlers[:] = [handler]
        logger.setLevel(its_level.upper())
        logger.propagate = False
