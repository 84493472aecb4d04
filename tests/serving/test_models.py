"""Several models in one server: which answers, which are in memory, and when they leave it."""

from __future__ import annotations

import math
import random
import re
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import count
from pathlib import Path

import httpx
import ollama
import openai
import pytest
from PIL import Image

from mlx_llava import generate, load, server
from mlx_llava.analysis import random_model
from mlx_llava.checkpoint import load as loading
from mlx_llava.inputs.image import png
from mlx_llava.serving import model_thread
from mlx_llava.serving.durations import as_seconds
from tests.conftest import GOLDENS, ROOT
from tests.servers import HTTP, MODEL, WIRES, endless, serving, user, waits_until

sys.path.insert(0, str(ROOT / "scripts"))
from served import served

PATHS = {MODEL: None, "llava": GOLDENS / "llava", "next": GOLDENS / "llava_next"}
#: As they are given to the command.
ARGUMENTS = [
    *("--model", f"{MODEL}={server.embedded_model()}"),
    *("--model", f"llava={PATHS['llava']}", "--model", f"next={PATHS['next']}"),
]
PICTURES = [Image.effect_noise((40 + 9 * i, 50), 90).convert("RGB") for i in range(3)]


@pytest.fixture(scope="module")
def several():
    """A server of three models."""
    with serving(*ARGUMENTS) as running:
        yield running


@pytest.fixture(scope="module")
def alone():
    """What each model says to a question and a picture, asked alone."""
    models = {name: load(path) for name, path in PATHS.items()}

    @cache
    def answer(name, question="What is it?", picture=0):
        return generate(*models[name], question, PICTURES[picture], max_tokens=12)

    return answer


def ask(several, name, question="What is it?", picture=0, **options):
    options = {"max_tokens": 12, **options}
    with several.client() as client:
        reply = client.chat.completions.create(
            model=name, messages=[user(PICTURES[picture], question)], **options
        )
    assert reply.model == name
    return reply.choices[0].message.content


def keep_alive(several, name, duration):
    """Loads a model, or with 0 unloads it, as Ollama's clients do."""
    with ollama.Client(host=several.url, timeout=60) as client:
        return client.generate(name, keep_alive=duration).done_reason


def loaded(several):
    states = httpx.get(f"{several.url}/health", **HTTP).json()["models"]
    return {name for name, state in states.items() if state == "loaded"}


@pytest.fixture
def memory_for_one(monkeypatch):
    """There is memory for a model only where no other is loaded."""
    monkeypatch.setattr(model_thread, "available_memory", lambda: 0)


