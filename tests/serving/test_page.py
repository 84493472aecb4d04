"""The web page in a real browser, asking a real server."""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import expect

from mlx_llava.inputs.image import data_url
from tests import browser
from tests.conftest import ROOT
from tests.films import film
from tests.servers import serving

pytestmark = pytest.mark.skipif(
    browser.find() is None, reason="there is no Chromium; Debian's package is called chromium"
)

SHAPES = ROOT / "weights" / "tiny-llava" / "examples" / "shapes.png"
QUESTION = "What colour is the triangle?"
MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script><b>bold</b>"
#: Every letter of it is a choice of the model, so that none comes for nothing.
ENDLESS = {"type": "string", "minLength": 5000}


@pytest.fixture(scope="module")
def chromium():
    with browser.browser() as running:
        yield running


@pytest.fixture
def open_page(chromium, served):
    """Opens a server's page; in the end, nothing may have gone wrong in any of them."""
    contexts, wrong = [], []

    def open_page(server=served, **options):
        context = chromium.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: wrong.append(request.url) if away(request) else None)
        page.goto(server.url)
        return page

    def away(request):
        return not request.url.startswith(("http://127.0.0.1:", "data:", "blob:"))

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def page(open_page):
    return open_page()


def ask(page, text, *pictures):
    if pictures:
        page.get_by_label("Add pictures").set_input_files([str(path) for path in pictures])
        expect(page.get_by_role("button", name="Remove picture")).to_have_count(len(pictures))
    page.get_by_label("Question").fill(text)
    page.keyboard.press("Enter")


def answers(page):
    return page.get_by_role("article").locator(".text").filter(visible=True)


def answered(page, count=1):
    """Waits for the figures of so many answers; their texts."""
    expect(page.locator(".figures")).to_have_count(count)
    return page.locator(".assistant .text").all_inner_texts()


def test_question_and_second_question(page):
    expect(page.get_by_role("heading", name="tiny-llava")).to_be_visible()
    ask(page, QUESTION, SHAPES)
    assert answered(page) == ["red"]
    expect(page.get_by_role("img", name="Picture 1")).to_be_visible()
    assert re.fullmatch(
        r"\d+ \+ 2 tokens.* · first after [\d.]+ s · [\d.]+ tokens/s · [\d.]+ s in all",
        page.locator(".figures").inner_text(),
    )
    ask(page, "And the square?")
    assert len(answered(page, 2)) == 2
    assert "known" in page.locator(".figures").last.inner_text()
    expect(page.get_by_label("Question")).to_be_focused()


def test_several_pictures_one_taken_back(page):
    page.get_by_label("Add pictures").set_input_files([str(SHAPES), str(SHAPES)])
    page.get_by_role("button", name="Remove picture 1").click()
    ask(page, QUESTION)
    assert answered(page) == ["red"]
    expect(page.get_by_role("article").get_by_role("img")).to_have_count(1)


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_pictures_that_are_pasted_or_dropped(page, way):
    page.evaluate(
        """async ([way, url]) => {
            const blob = await (await fetch(url)).blob();
            const data = new DataTransfer();
            data.items.add(new File([blob], "shapes.png", { type: "image/png" }));
            const event = way === "paste"
                ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true })
                : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
            document.body.dispatchEvent(event);
        }""".replace("await (await fetch(url)).blob()", BLOB),
        [way, data_url(SHAPES.read_bytes())],
    )
    expect(page.get_by_role("button", name="Remove picture 1")).to_be_visible()
    ask(page, QUESTION)
    assert answered(page) == ["red"]


#: The page's policy lets it fetch nothing but its own server, data: URLs included.
BLOB = "new Blob([Uint8Array.from(atob(url.split(',')[1]), (c) => c.charCodeAt(0))])"


def test_stop_keeps_what_was_said(served, open_page):
    with serving("--json-schema", json.dumps(ENDLESS), engine=served.engine) as endless:
        page = open_page(endless)
        for stop in (lambda: page.get_by_role("button", name="Stop").click(), escape(page)):
            ask(page, "Go on.")
            expect(page.locator(".assistant[aria-busy=true] .text")).to_contain_text(
                re.compile(r"\w")
            )
            stop()
            expect(page.locator(".figures").last).to_have_text("stopped")
            assert page.locator(".assistant .text").last.inner_text().startswith('"')
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        page.close()
    assert served.engine.running == 0


def escape(page):
    return lambda: page.keyboard.press("Escape")


def test_what_the_model_says_is_text(served, open_page):
    with serving("--json-schema", json.dumps({"const": MARKUP}), engine=served.engine) as hostile:
        page = open_page(hostile)
        ask(page, MARKUP, SHAPES)
        (said,) = answered(page)
        assert json.loads(said) == MARKUP
        assert page.locator("#log script, #log b, #log img[src=x]").count() == 0
        page.get_by_role("button", name="Conversations").click()
        expect(page.locator("#conversations button").first).to_have_text(MARKUP)
        page.close()


def test_errors_are_shown_and_the_question_comes_back(page):
    ask(page, "word " * 3000, SHAPES)
    expect(page.get_by_role("alert")).to_contain_text("context of 1024")
    expect(page.get_by_label("Question")).to_have_value(("word " * 3000).strip())
    expect(page.get_by_role("button", name="Remove picture 1")).to_be_visible()
    ask(page, QUESTION)
    assert answered(page) == ["red"]
    expect(page.get_by_role("alert")).to_be_hidden()


