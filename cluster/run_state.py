"""Where `twinring status`, `generate` and `stop` find the cluster that `twinring serve` started on this machine: one
small file per server, gone when it ends."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError


@dataclass(frozen=True, slots=True)
class RunState:
    pid: int
    addresses: tuple[str, ...]  # gRPC, of each router
    http_addresses: tuple[str, ...]  # none: off
    drain_timeout_s: float  # how long it may take to stop because requests run

    @property
    def address(self) -> str:
        return self.addresses[0]

    @property
    def http_address(self) -> str:
        return self.http_addresses[0] if self.http_addresses else ""


READ_STATE = TypeAdapter(RunState)


def state_dir() -> Path:
    """Private to the user: whoever can write here can tell `stop` whom to signal."""
    folder = Path(tempfile.gettempdir()) / f"twinring-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ValueError(f"{folder} belongs to another user")
    return folder


@contextlib.contextmanager
def announced(state: RunState) -> Iterator[None]:
    path = state_dir() / f"{state.pid}.json"
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(asdict(state)))
    draft.replace(path)  # readers see a whole file or none
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def running_servers() -> list[RunState]:
    """Servers whose process is alive, oldest first; files of dead ones are removed."""
    found = []
    for path in state_dir().glob("*.json"):
        # A server that ends meanwhile takes its file along; another version may write another file.
        with contextlib.suppress(FileNotFoundError, ValidationError):
            state = READ_STATE.validate_json(path.read_text())
            if is_alive(state.pid):
                found.append((path.stat().st_mtime, state))
            else:
                path.unlink()
    return [state for _, state in sorted(found, key=lambda pair: pair[0])]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