class TestAnswers:
    def test_are_each_models_own_while_models_come_and_go(self, several, alone):
        """Eight clients, three models; a fourth of the questions lets its model go first."""
        random_ = random.Random(0)
        asked = [
            (random_.choice([*PATHS]), f"What is it, {i % 3}?", random_.randrange(3))
            for i in range(24)
        ]
        numbers = count()

        def answer(question):
            if next(numbers) % 4 == 0:
                keep_alive(several, question[0], 0)
            return ask(several, *question)

        with ThreadPoolExecutor(8) as pool:
            said = [*pool.map(answer, asked)]
        assert said == [alone(*question) for question in asked]

    @pytest.mark.usefixtures("memory_for_one")
    def test_are_all_there_where_memory_holds_one_model(self, several, alone):
        """In turns: whoever asks, no model waits for ever for the others to fall silent."""
        asked = [(name, f"Is it {i}?", i) for i in range(3) for name in PATHS]
        with ThreadPoolExecutor(6) as pool:
            said = [*pool.map(lambda question: ask(several, *question), asked)]
        assert said == [alone(*question) for question in asked]
        assert len(loaded(several)) == 1

    @pytest.mark.parametrize("wire", WIRES.values(), ids=WIRES.keys())
    def test_of_names_that_are_none(self, several, wire):
        messages = [{"role": "user", "content": "Hi"}]
        for name in ("moondream", "next-llava", ""):
            body = wire.body({"model": name, "messages": messages, "max_tokens": 1})
            reply = httpx.post(several.url + wire.path, json=body, **HTTP)
            assert reply.status_code == 404
            assert f"'{MODEL}', 'llava', 'next'" in wire.error(reply.json())

    def test_names_may_have_a_tag(self, several):
        assert ask(several, "next:34b") == ask(several, "next")

    def test_are_never_another_models_whatever_becomes_of_the_files(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        shutil.copytree(PATHS["llava"], "some/model")
        with serving("--model", "own=some/model", "--keep-alive", "0") as running:
            first = ask(running, "own")
            Path("some/model").rename("some/gone")
            with pytest.raises(openai.InternalServerError, match="not among the downloaded"):
                ask(running, "own")
            shutil.copytree(PATHS["next"], "some/model")
            with pytest.raises(openai.InternalServerError, match="another model's now; start"):
                ask(running, "own")
            shutil.rmtree("some/model")
            Path("some/gone").rename("some/model")
            assert ask(running, "own") == first


class TestMemory:
    def test_the_one_unused_longest_makes_room(self, several, monkeypatch):
        for name in ("llava", MODEL, "next"):
            ask(several, name)
        assert loaded(several) == {*PATHS}
        keep_alive(several, "next", 0)
        free = iter([0, 1 << 40, 1 << 40])
        monkeypatch.setattr(model_thread, "available_memory", lambda: next(free))
        ask(several, "next")
        assert loaded(several) == {MODEL, "next"}

    @pytest.mark.usefixtures("memory_for_one")
    def test_a_model_that_answers_is_waited_for(self, several):
        ask(several, MODEL)
        with several.client() as client, ThreadPoolExecutor(3) as pool:
            running = client.chat.completions.create(
                model=MODEL, messages=[user("Hi")], stream=True, **endless()
            )
            next(running)
            other = pool.submit(ask, several, "llava")
            assert waits_until(lambda: several.models.engines["llava"].is_wanted)
            later = pool.submit(ask, several, MODEL)  # comes after it, for all that is loaded
            assert waits_until(lambda: several.models.engines[MODEL].is_wanted)
            assert loaded(several) == {MODEL}
            assert not other.done()
            running.close()
            assert other.result(60)
            assert later.result(60)

    @pytest.mark.usefixtures("memory_for_one")
    def test_a_question_that_goes_before_its_turn_loads_nothing(self, several):
        ask(several, MODEL)
        with several.client() as client:
            running = client.chat.completions.create(
                model=MODEL, messages=[user("Hi")], stream=True, **endless()
            )
            next(running)
            with pytest.raises(openai.APITimeoutError), several.client(timeout=0.3) as hasty:
                hasty.chat.completions.create(model="llava", messages=[user("Hi")])
            assert waits_until(lambda: several.models.engines["llava"].taken == 0)
            running.close()
        assert waits_until(lambda: several.engine.taken == 0)
        assert ask(several, MODEL)
        assert loaded(several) == {MODEL}

    def test_unused_models_go_after_a_while(self, alone):
        with serving(*ARGUMENTS, "--keep-alive", "200ms") as hasty:
            assert loaded(hasty) <= {MODEL}
            assert waits_until(lambda: not loaded(hasty))
            for _ in range(2):
                assert ask(hasty, "llava") == alone("llava")
                assert waits_until(lambda: not loaded(hasty))
            with ollama.Client(host=hasty.url, timeout=60) as client:
                assert client.generate("next", keep_alive=-1).done_reason == "load"
                assert client.generate("llava", keep_alive="1h").done_reason == "load"
                time.sleep(0.3)
                llava, next_ = client.ps().models
                assert (llava.model, next_.model) == ("llava:latest", "next:latest")
                assert 3000 < (llava.expires_at.timestamp() - time.time()) < 3600
                assert next_.expires_at.year == 9999
                assert client.generate("next", keep_alive=0).done_reason == "unload"
                assert waits_until(lambda: loaded(hasty) == {"llava"})
                assert [model.model for model in client.list().models] == [
                    f"{name}:latest" for name in PATHS
                ]

    def test_what_is_unloaded_is_gone(self, several):
        engine = several.models.engines["llava"]
        ask(several, "llava")
        keep_alive(several, "llava", 0)
        assert waits_until(lambda: not engine.is_loaded)
        assert engine._generator is None


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        *((0, 0), ("0", 0), (-1, math.inf), ("-1", math.inf), ("-1m", math.inf), (2.5, 2.5)),
        *(("300", 300), ("5m", 300), ("90s", 90), ("1h30m", 5400), ("1.5h", 5400), ("500ms", 0.5)),
        *(("+5m", 300), ("9999999h", math.inf), (1e300, math.inf), ("-0", 0), ("inf", math.inf)),
    ],
)
def test_times(said, seconds):
    assert as_seconds(said) == seconds


