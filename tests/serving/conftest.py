"""What tests of the server share."""

from __future__ import annotations

import pytest

from mlx_llava import load
from tests.servers import serving


@pytest.fixture(scope="package", autouse=True)
def no_authorities(tmp_path_factory):
    """Clients trust nobody's certificates: to read those that all trust takes them 30 ms each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SSL_CERT_FILE", raising=False)
        patch.setenv("SSL_CERT_DIR", str(tmp_path_factory.mktemp("authorities")))
        yield


@pytest.fixture(scope="module")
def served():
    """A server with a tiny model, for all tests of a file."""
    with serving("--dtype", "float32") as running:
        yield running


@pytest.fixture(scope="module")
def client(served):
    """OpenAI's client of that server."""
    with served.client() as client:
        yield client


@pytest.fixture(scope="module")
def tiny():
    """The same model and its processor, to ask without a server."""
    return load(dtype="float32")
