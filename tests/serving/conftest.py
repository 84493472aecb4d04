"""What tests of the server share."""

from __future__ import annotations

import pytest

from tests.servers import serving


@pytest.fixture(scope="module")
def served():
    """A server with a tiny model, for all tests of a file."""
    with serving() as running:
        yield running
