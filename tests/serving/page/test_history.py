"""Conversations that the browser keeps: found again, named, saved, forgotten."""

from __future__ import annotations

import json
import time

from playwright.sync_api import expect

from mlx_llava.inputs.image import data_url
from tests.conftest import SHAPES
from tests.serving.page.people import (
    QUESTION,
    answered,
    ask,
    begun,
    button,
    endless,
    figures,
    listed,
    press,
)

DAY = 86_400_000
#: Keeps so many conversations, each a day older than the one before.
KEEP = """async ([count, day]) => {
    const { save } = await import("/store.js");
    const { thumbnail } = await import("/pictures.js");
    const { asBlob } = await import("/upgrade.js");
    const pixel = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=";
    const small = await thumbnail(asBlob(pixel));
    for (let i = 0; i < count; i += 1) {
        const at = Date.now() - i * day;
        const turn = { id: `t${i}`, made: at, started: at, text: `Question ${i}`, pictures: [],
            answer: `The answer is ${i * i}`, finish: "stop" };
        await save({ id: `c${i}`, title: `Question ${i}`, at, thumbnail: small }, turn, []);
    }
}"""


def test_history_survives_and_is_forgotten(page):
    ask(page, QUESTION, SHAPES)
    answered(page)
    press(page, "New")
    expect(page.get_by_text("Drop, paste or choose")).to_be_visible()
    page.reload()
    expect(page.get_by_text("Drop, paste or choose")).to_be_visible()
    press(page, "Conversations")
    page.get_by_role("navigation").get_by_role("button", name=QUESTION, exact=True).click()
    assert answered(page) == ["red"]
    expect(page.get_by_role("img", name="Picture 1")).to_be_visible()
    press(page, f"Forget {QUESTION}")
    expect(page.get_by_text("Drop, paste or choose")).to_be_visible()
    expect(listed(page)).to_have_count(0)
    press(page, "Undo")
    assert answered(page) == ["red"]
    expect(page.get_by_role("img", name="Picture 1")).to_be_visible()
    expect(listed(page)).to_have_count(1)
    page.reload()
    assert answered(page) == ["red"]


def test_what_is_forgotten_while_it_is_answered_stays_forgotten(served, open_page):
    with endless(served) as server:
        page = open_page(server)
        press(page, "Conversations")
        for forget in (f"Forget {QUESTION}", "Forget all"):
            ask(page, QUESTION)
            begun(page)
            press(page, forget)
            if forget == "Forget all":
                press(page, "Forget", exact=True)
            expect(page.get_by_text("Drop, paste or choose")).to_be_visible()
            expect(button(page, "Send")).to_be_visible()
            page.wait_for_timeout(200)
            expect(listed(page)).to_have_count(0)
        page.reload()
        press(page, "Conversations")
        expect(page.get_by_text("No conversations yet.")).to_be_visible()
        kept = """async () => (await Promise.all(
            (await indexedDB.databases()).map(({ name }) => new Promise((resolve) => {
                indexedDB.open(name).onsuccess = ({ target: { result } }) => {
                    const names = [...result.objectStoreNames];
                    const reading = result.transaction(names);
                    const all = names.map((name) => reading.objectStore(name).count());
                    reading.oncomplete = () => resolve(all.map(({ result }) => result));
                };
            })))).flat()"""
        assert page.evaluate(kept) == [0, 0, 0]
        page.close()
    assert served.engine.running == 0


def test_forgetting_all_is_asked(page):
    page.evaluate(KEEP, [2, DAY])
    press(page, "Conversations")
    press(page, "Forget all")
    expect(page.get_by_role("dialog")).to_contain_text("Forget all 2 conversations, pictures")
    press(page, "Cancel")
    expect(listed(page)).to_have_count(2)
    press(page, "Forget all")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(listed(page)).to_have_count(2)
    press(page, "Forget all")
    press(page, "Forget", exact=True)
    expect(listed(page)).to_have_count(0)


def test_fifty_conversations_by_day_and_by_words(page):
    page.evaluate(KEEP, [50, DAY])
    started = time.monotonic()
    press(page, "Conversations")
    expect(listed(page)).to_have_count(50)
    assert time.monotonic() - started < 10
    headings = page.get_by_role("navigation").get_by_role("heading").all_inner_texts()
    assert headings[:2] == ["Today", "Yesterday"]
    assert len(headings) < 12  # days of this week, then months
    small = listed(page).first.locator("img")
    assert small.evaluate("image => [image.naturalWidth, image.loading]") == [96, "lazy"]
    page.get_by_label("Search conversations").fill("answer is 441")
    expect(listed(page)).to_have_count(1)
    press(page, "Question 21", exact=True)
    expect(page.locator(".assistant .text")).to_have_text("The answer is 441")
    page.get_by_label("Search conversations").fill("nothing like it")
    expect(page.get_by_text("No conversation has these words.")).to_be_visible()


