"""Answers as they come, end, are cut off and go on."""

from __future__ import annotations

import json

from playwright.sync_api import expect

from tests.conftest import SHAPES
from tests.servers import serving, waits_until
from tests.serving.page.people import (
    DESCRIPTION,
    QUESTION,
    answered,
    ask,
    begun,
    button,
    endless,
    figures,
    press,
    set_options,
)

MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script><b>bold</b>"
#: What a model writes, and what is to be seen of it.
MARKDOWN = """# Shapes

A **red** triangle and `code`, [a link](https://example.org/), <https://example.org>,
![a picture](https://example.org/x.png) and [no link](javascript:alert(1)).

| shape | number |
|:------|-------:|
| star  |      1 |

```py
if a < b:
    print("x")
```

<div style="position:fixed"><script>alert(1)</script></div>
"""
SHOW = "async (text) => (await import('/markdown.js')).showMarkdown(welcome, text)"
HOSTILE = (
    "<svg onload=alert(1)>",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](&#106;avascript:alert(1))",
    "[x](//example.org)",
    '[x](https://e.org "onmouseover=alert(1)")',
    '```"><img src=x onerror=alert(1)>\nx\n```',
    "<a href='javascript:alert(1)'>x</a>",
)
#: Attributes of what is shown that run, fetch or disguise something.
HARMFUL = """root => [...root.querySelectorAll("*:not(button)")]
    .flatMap((one) => [...one.attributes])
    .filter(({ name, value }) => /^on|src|style|title/.test(name) || /^(java|data|\\/)/.test(value))
    .map(({ name, value }) => [name, value])"""


def test_stop_keeps_what_was_said(served, open_page):
    with endless(served) as server:
        page = open_page(server)
        stops = (lambda: press(page, "Stop"), lambda: page.keyboard.press("Escape"))
        for stop in stops:
            ask(page, "Go on.")
            begun(page)
            stop()
            expect(figures(page)).to_have_text("stopped")
            assert page.locator(".assistant .text").last.inner_text().startswith('"')
        expect(button(page, "Send")).to_be_visible()
        page.close()
    assert served.engine.running == 0


def test_what_the_model_says_is_text(served, open_page):
    with serving("--json-schema", json.dumps({"const": MARKUP}), engine=served.engine) as hostile:
        page = open_page(hostile)
        ask(page, MARKUP, SHAPES)
        (said,) = answered(page)
        assert json.loads(said) == MARKUP
        assert page.locator("#log script, #log b, #log img[src=x]").count() == 0
        press(page, "Conversations")
        expect(page.locator("#conversations button").first).to_have_text(MARKUP)
        page.close()


def test_markdown_is_shown_and_harmless(page):
    page.evaluate(SHOW, MARKDOWN)
    shown = page.locator("#welcome")
    assert shown.locator("h1").inner_text() == "Shapes"
    assert shown.locator("strong").inner_text() == "red"
    assert shown.locator("pre").inner_text().rstrip() == 'if a < b:\n    print("x")'
    cells = "all => all.map((one) => [one.innerText, one.align])"
    assert shown.locator("td").evaluate_all(cells) == [["star", "left"], ["1", "right"]]
    links = shown.locator("a").evaluate_all("all => all.map((a) => [a.href, a.target, a.rel])")
    away = ["_blank", "noopener noreferrer nofollow"]
    urls = ["https://example.org/", "https://example.org/", "https://example.org/x.png"]
    assert links == [[url, *away] for url in urls]
    assert shown.locator("script, img, div[style], iframe").count() == 0
    assert "<script>alert(1)</script>" in shown.inner_text()
    assert "[no link](javascript:alert(1))" in shown.inner_text()
    for text in HOSTILE:
        page.evaluate(SHOW, text)
        assert shown.evaluate(HARMFUL) == [], text


def test_answers_and_code_are_copied(open_page):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    ask(page, QUESTION, SHAPES)
    answered(page)
    press(page, "Copy")
    assert page.evaluate("() => navigator.clipboard.readText()") == "red"
    expect(page.get_by_role("status").first).to_have_text("Copied")
    expect(button(page, "Copied")).to_be_visible()
    page.evaluate(SHOW.replace("welcome", "document.querySelector('.assistant .text')"), MARKDOWN)
    press(page, "Copy code")
    expect(button(page, "Copy code")).to_have_text("Copied")
    said = page.evaluate("() => navigator.clipboard.readText()")
    assert said.rstrip() == 'if a < b:\n    print("x")'


