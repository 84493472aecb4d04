"""One browser and one server for all tests of the page."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests import browser
from tests.servers import serving
from tests.serving.page.people import watch


def pytest_collection_modifyitems(items):
    missing = pytest.mark.skip(
        reason="there is no Chromium; Debian's package is called chromium-headless-shell"
    )
    for item in items if browser.find() is None else ():
        if "serving/page" in item.path.as_posix():
            item.add_marker(missing)


#: Only for what hangs; a loaded machine takes its time.
SECONDS = 30


@pytest.fixture(scope="package")
def chromium():
    expect.set_options(timeout=SECONDS * 1000)
    with browser.browser() as running:
        yield running


@pytest.fixture(scope="package")
def served():
    """A server with the embedded model."""
    with serving() as running:
        yield running


@pytest.fixture
def open_page(chromium, served):
    """Opens a server's page; in the end, nothing may have gone wrong in any of them."""
    contexts, wrong = [], []

    def open_page(server=served, **options):
        context = chromium.new_context(**options)
        context.set_default_timeout(SECONDS * 1000)
        context.on("page", lambda page: watch(page, wrong))
        contexts.append(context)
        page = context.new_page()
        page.goto(server.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def page(open_page):
    return open_page()
