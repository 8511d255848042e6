"""The files of the page at /ui, by the path that each is served at, and what a browser is held to. Knows no
server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "ui"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    body: bytes
    media_type: str


def page_files() -> dict[str, PageFile]:
    """/ui itself, and /ui/... for each file that it asks for."""
    paths = {f"/ui/{path.name}" if path.name != "index.html" else "/ui": path for path in FOLDER.iterdir()}
    return {at: PageFile(path.read_bytes(), MEDIA_TYPES[path.suffix]) for at, path in sorted(paths.items())}
