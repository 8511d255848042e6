"""Writes what the Router is fed, and what it chose, to a file: JSON lines that simulator/replay.py runs again. Decides
nothing. The file holds prompts and answers, so it is for the owner only."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from typing import TextIO

from router.config import RouterConfig
from router.event_codec import Json, encode_choices, encode_config, encode_event
from router.events import Effect, Event

log = logging.getLogger("twinring.router")


class EventRecorder:
    """Invariant: a file that is open has the settings in its first line, then one line for every event since. One that
    cannot be written any more is closed: serving goes on without it."""

    def __init__(self, path: str, config: RouterConfig) -> None:
        """OSError where it cannot be written. What was there is overwritten."""
        self._path = path
        self._file: TextIO | None = open(path, "w", encoding="utf-8", opener=_for_owner_only)  # noqa: SIM115
        self._write({"config": encode_config(config)})

    def record(self, event: Event, now: float, effects: Sequence[Effect]) -> None:
        if self._file is not None:
            self._write({"now": now, "event": encode_event(event), "choices": encode_choices(effects)})

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                log.error("the end of %s could not be written: %s", self._path, error)

    def _write(self, line: Json) -> None:
        assert self._file is not None
        try:
            self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        except OSError as error:
            log.error("events are recorded no more: %s cannot be written: %s", self._path, error)
            self.close()


def _for_owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
