"""A headless Chromium for tests of the page at /ui, and what is held of every page: no error, nothing blocked, nothing
fetched from elsewhere, no sideways scrolling, text that can be read."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
WAIT_MS = 15_000

# WCAG 2.2, 1.4.3: relative luminances of a text and of the nearest painted ground behind it.
CONTRASTS = """() => {
  const ink = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    ink.clearRect(0, 0, 1, 1); ink.fillStyle = color; ink.fillRect(0, 0, 1, 1);
    return [...ink.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (color) => rgba(color).slice(0, 3).map((part) => part / 255)
    .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (rgba(color)[3] === 255) return color;
    }
    return "white";
  };
  const found = {};
  for (const element of document.body.querySelectorAll("*")) {
    const hasText = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (!hasText || !element.checkVisibility() || element.matches(":disabled, title, option")) continue;
    const style = getComputedStyle(element), isDrawn = element instanceof SVGElement;
    const [a, b] = [luminance(isDrawn ? style.fill : style.color), luminance(ground(element))].sort((x, y) => y - x);
    const name = `${element.tagName} ${element.getAttribute("class") ?? ""}`;
    found[name] = Math.min(found[name] ?? 99, (a + 0.05) / (b + 0.05));
  }
  return found;
}"""


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:  # a fresh user data folder each time
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS.split())
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    page: Page
    complaints: list[str] = field(default_factory=list)  # what the console and the script said
    urls: list[str] = field(default_factory=list)

    def width_to_scroll(self) -> int:
        """Pixels that stick out sideways."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - innerWidth"))

    def look(self, width: int, height: int, scheme: str) -> None:
        self.page.set_viewport_size({"width": width, "height": height})
        self.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]

    def contrasts(self) -> dict[str, float]:
        """The poorest contrast of each kind of element with text."""
        found: dict[str, float] = self.page.evaluate(CONTRASTS)
        return found


@contextlib.contextmanager
def visiting(browser: Browser, url: str) -> Iterator[Visit]:
    """A page in a context of its own; afterwards nothing may have gone wrong there that the test did not take away."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(WAIT_MS)
    visit = Visit(context.new_page())
    visit.page.on("console", lambda message: visit.complaints.extend(_complaint(message)))
    visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    visit.page.on("request", lambda request: visit.urls.append(request.url))
    try:
        visit.page.goto(url)
        yield visit
        assert not visit.complaints
        origin = url.removesuffix("/ui")
        assert all(each.startswith((origin, "data:")) for each in visit.urls), visit.urls
    finally:
        context.close()


def _complaint(message: ConsoleMessage) -> list[str]:
    return [message.text] if message.type in ("error", "warning") else []
