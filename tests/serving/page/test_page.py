"""The web page in a real browser, asking a real server."""

from __future__ import annotations

import hashlib
import re

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.conftest import ROOT, SHAPES
from tests.servers import serving
from tests.serving.page.people import (
    QUESTION,
    add,
    answered,
    ask,
    button,
    figures,
    listed,
    press,
    set_options,
)

PHONE = {"is_mobile": True, "has_touch": True}


def test_question_and_second_question(page):
    expect(page.get_by_role("heading", name="tiny-llava")).to_be_visible()
    ask(page, QUESTION, SHAPES)
    assert answered(page) == ["red"]
    expect(page.get_by_role("img", name="Picture 1")).to_be_visible()
    took = (
        r"read \d+ tokens of 1,024{} · wrote 2 · first word after [\d.]+ s · "
        r"[\d.]+ tokens per second · [\d.]+ s in all"
    )
    assert re.fullmatch(took.format(r"( \(\d+ remembered\))?"), figures(page).inner_text())
    ask(page, "And the square?")
    assert len(answered(page, 2)) == 2
    assert re.fullmatch(took.format(r" \(\d+ remembered\)"), figures(page).inner_text())
    expect(page.get_by_label("Question")).to_be_focused()


def test_meter_of_the_context(page):
    expect(page.get_by_role("meter")).to_be_hidden()
    ask(page, QUESTION, SHAPES)
    answered(page)
    took = re.search(r"read (\d+) .* wrote (\d+)", figures(page).inner_text())
    read, wrote = map(int, took.groups())
    meter = page.get_by_role("meter", name=f"{read + wrote} of 1,024 tokens")
    assert meter.evaluate("meter => [meter.value, meter.max]") == [read + wrote, 1024]


def test_errors_are_shown_and_the_question_comes_back(page):
    ask(page, "word " * 3000, SHAPES)
    expect(page.get_by_role("alert")).to_contain_text("context of 1024")
    expect(page.get_by_label("Question")).to_have_value(("word " * 3000).strip())
    expect(button(page, "Remove picture 1")).to_be_visible()
    ask(page, QUESTION)
    assert answered(page) == ["red"]
    expect(page.get_by_role("alert")).to_be_hidden()
    press(page, "Conversations")
    expect(listed(page)).to_have_count(1)


def test_a_refusal_leaves_what_is_written_meanwhile(page):
    held = []
    page.route("**/v1/chat/completions", lambda route: held.append(route))
    with page.expect_request("**/v1/chat/completions"):
        ask(page, "word " * 3000)
    page.get_by_label("Question").fill("My draft")
    held.pop().continue_()
    expect(page.get_by_role("alert")).to_contain_text("context of 1024")
    expect(page.get_by_label("Question")).to_have_value("My draft")
    expect(figures(page)).to_contain_text("context of 1024")
    page.unroute("**/v1/chat/completions")
    press(page, "Edit")
    page.get_by_label("Edit the question").fill("What is it?")
    press(page, "Ask", exact=True)
    expect(figures(page)).to_contain_text("wrote")
    expect(page.get_by_label("Question")).to_have_value("My draft")


def test_a_server_that_cannot_be_reached(page):
    page.context.set_offline(True)
    ask(page, QUESTION, SHAPES)
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached. Is it still running?")
    expect(page.get_by_label("Question")).to_have_value(QUESTION)
    page.context.set_offline(False)
    press(page, "Try again")
    assert answered(page) == ["red"]
    expect(page.get_by_role("alert")).to_be_hidden()


def test_again_and_settings(page):
    set_options(page, temperature="2", longest_answer="5", seed="1")
    ask(page, "Describe the picture.", SHAPES)
    first = answered(page)
    assert "wrote 5" in figures(page).inner_text()
    press(page, "Again")
    assert answered(page) == first
    page.reload()
    press(page, "Settings")
    expect(page.get_by_label("Seed")).to_have_value("1")


def test_only_the_newest_picture(page):
    ask(page, QUESTION, SHAPES)
    answered(page)
    ask(page, QUESTION, SHAPES)
    answered(page, 2)
    prompt = r"read (\d+) "
    both = int(re.search(prompt, figures(page).inner_text())[1])
    press(page, "Settings")
    page.get_by_label("Pictures that the model sees").select_option("last")
    press(page, "Done")
    press(page, "Again")
    expect(figures(page)).not_to_contain_text(f"read {both}")
    one = int(re.search(prompt, figures(page).inner_text())[1])
    assert both - one >= 36


def test_too_many_pictures_for_the_model_are_fewer_at_a_press(served, open_page):
    with serving("--max-images", "1", engine=served.engine) as strict:
        page = open_page(strict)
        ask(page, QUESTION, SHAPES)
        answered(page)
        ask(page, QUESTION, SHAPES)
        expect(page.get_by_role("alert")).to_contain_text("There are 2 pictures; the limit is 1.")
        press(page, "Show the model only the newest pictures")
        assert answered(page, 2) == ["red", "red"]
        page.close()