def test_a_conversation_is_renamed_saved_and_opened_again(page):
    ask(page, QUESTION, SHAPES)
    answered(page)
    press(page, "Conversations")
    press(page, f"Options of {QUESTION}")
    with page.expect_download() as saved:
        press(page, "Save as Markdown")
    assert saved.value.suggested_filename == "What colour is the triangle.md"
    text = saved.value.path().read_text()
    assert text.splitlines()[::2][:6] == [
        f"# {QUESTION}",
        "**You**",
        "*Picture: shapes.png*",
        QUESTION,
        "**tiny-llava**",
        "red",
    ]
    page.get_by_label("Name").fill("The triangle")
    page.keyboard.press("Enter")
    expect(page.locator("#conversations button").first).to_have_text("The triangle")
    ask(page, "And the square?")
    answered(page, 2)
    with page.expect_download() as saved:
        press(page, "Save all")
    (conversation,) = json.loads(saved.value.path().read_text())["conversations"]
    assert conversation["title"] == "The triangle"
    first, second = conversation["turns"]
    assert (first["question"], first["answer"], first["model"]) == (QUESTION, "red", "tiny-llava")
    assert first["pictures"][0]["url"] == data_url(SHAPES.read_bytes())
    assert second["question"] == "And the square?"
    press(page, "Forget The triangle")
    expect(listed(page)).to_have_count(0)
    page.get_by_label("Open saved conversations").set_input_files(saved.value.path())
    press(page, "The triangle", exact=True)
    assert answered(page, 2)[0] == "red"
    expect(page.get_by_role("img", name="Picture 1")).to_be_visible()
    page.get_by_label("Open saved conversations").set_input_files(str(SHAPES))
    expect(page.get_by_role("alert")).to_contain_text("shapes.png has no conversations")


def test_two_tabs_lose_nothing(page):
    ask(page, QUESTION, SHAPES)
    answered(page)
    other = page.context.new_page()
    other.goto(page.url)
    assert answered(other) == ["red"]
    ask(other, "And the square?")
    answered(other, 2)
    assert len(answered(page, 2)) == 2  # as it happens
    ask(page, "And the star?")
    answered(page, 3)
    other.reload()
    said = [QUESTION, "And the square?", "And the star?"]
    expect(other.locator(".user .text")).to_have_text(said)
    answered(other, 3)
    press(page, "Conversations")
    press(page, f"Forget {QUESTION}")
    expect(other.get_by_text("Drop, paste or choose")).to_be_visible()


def test_two_tabs_that_ask_at_once(served, open_page):
    with endless(served) as server:
        page = open_page(server)
        ask(page, "The first")
        begun(page)
        press(page, "Stop")
        other = page.context.new_page()
        other.goto(page.url)
        expect(figures(other)).to_have_text("stopped")
        for tab in (page, other):
            press(tab, "Again")
            begun(tab)
        for tab in (page, other):
            press(tab, "Stop")
        for tab in (page, other):  # both have both answers to the one question
            expect(tab.locator(".figures")).to_have_count(2)
        for tab, text in ((page, "From one"), (other, "From another")):
            ask(tab, text)
            begun(tab)
        for tab in (page, other):
            press(tab, "Stop")
        for tab in (page, other):
            expect(tab.locator(".figures")).to_have_count(4)
            assert sorted(tab.locator(".user .text").all_inner_texts()) == sorted(
                ["The first", "The first", "From one", "From another"]
            )
        ask(page, "Go on")
        begun(page)
        press(other, "Conversations")
        press(other, "Forget The first")
        for tab in (page, other):
            expect(tab.get_by_text("Drop, paste or choose")).to_be_visible()
        expect(button(page, "Send")).to_be_visible()
        other.reload()
        press(other, "Conversations")
        expect(other.get_by_text("No conversations yet.")).to_be_visible()
        page.close()


def test_storage_that_is_full(page):
    session = page.context.new_cdp_session(page)
    origin = page.evaluate("() => location.origin")
    session.send("Storage.overrideQuotaForOrigin", {"origin": origin, "quotaSize": 1})
    ask(page, QUESTION, SHAPES)
    assert answered(page) == ["red"]
    expect(page.get_by_text("The browser has no room left")).to_be_visible()
    session.send("Storage.overrideQuotaForOrigin", {"origin": origin})
    ask(page, "And the square?")
    answered(page, 2)
    page.reload()
    assert answered(page, 2)[0] == "red"
    expect(page.get_by_role("img", name="Picture 1")).to_be_visible()


def test_conversations_of_earlier_versions_are_kept(open_page, served):
    page = open_page()
    page.goto(f"{served.url}/health")
    page.evaluate(
        """(url) => new Promise((resolve) => {
            indexedDB.deleteDatabase("mlx_llava").onsuccess = () => {
                const opening = indexedDB.open("mlx_llava", 1);
                opening.onupgradeneeded = () =>
                    opening.result.createObjectStore("conversations", { keyPath: "id" });
                opening.onsuccess = () => {
                    const writing = opening.result.transaction("conversations", "readwrite");
                    const turn = { text: "What?", pictures: [url], answer: "red", figures: "" };
                    const second = { text: "Why?", pictures: [], answer: "so", figures: "" };
                    const kept = { id: "a", turns: [turn, second], at: 1e12 };
                    writing.objectStore("conversations").put(kept);
                    writing.oncomplete = () => { opening.result.close(); resolve(); };
                };
            };
        })""",
        data_url(SHAPES.read_bytes()),
    )
    page.goto(served.url)
    press(page, "Conversations")
    expect(page.get_by_role("heading", name="September 2001")).to_be_visible()
    press(page, "What?", exact=True)
    assert answered(page, 2) == ["red", "so"]
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, QUESTION)
    (said, *_) = asked.value.post_data_json["messages"]
    assert said["content"][0]["image_url"]["url"] == data_url(SHAPES.read_bytes())
    answered(page, 3)
