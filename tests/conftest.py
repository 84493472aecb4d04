"""What every test shares: seeds, no network, a temporary hub cache, golden checkpoints."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from mlx_llava import load  # isort: skip - before mlx.core, for its BLAS
import mlx.core as mx
import pytest

from mlx_llava.model.linux import functions
from tests.sites import internet, tls  # noqa: F401 - fixtures

ROOT = Path(__file__).parent.parent
GOLDENS = ROOT / "tests" / "goldens"
PICTURE = GOLDENS / "picture.png"
#: What the README asks about.
SHAPES = ROOT / "weights" / "tiny-llava" / "examples" / "shapes.png"
#: `load` where a test is about the numbers of a checkpoint, not about those of the device.
load_as_stored = partial(load, as_stored=True)
MACHINES = ("mac", "linux")
SHARED = Path(os.environ.get("MLX_LLAVA_TEST_DATA", ROOT.parent / "shared" / "data"))

#: Many tests start Python: what is compiled is kept, also where a container's image forbids it.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
#: What a shell runs in the background ignores Control-C, as do the commands that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    """What is imported by now stays: looking through it for garbage took a tenth of all time."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First what takes longest: the whole, the page, training. So no worker is left with it."""
    long = {ROOT / "tests" / folder for folder in ("", "serving/page", "tuner")}
    items.sort(key=lambda item: item.path.parent not in long)


@pytest.fixture(autouse=True)
def seed() -> None:
    mx.random.seed(0)


@pytest.fixture(autouse=True)
def no_model_is_small(monkeypatch) -> None:
    """Those of tests are, and shall be read as others are."""
    monkeypatch.setattr("mlx_llava.checkpoint.precision.SMALL", -1)


@pytest.fixture(scope="session")
def hub_caches(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hubs")


@pytest.fixture(autouse=True)
def hub_cache(hub_caches, monkeypatch) -> Path:
    """An empty Hugging Face cache, so that nothing depends on the user's own."""
    from huggingface_hub import constants

    cache = Path(tempfile.mkdtemp(dir=hub_caches))  # pytest's would count all those before
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture(autouse=True)
def no_network(monkeypatch) -> None:
    """Lets sockets connect to this machine only."""
    connect = socket.socket.connect

    def guarded(self, address):
        local = ("127.0.0.1", "::1", "localhost")
        if isinstance(address, tuple) and address[0] not in local:
            raise OSError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session", params=["llava", "llava_next"])
def golden(request) -> Path:
    """The folder of a tiny checkpoint that transformers wrote."""
    return GOLDENS / request.param


@pytest.fixture(scope="session")
def loaded():
    """A tiny LLaVA 1.5 and its processor."""
    return load(GOLDENS / "llava")


@pytest.fixture(scope="session")
def loaded_next():
    """A tiny LLaVA 1.6 and its processor."""
    return load(GOLDENS / "llava_next")


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Without mx.compile, for which g++ takes a second for each kernel."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@contextmanager
def as_on(machine: str) -> Iterator[None]:
    """Computes as another machine does, also what is loaded already.

    Args:
        machine (str): ``mac``, where every operation is MLX's own, steps are queued ahead and
            rows share an array, or ``linux``, where NumPy does what it can: here even what is
            small.
    """
    is_mac = machine == "mac"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functions, "NUMPY", functions.NUMPY and not is_mac)
        patch.setattr(functions, "SMALLEST", 0)
        for module in ("generation.steps", "generation.batch"):
            patch.setattr(f"mlx_llava.{module}.queues_ahead", lambda: is_mac)
        patch.setattr("mlx_llava.model.batch_cache.on_cpu", lambda: not is_mac)
        yield


@pytest.fixture(params=MACHINES)
def machine(request) -> Iterator[str]:
    """As on a Mac, and as on Linux's CPU."""
    with as_on(request.param):
        yield request.param


@pytest.fixture(params=["loaded", "loaded_next"])
def both(request):
    """Either of the two."""
    return request.getfixturevalue(request.param)


def shared_data(name: str) -> Path:
    """A real file that is not part of the repository; skips the test where it is missing."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is missing; set MLX_LLAVA_TEST_DATA to a folder that holds {name}")
    return path


@pytest.fixture(scope="session")
def llama_tokenizer_model() -> bytes:
    """The real LLaMA tokenizer.model."""
    return shared_data("tokenizers/llama-2.model").read_bytes()
