"""Draw docs/page-*.png: the server's page, light, dark and on a phone, in conversations.

python scripts/photograph_page.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from mlx_llava.checkpoint.hub import embedded_model  # noqa: E402
from tests.browser import browser  # noqa: E402
from tests.servers import serving  # noqa: E402

LARGE = {"viewport": {"width": 1000, "height": 720}}
SMALL = {"viewport": {"width": 390, "height": 720}, "is_mobile": True, "device_scale_factor": 2}
VIEWS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", **LARGE},
    "dark": {"color_scheme": "dark", **LARGE},
    "phone": {"color_scheme": "light", **SMALL},
}
CONVERSATIONS = (
    ("pair.png", "What is to the left?"),
    ("shapes.png", "What is in this picture?", "What colour is the triangle?"),
)


def photograph(chromium: Any, url: str, name: str) -> None:
    """Asks about the embedded model's examples, and draws the page."""
    context = chromium.new_context(**VIEWS[name])
    page = context.new_page()
    page.goto(url)
    for picture, *questions in CONVERSATIONS:
        page.get_by_role("button", name="New").click()
        path = embedded_model() / "examples" / picture
        page.get_by_label("Add pictures").set_input_files(str(path))
        page.get_by_role("button", name="Remove picture 1").wait_for()
        for i, question in enumerate(questions):
            page.get_by_label("Question").fill(question)
            page.keyboard.press("Enter")
            page.locator(".figures").nth(i).wait_for()
    if name == "dark":
        page.get_by_role("button", name="Conversations").click()
        page.get_by_role("listitem").first.wait_for()
    page.mouse.move(0, 0)
    page.screenshot(path=ROOT / "docs" / f"page-{name}.png", animations="disabled")
    context.close()


def main() -> None:
    """Runs the command."""
    with serving() as served, browser() as chromium:
        for name in VIEWS:
            photograph(chromium, served.url, name)


if __name__ == "__main__":
    main()
