"""The page at /ui in a real browser: against a made-up cluster, and once against a live one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from router.status import StatusEvent
from tests.cluster.browser import Visit, chromium, visiting
from tests.cluster.server import serving
from tests.cluster.ui_stand_in import stand_in
from tests.router.busy_cluster import NOW

SIZES = ((1280, 800), (768, 1024), (380, 800))
READABLE = 4.5  # WCAG 2.2 AA
MARKUP = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def prompt(visit: Visit, text: str, max_tokens: int, kind: str = "chat") -> None:
    visit.page.get_by_label("Prompt", exact=True).fill(text)
    visit.page.get_by_label("Kind").select_option(kind)
    visit.page.get_by_label("Max tokens").fill(str(max_tokens))
    visit.page.get_by_role("button", name="Send").click()


def test_a_hundred_workers_fit_and_can_be_read_in_both_schemes_and_on_a_phone(browser: Browser) -> None:
    with stand_in(50, 50) as server, visiting(browser, f"{server.url}/ui") as visit:
        expect(visit.page.locator(".tile")).to_have_count(100)
        expect(visit.page.locator(".tile.down")).to_have_count(1)
        expect(visit.page.locator("#rings .arc")).to_have_count(2 * 49)
        expect(visit.page.locator("#requests tr")).to_have_count(20)
        for (width, height), scheme in product(SIZES, ("light", "dark")):
            visit.look(width, height, scheme)
            assert visit.width_to_scroll() == 0, (width, scheme)
            poor = {name: ratio for name, ratio in visit.contrasts().items() if ratio < READABLE}
            assert not poor, (width, scheme)


def test_pointing_at_a_worker_shows_its_part(browser: Browser) -> None:
    with stand_in(50, 50) as server, visiting(browser, f"{server.url}/ui") as visit:
        tile = visit.page.get_by_role("button", name="prefill-7:")
        tile.focus()
        expect(visit.page.locator("#detail")).to_contain_text("prefill-7:")
        expect(visit.page.locator("#detail")).to_contain_text("of the two rings")
        expect(visit.page.locator("#rings .arc.lit")).to_have_count(2)
        visit.page.keyboard.press("Enter")
        expect(tile).to_have_attribute("aria-pressed", "true")
        assert tile.evaluate("element => element === document.activeElement")  # what polls does not take the focus


@pytest.mark.parametrize(("kind", "field"), [("chat", "messages"), ("completion", "prompt")])
def test_a_prompt_streams_and_shows_its_timeline(browser: Browser, kind: str, field: str) -> None:
    with stand_in(2, 2) as server, visiting(browser, f"{server.url}/ui") as visit:
        expect(visit.page.get_by_role("status").first).to_have_text("ready")
        prompt(visit, "Hello", 12, kind)
        expect(visit.page.locator("#answer")).to_contain_text("word11")
        expect(visit.page.locator("#run-status")).to_have_text("done: length")
        for span in ("front", "queue", "prefill", "transfer", "decode"):
            expect(visit.page.locator(f"#timeline .span.{span}")).to_have_count(1)
        expect(visit.page.locator("#timeline .tick")).to_have_count(12)
        expect(visit.page.locator("#timeline .costs")).to_contain_text("Cached of them64")
        expect(visit.page.locator(".tile.ran .name")).to_have_text(["prefill-0", "decode-0"])
        body = server.prompts[0]
        assert field in body and body["model"] == "demo-model" and body["include_account"] is True
        visit.look(380, 800, "dark")
        assert visit.width_to_scroll() == 0
        assert min(visit.contrasts().values()) >= READABLE


def test_a_run_can_be_stopped_and_another_started(browser: Browser) -> None:
    with stand_in(1, 1) as server, visiting(browser, f"{server.url}/ui") as visit:
        prompt(visit, "Hello", 900)
        expect(visit.page.locator("#answer")).to_contain_text("word3")
        visit.page.get_by_role("button", name="Stop").click()
        expect(visit.page.locator("#run-status")).to_have_text("stopped")
        prompt(visit, "Hello", 2)
        expect(visit.page.locator("#run-status")).to_have_text("done: length")
        expect(visit.page.locator("#answer")).to_have_text("word0 word1 ")


def test_a_refusal_is_told_in_its_own_words(browser: Browser) -> None:
    with stand_in(1, 1) as server, visiting(browser, f"{server.url}/ui") as visit:
        prompt(visit, "Hello", 5000)
        expect(visit.page.locator("#run-status")).to_have_text("failed: 400: max_tokens must be at most 1000, got 5000")
        assert visit.complaints.pop().endswith("400 (Bad Request)")  # the browser's own note


def test_a_token_is_asked_for_and_kept_in_the_tab_only(browser: Browser) -> None:
    with stand_in(1, 1, token="secret-1") as server, visiting(browser, f"{server.url}/ui") as visit:
        visit.page.get_by_label("Operator's token").fill("wrong")
        visit.page.get_by_role("button", name="Show").click()
        expect(visit.page.locator("#status")).to_have_text("this token is not an operator's")
        visit.page.get_by_label("Operator's token").fill("secret-1")
        visit.page.get_by_role("button", name="Show").click()
        expect(visit.page.locator(".tile")).to_have_count(2)
        expect(visit.page.locator("#token-form")).to_be_hidden()
        assert visit.page.evaluate("[localStorage.length, document.cookie, Object.values(sessionStorage).join()]") == [
            0,
            "",
            "secret-1",
        ]
        assert not [url for url in visit.urls if "secret" in url]
        assert visit.complaints and all("401 (Unauthorized)" in complaint for complaint in visit.complaints)
        visit.complaints.clear()


def test_what_is_told_is_text_and_never_markup(browser: Browser) -> None:
    with stand_in(1, 1) as server:
        server.cluster.status.events.append(StatusEvent(NOW, MARKUP))
        with visiting(browser, f"{server.url}/ui") as visit:
            expect(visit.page.locator("#events li").first).to_contain_text(MARKUP)
            assert visit.page.locator("img").count() == 0


def test_a_hidden_tab_asks_for_nothing(browser: Browser) -> None:
    with stand_in(1, 1) as server, visiting(browser, f"{server.url}/ui") as visit:
        expect(visit.page.locator(".tile")).to_have_count(2)
        visit.page.evaluate("Object.defineProperty(document, 'hidden', { configurable: true, get: () => true })")
        visit.page.wait_for_timeout(300)  # one may be under way
        num_asked = len(visit.urls)
        visit.page.wait_for_timeout(2500)
        assert len(visit.urls) == num_asked
        visit.page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
        with visit.page.expect_request("**/ui/state*"):
            pass


def test_a_router_that_is_gone_is_said_to_be(browser: Browser) -> None:
    with stand_in(1, 1) as server, visiting(browser, f"{server.url}/ui") as visit:
        expect(visit.page.locator("#status")).to_have_text("ready")
        visit.page.route("**/ui/state*", lambda route: route.abort())
        expect(visit.page.locator("#status")).to_have_text("no answer from the router")
        assert visit.complaints and all("net::ERR_FAILED" in complaint for complaint in visit.complaints)
        visit.complaints.clear()
        visit.page.unroute("**/ui/state*")
        expect(visit.page.locator("#status")).to_have_text("ready")
        visit.complaints.clear()


@pytest.mark.ray
def test_a_live_cluster_is_shown_and_answers(browser: Browser, tmp_path: Path) -> None:
    with serving(tmp_path) as server, visiting(browser, f"http://{server.http_address}/ui") as visit:
        expect(visit.page.locator("#status")).to_have_text("ready")
        expect(visit.page.locator(".tile .name")).to_have_text(["prefill-0", "decode-0"])
        expect(visit.page.locator("#rings .arc")).to_have_count(2)
        for kind in ("completion", "chat"):
            prompt(visit, "Once upon a time " * 20, 24, kind)
            expect(visit.page.locator("#run-status")).to_have_text(re.compile("done: (length|stop)"))
            expect(visit.page.locator("#answer")).not_to_be_empty()
            expect(visit.page.locator("#timeline .span.prefill")).to_have_count(1)
            expect(visit.page.locator("#timeline .costs")).to_contain_text("disaggregated")
            expect(visit.page.locator(".tile.ran .name")).to_have_text(["prefill-0", "decode-0"])
        expect(visit.page.locator("#requests tr")).to_have_count(2)
        expect(visit.page.locator("#requests .workers").first).to_have_text("prefill-0 → decode-0")
        expect(visit.page.locator("#flows .flow")).to_have_count(1)
        expect(visit.page.locator("#ttft circle")).to_have_count(2)
        for (width, height), scheme in product(SIZES, ("light", "dark")):
            visit.look(width, height, scheme)
            assert visit.width_to_scroll() == 0, (width, scheme)