@pytest.mark.parametrize("said", ["", "m", "5 m", "5m3", "5x", "nan", "-", "1h-5m", "True"])
def test_what_is_no_time(said):
    with pytest.raises(ValueError, match="is no time; write it as 5m"):
        as_seconds(said)


def test_memory_is_given_back(tmp_path, monkeypatch):
    """Of a process that is a server's alone: within a tenth of what it took before."""
    if not Path("/proc/self/status").exists():
        pytest.skip("this system has no /proc to read a process's memory from")
    clip, llama = random_model.SHAPES["tiny"]
    wide = {**llama, "hidden_size": 512, "intermediate_size": 4096, "num_attention_heads": 8}
    monkeypatch.setitem(random_model.SHAPES, "wide", (clip, wide))
    random_model.write_random_model("wide", tmp_path / "wide", "float16")

    def resident(pid):
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1e3

    picture = png(PICTURES[0])
    with (
        served("--model", str(server.embedded_model()), "--model", str(tmp_path / "wide")) as alone,
        ollama.Client(host=alone.url, timeout=60) as client,
    ):
        unloaded = []
        for _ in range(3):
            client.generate("wide", "Hi", images=[picture], options={"num_predict": 2})
            loaded = resident(alone.pid)
            client.generate("wide", keep_alive=0)
            assert waits_until(lambda: len(client.ps().models) == 1)
            unloaded.append(resident(alone.pid))
            assert loaded > unloaded[-1] + 80
        before, *after = unloaded  # the first one also loads libraries, which stay
        assert max(after) < before * 1.1


class TestLoading:
    @pytest.fixture
    def gate(self, several, monkeypatch):
        """Loading a model waits for it."""
        keep_alive(several, "next", 0)
        assert waits_until(lambda: "next" not in loaded(several))
        begun, may_end = threading.Event(), threading.Event()
        open_checkpoint = loading.open_checkpoint

        def slow(*source):
            begun.set()
            assert may_end.wait(60)
            return open_checkpoint(*source)

        monkeypatch.setattr(loading, "open_checkpoint", slow)
        yield begun, may_end
        may_end.set()

    def test_whoever_goes_meanwhile_is_forgotten(self, several, alone, gate):
        begun, may_end = gate
        with ThreadPoolExecutor(1) as pool:
            patient = pool.submit(ask, several, "next")
            assert begun.wait(60)
            with pytest.raises(openai.APITimeoutError), several.client(timeout=0.2) as hasty:
                hasty.chat.completions.create(model="next", messages=[user("Hi")])
            assert waits_until(lambda: several.models.engines["next"].taken == 1)
            assert httpx.get(f"{several.url}/v1/models", **HTTP).status_code == 200
            may_end.set()
            assert patient.result(60) == alone("next")
        assert waits_until(lambda: several.models.engines["next"].taken == 0)

    def test_everyone_is_told_at_once_where_the_server_ends(self, gate):
        begun, may_end = gate
        may_end.set()
        with serving(*ARGUMENTS, "--keep-alive", "0") as ending, ThreadPoolExecutor(1) as pool:
            may_end.clear()
            begun.clear()
            waiting = pool.submit(ask, ending, "next")
            assert begun.wait(60)
            ending.models.thread.stop()
            with pytest.raises(openai.InternalServerError, match="The server is ending"):
                waiting.result(60)
            may_end.set()

    def test_what_goes_wrong_is_answered_and_tried_again(self, several, alone, monkeypatch):
        keep_alive(several, "next", 0)
        assert waits_until(lambda: "next" not in loaded(several))
        with monkeypatch.context() as patched:
            missing = FileNotFoundError("a disk is gone")
            patched.setattr(loading, "open_checkpoint", partial(_raise, missing))
            for name in ("openai", "anthropic", "responses", "ollama chat"):
                wire = WIRES[name]
                body = wire.body({"model": "next", "messages": [user("Hi")], "max_tokens": 1})
                reply = httpx.post(several.url + wire.path, json=body, **HTTP)
                assert reply.status_code == 503
                assert wire.error(reply.json()) == (
                    "The model next could not be loaded: a disk is gone"
                )
            assert ask(several, MODEL)
        assert ask(several, "next") == alone("next")
        assert all(engine.taken == 0 for engine in several.models.engines.values())


def _raise(error, *_):
    raise error
