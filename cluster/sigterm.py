"""What SIGTERM does to a process that Ray has made: the actor in it asks to leave, in place of Ray's own handler, which
ends the process with all that it has. Only a process' main thread can set a handler. Ray imports an actor's module
there, and runs the actor elsewhere: so the handler is set when this module is imported, and asks who has called
`on_sigterm` meanwhile."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

RAY_PROGRAM = "default_worker.py"  # what every process of an actor runs

_actors: list[Callable[[], None]] = []


def on_sigterm(leave: Callable[[], None]) -> None:
    """`leave` is called on the main thread."""
    _actors.append(leave)


def _handle(number: int, frame: FrameType | None) -> None:
    if not _actors:
        os._exit(128 + number)
    for leave in _actors:
        leave()


if Path(sys.argv[0]).name == RAY_PROGRAM:
    signal.signal(signal.SIGTERM, _handle)
