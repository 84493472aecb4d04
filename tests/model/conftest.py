"""What tests of the model share."""

from __future__ import annotations

from functools import cache

import pytest


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Gives the folder of a tiny case and transformers' model, both to be left as they are."""
    tiny = pytest.importorskip("tests.tiny")

    @cache
    def write(case):
        folder = tmp_path_factory.mktemp(case.name)
        return folder, tiny.save(case, folder)

    return write