def test_copy_without_a_secure_address(page):
    page.evaluate("() => Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    ask(page, QUESTION, SHAPES)
    answered(page)
    press(page, "Copy")
    expect(button(page, "Copied")).to_be_visible()


def test_a_cut_answer_goes_on(page):
    ask(page, "Describe the picture.", SHAPES)
    assert answered(page) == [DESCRIPTION]
    expect(button(page, "Continue")).to_be_hidden()
    set_options(page, longest_answer="7")
    press(page, "Again")
    expect(figures(page)).to_contain_text("cut off at the longest length of an answer")
    assert len(answered(page)[0]) < len(DESCRIPTION)
    while button(page, "Continue").is_visible():
        before = answered(page)
        press(page, "Continue")
        page.wait_for_function(
            "before => document.querySelector('.figures')"
            " && document.querySelector('.assistant .text').innerText !== before",
            arg=before[0],
        )
    assert answered(page) == [DESCRIPTION]


def test_the_end_of_an_answer_leaves_people_where_they_are(served, open_page):
    with endless(served) as server:
        page = open_page(server, viewport={"width": 800, "height": 400})
        ask(page, "Go on.\n" * 40)
        begun(page)
        press(page, "Stop")
        ask(page, "And on.")
        begun(page)
        where = """() => {
            const log = document.getElementById("log");
            log.scrollTop = 0;
            document.querySelector(".assistant .tools button").focus({ preventScroll: true });
            const text = document.querySelector("[aria-busy] .text p").firstChild;
            getSelection().setBaseAndExtent(text, 0, text, 1);
            return text.data.slice(0, 1);
        }"""
        selected = page.evaluate(where)
        length = page.locator("[aria-busy] .text").inner_text()
        page.wait_for_function(
            "length => document.querySelector('[aria-busy] .text').innerText.length > length",
            arg=len(length),
        )
        page.keyboard.press("Escape")
        expect(page.locator(".figures")).to_have_text(["stopped", "stopped"])
        assert page.evaluate("() => document.getElementById('log').scrollTop") == 0
        assert page.evaluate("() => document.activeElement.innerText") == "Copy"
        assert page.evaluate("() => getSelection().toString()") == selected
        page.close()


def test_the_end_stays_in_sight(open_page):
    """Also where pictures are drawn only after the answer is there, and where it is longer."""
    page = open_page(viewport={"width": 800, "height": 400})
    for count in (1, 2):
        ask(page, "Describe the picture.", SHAPES, SHAPES)
        answered(page, count)
        expect(figures(page)).to_be_in_viewport()
    page.reload()
    expect(figures(page)).to_be_in_viewport()


def test_a_reload_keeps_question_answer_and_draft(served, open_page):
    with endless(served) as server:
        page = open_page(server)
        ask(page, QUESTION, SHAPES)
        begun(page)
        page.get_by_label("Question").fill("My draft")
        page.reload()
        expect(figures(page)).to_have_text("not finished")
        expect(page.locator(".user .text")).to_have_text(QUESTION)
        assert page.locator(".assistant .text").inner_text().startswith('"')
        expect(page.get_by_role("img", name="Picture 1")).to_be_visible()
        expect(page.get_by_label("Question")).to_have_value("My draft")
        expect(button(page, "Continue")).to_be_visible()
        page.close()
    assert waits_until(lambda: served.engine.running == 0)


def test_answers_go_on_in_other_conversations(served, open_page):
    with endless(served) as server:
        page = open_page(server)
        ask(page, "The first")
        begun(page)
        press(page, "New")
        expect(button(page, "Send")).to_be_visible()
        press(page, "Conversations")
        press(page, "The first", exact=True)
        begun(page)
        press(page, "Stop")
        expect(figures(page)).to_have_text("stopped")
        page.close()


def test_a_question_is_edited(page):
    ask(page, "What is it?", SHAPES)
    answered(page)
    press(page, "Edit")
    page.get_by_label("Edit the question").fill(QUESTION)
    page.keyboard.press("Enter")
    expect(page.locator(".assistant .text")).to_have_text("red")
    expect(page.locator(".user .text")).to_have_text(QUESTION)
    ask(page, "And the square?")
    answered(page, 2)
    press(page, "Conversations")
    expect(page.locator("#conversations button").first).to_have_text(QUESTION)
    page.locator(".user").first.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the question").fill("Describe the picture.")
    press(page, "Ask", exact=True)
    expect(page.locator(".assistant .text")).to_have_text([DESCRIPTION])
    press(page, QUESTION, exact=True)
    assert len(answered(page, 2)) == 2