def test_files_that_are_no_pictures(page, tmp_path):
    (tmp_path / "a.txt").write_text("no picture")
    page.get_by_label("Add pictures").set_input_files(str(tmp_path / "a.txt"))
    expect(page.get_by_role("alert")).to_have_text("Only pictures and videos can be added.")


def test_again_and_settings(page):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("2")
    page.get_by_label("Longest answer").fill("5")
    page.get_by_label("Seed").fill("1")
    page.get_by_role("button", name="Done").click()
    ask(page, "Describe the picture.", SHAPES)
    first = answered(page)
    assert "+ 5 tokens" in page.locator(".figures").inner_text()
    page.get_by_role("button", name="Again").click()
    assert answered(page) == first
    page.reload()
    page.get_by_role("button", name="Settings").click()
    expect(page.get_by_label("Seed")).to_have_value("1")


def test_only_the_newest_picture(page):
    ask(page, QUESTION, SHAPES)
    answered(page)
    ask(page, QUESTION, SHAPES)
    answered(page, 2)
    prompt = r"(\d+) \+"
    both = int(re.match(prompt, page.locator(".figures").last.inner_text())[1])
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Pictures that the model sees").select_option("last")
    page.get_by_role("button", name="Done").click()
    page.get_by_role("button", name="Again").click()
    expect(page.locator(".figures").last).not_to_contain_text(str(both))
    one = int(re.match(prompt, page.locator(".figures").last.inner_text())[1])
    assert both - one >= 36


def test_history_survives_and_is_forgotten(page):
    ask(page, QUESTION, SHAPES)
    answered(page)
    page.get_by_role("button", name="New").click()
    expect(page.get_by_text("Drop, paste or choose")).to_be_visible()
    page.reload()
    page.get_by_role("button", name="Conversations").click()
    page.get_by_role("navigation").get_by_role("button", name=QUESTION, exact=True).click()
    assert answered(page) == ["red"]
    expect(page.get_by_role("img", name="Picture 1")).to_be_visible()
    page.get_by_role("button", name=f"Forget {QUESTION}").click()
    expect(page.get_by_text("Drop, paste or choose")).to_be_visible()
    expect(page.get_by_role("navigation").get_by_role("listitem")).to_have_count(0)


def test_copy(open_page, served):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    ask(page, QUESTION, SHAPES)
    answered(page)
    page.get_by_role("button", name="Copy").click()
    assert page.evaluate("() => navigator.clipboard.readText()") == "red"


def test_api_key(served, open_page):
    with serving("--api-key", "0123456789abcdef", engine=served.engine) as guarded:
        page = open_page(guarded)
        expect(page.get_by_role("alert")).to_contain_text("API key is missing")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("API key").fill("0123456789abcdef")
        page.get_by_role("button", name="Done").click()
        expect(page.get_by_role("heading", name="tiny-llava")).to_be_visible()
        ask(page, QUESTION, SHAPES)
        assert answered(page) == ["red"]
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_themes(open_page, scheme):
    page = open_page(color_scheme=scheme)

    def is_dark():
        colour = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) < 384

    assert is_dark() == (scheme == "dark")
    other = {"light": "dark", "dark": "light"}[scheme]
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Theme").select_option(other)
    assert is_dark() == (other == "dark")


@pytest.mark.parametrize("width", [320, 390])
def test_phones(open_page, width):
    page = open_page(viewport={"width": width, "height": 700}, is_mobile=True, has_touch=True)
    ask(page, QUESTION + " " + "x" * 300, SHAPES)
    answered(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    page.get_by_role("button", name="Settings").tap()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width


def test_everything_has_a_name_and_is_reached_by_keyboard(page):
    ask(page, QUESTION, SHAPES)
    answered(page)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, img")]
            .filter((e) => !(e.labels?.length || e.textContent.trim() || e.ariaLabel || e.alt))
            .map((e) => e.outerHTML)"""
    )
    assert nameless == []
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("() => document.activeElement.id || document.activeElement.innerText")
        )
    assert {
        "show-history",
        "new",
        "show-settings",
        "log",
        "Copy",
        "Again",
        "file",
        "send",
    } <= reached
    assert page.get_by_role("log").get_attribute("aria-live") == "polite"


def test_a_video_that_is_chosen(page, tmp_path):
    path = tmp_path / "film.webm"
    path.write_bytes(film("libvpx-vp9", "webm", frames=3))
    page.get_by_label("Add pictures").set_input_files([str(path), str(SHAPES)])
    expect(page.get_by_role("button", name="Remove video 1")).to_be_visible()
    expect(page.get_by_role("button", name="Remove picture 2")).to_be_visible()
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, QUESTION)
    parts = asked.value.post_data_json["messages"][-1]["content"]
    assert [part["type"] for part in parts] == ["video_url", "image_url", "text"]
    assert len(answered(page)) == 1
    shown = page.get_by_role("article").get_by_label("Video 1")
    assert shown.evaluate("video => video.error === null")
    page.wait_for_function("() => document.querySelector('.shown video').videoWidth === 64")