def test_a_body_that_is_too_large(served, open_page, tmp_path):
    (tmp_path / "long.mp4").write_bytes(bytes(2_000_000))
    with serving("--max-body", "1", engine=served.engine) as strict:
        page = open_page(strict)
        ask(page, QUESTION, tmp_path / "long.mp4")
        expect(page.get_by_role("alert")).to_contain_text(
            "more than 1,000,000 bytes. Send fewer pictures or shorter videos"
        )
        page.close()


def test_api_key(served, open_page):
    with serving("--api-key", "0123456789abcdef", engine=served.engine) as guarded:
        page = open_page(guarded)
        expect(page.get_by_role("alert")).to_contain_text("API key is missing")
        press(page, "Settings")
        page.get_by_label("API key").fill("0123456789abcdef")
        press(page, "Done")
        expect(page.get_by_role("heading", name="tiny-llava")).to_be_visible()
        ask(page, QUESTION, SHAPES)
        assert answered(page) == ["red"]
        page.close()


def test_one_of_several_models_is_chosen(served, open_page):
    with serving("--alias", "llava", engine=served.engine) as several:
        page = open_page(several)
        page.get_by_label("Model", exact=True).select_option("llava")
        page.reload()
        expect(page.get_by_label("Model", exact=True)).to_have_value("llava")
        ask(page, QUESTION, SHAPES)
        assert answered(page) == ["red"]
        expect(page.locator(".assistant .who")).to_have_text("llava")
        page.close()


def test_themes(page):
    def is_dark():
        colour = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) < 384

    for scheme, other in (("light", "dark"), ("dark", "light")):
        page.emulate_media(color_scheme=scheme)
        assert is_dark() == (scheme == "dark")
        press(page, "Settings")
        page.get_by_label("Theme").select_option(other)
        assert is_dark() == (other == "dark")
        page.get_by_label("Theme").select_option("")
        press(page, "Done")


def test_phones(open_page):
    page = open_page(viewport={"width": 320, "height": 560}, **PHONE)
    ask(page, QUESTION + " " + "x" * 300, SHAPES)
    answered(page)
    for width in (390, 320):
        page.set_viewport_size({"width": width, "height": 560})
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        page.get_by_role("button", name="Settings").tap()
        expect(page.get_by_role("dialog")).to_be_visible()
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        page.keyboard.press("Escape")
    button(page, "Conversations").tap()
    button(page, re.compile(f"^{re.escape(QUESTION)}")).tap()
    expect(page.get_by_role("navigation")).to_be_hidden()
    button(page, "Conversations").tap()
    page.keyboard.press("Escape")
    expect(page.get_by_role("navigation")).to_be_hidden()
    add(page, *[SHAPES] * 16)
    for name in ("Send", "New"):
        expect(button(page, name)).to_be_in_viewport(ratio=1)
    assert page.get_by_role("log").evaluate("log => log.clientHeight") > 200


def test_writing_from_right_to_left(page):
    page.evaluate(
        "async () => (await import('/markdown.js')).showMarkdown("
        "document.getElementById('welcome'), 'שלום\\n\\nHello')"
    )
    directions = "all => all.map((one) => getComputedStyle(one).direction)"
    assert page.locator("#welcome p").evaluate_all(directions) == ["rtl", "ltr"]
    page.get_by_label("Question").fill("מה זה?")
    assert page.get_by_label("Question").evaluate_all(directions) == ["rtl"]


def test_everything_has_a_name_and_is_reached_by_keyboard(page):
    ask(page, QUESTION, SHAPES)
    answered(page)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea, img")]
            .filter((e) => !(e.labels?.length || e.textContent.trim() || e.ariaLabel || e.alt))
            .map((e) => e.outerHTML)"""
    )
    assert [element for element in nameless if 'id="confirm-agree"' not in element] == []
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
        "Edit",
        "Copy",
        "Again",
        "file",
        "send",
    } <= reached


def test_screen_readers_hear_each_answer_once(page):
    heard = page.get_by_role("status").first
    ask(page, QUESTION, SHAPES)
    answered(page)
    expect(heard).to_have_text("red")
    ask(page, "What is in this picture?")
    (_, second) = answered(page, 2)
    expect(heard).to_have_text(second)
    expect(page.get_by_role("log")).to_have_attribute("aria-live", "off")


def test_axe_finds_nothing(page):
    ask(page, QUESTION, SHAPES)
    answered(page)
    add(page, SHAPES)
    press(page, "Conversations")
    expect(listed(page)).to_have_count(1)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        results = Axe().run(page)
        assert results.violations_count == 0, results.generate_report()
    press(page, "Settings")
    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()


def test_what_others_wrote_is_what_they_released():
    vendor = ROOT / "mlx_llava" / "serving" / "page" / "vendor"
    readme = (vendor / "README.md").read_text()
    sums = dict(re.findall(r"^\| `(.*?)` .*`([0-9a-f]{64})`", readme, re.MULTILINE))
    scripts = {path.name: path.read_bytes() for path in vendor.glob("*.js")}
    assert sums == {name: hashlib.sha256(code).hexdigest() for name, code in scripts.items()}
    for name in scripts:
        assert (vendor / f"{name.removesuffix('.min.js')}.LICENSE").exists()


def test_every_file_is_short():
    page = ROOT / "mlx_llava" / "serving" / "page"
    assert [
        path.name
        for path in page.glob("*")
        if path.is_file() and path.read_text().count("\n") > 400
    ] == []
