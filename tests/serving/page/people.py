"""What people do with the page, and what they see."""

from __future__ import annotations

import json
import re
import time
from contextlib import contextmanager

import pytest
from playwright.sync_api import expect

from mlx_llava.generation.batch import BatchGenerator
from mlx_llava.inputs.image import data_url
from tests.servers import serving

QUESTION = "What colour is the triangle?"
DESCRIPTION = "A small black star, a large red triangle and a large orange square."
#: Every letter of it is a choice of the model, so that none comes for nothing.
ENDLESS = {"type": "string", "minLength": 5000}


def watch(page, wrong):
    """Notes errors, dialogs of the browser's own, and whatever another host is asked."""
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: wrong.append(request.url) if is_away(request) else None)
    page.on("console", lambda told: wrong.append(told.text) if "Policy" in told.text else None)


def is_away(request):
    return not request.url.startswith(("http://127.0.0.1:", "data:", "blob:"))


def add(page, *paths):
    """Adds pictures or videos to the next question."""
    field = page.get_by_role("list", name="Pictures to send").get_by_role("listitem")
    before = field.count()
    page.get_by_label("Add pictures").set_input_files([str(path) for path in paths])
    expect(field).to_have_count(before + len(paths))


def ask(page, text, *pictures):
    if pictures:
        add(page, *pictures)
    page.get_by_label("Question").fill(text)
    page.keyboard.press("Enter")


def answered(page, count=1):
    """Waits until so many answers have ended; their texts."""
    expect(page.locator(".figures")).to_have_count(count)
    return page.locator(".assistant .text").all_inner_texts()


def figures(page):
    """What is told below the last answer."""
    return page.locator(".figures").last


def button(page, name, **options):
    return page.get_by_role("button", name=name, **options)


def press(page, name, **options):
    button(page, name, **options).click()


def set_options(page, **values):
    """Fills fields of the settings, by their names with underscores."""
    press(page, "Settings")
    for name, value in values.items():
        page.get_by_label(name.replace("_", " ").capitalize()).fill(value)
    press(page, "Done")


@contextmanager
def endless(served):
    """A server whose answers do not end for half a minute, as those of a large model."""
    next_step = BatchGenerator.next

    def slowly(self):
        time.sleep(0.03)
        return next_step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchGenerator, "next", slowly)
        with serving("--json-schema", json.dumps(ENDLESS), engine=served.engine) as server:
            yield server


def begun(page):
    """Waits until an answer has begun."""
    expect(page.locator(".assistant[aria-busy=true] .text")).to_contain_text(re.compile(r"\w"))


def listed(page):
    """The conversations of the list."""
    return page.get_by_role("navigation").get_by_role("listitem")


def give(page, event, files=(), **texts):
    """Pastes or drops files and texts, by their types; whether the page took the event."""
    described = [(path.name, kind, data_url(path.read_bytes())) for path, kind in files]
    return page.evaluate(
        """([event, files, texts]) => {
            const data = new DataTransfer();
            for (const [name, type, url] of files) {
                const bytes = Uint8Array.from(atob(url.split(",")[1]), (c) => c.charCodeAt(0));
                data.items.add(new File([bytes], name, { type }));
            }
            for (const [type, text] of Object.entries(texts)) data.setData(type, text);
            const shared = { bubbles: true, cancelable: true };
            const given = event === "paste"
                ? new ClipboardEvent("paste", { clipboardData: data, ...shared })
                : new DragEvent(event, { dataTransfer: data, ...shared });
            document.body.dispatchEvent(given);
            return given.defaultPrevented;
        }""",
        [event, described, texts],
    )


def shown_parts(asked):
    """The parts of the last question of a request."""
    return asked.value.post_data_json["messages"][-1]["content"]
