"""Ollama's API, asked by its own client and as other programs ask it, against `generate`."""

from __future__ import annotations

import base64
import json
import math
import time
from dataclasses import replace

import httpx
import ollama
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_llava import generate
from mlx_llava.generation.json_schema import ANY_OBJECT, LENIENT
from mlx_llava.generation.sampling import Options
from mlx_llava.inputs.image import png
from mlx_llava.inputs.messages import Message
from mlx_llava.serving.errors import ApiError
from mlx_llava.serving.forms import read_form
from mlx_llava.serving.ollama import ChatRequest, GenerateRequest
from tests.conftest import SHAPES
from tests.servers import HTTP, MODEL, endless_schema, serving, user, waits_until

PICTURE = Image.open(SHAPES).convert("RGB")
BASE64 = base64.b64encode(SHAPES.read_bytes()).decode()
RED = base64.b64encode(png(Image.new("RGB", (9, 9), "red"))).decode()
QUESTION = "What colour is the triangle?"
COLOUR = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def named(served):
    """A server whose model has Ollama's name too."""
    with serving("--alias", "llava", engine=served.engine) as named:
        yield named


@pytest.fixture(scope="module")
def client(named):
    with ollama.Client(host=named.url, timeout=60) as client:
        yield client


def post(named, path, body):
    return httpx.post(f"{named.url}/api/{path}", json=body, **HTTP)


def turn(content, *images, role="user"):
    return {"role": role, "content": content, "images": [*images]}


class TestAnswers:
    @pytest.mark.parametrize("question", [QUESTION, "Describe the picture."])
    def test_are_the_same_over_every_api_and_those_of_generate(self, client, named, tiny, question):
        expected = generate(*tiny, question, PICTURE)
        by_openai = named.post(messages=[user(PICTURE, question)]).json()
        assert by_openai["choices"][0]["message"]["content"] == expected
        for stream in (False, True):
            said = client.generate("llava:7b", question, images=[SHAPES], stream=stream)
            pieces = [*said] if stream else [said]
            assert "".join(piece.response for piece in pieces) == expected
            said = client.chat("llava", [turn(question, SHAPES.read_bytes())], stream=stream)
            pieces = [*said] if stream else [said]
            assert "".join(piece.message.content for piece in pieces) == expected
            assert {piece.message.role for piece in pieces} == {"assistant"}

    def test_figures(self, client, named):
        usage = named.post(messages=[user(PICTURE, QUESTION)]).json()["usage"]
        began = time.monotonic_ns()
        answer = client.generate("llava", QUESTION, images=[SHAPES])
        took = time.monotonic_ns() - began
        assert (answer.model, answer.done, answer.done_reason) == ("llava", True, "stop")
        assert answer.prompt_eval_count == usage["prompt_tokens"]
        assert answer.eval_count == usage["completion_tokens"]
        assert 0 < answer.eval_duration < answer.total_duration < took
        assert 0 < answer.prompt_eval_duration < answer.total_duration
        cut_off = client.generate(
            "llava", "Describe it.", images=[SHAPES], options={"num_predict": 2}
        )
        assert (cut_off.done_reason, cut_off.eval_count) == ("length", 2)

    @pytest.mark.parametrize("path", ["chat", "generate"])
    def test_are_streams_of_lines_unless_asked_for_whole(self, named, path):
        body = {"model": MODEL, "prompt": QUESTION, "messages": [turn(QUESTION)]}
        reply = post(named, path, body)
        assert reply.headers["content-type"] == "application/x-ndjson"
        *lines, last = map(json.loads, reply.text.splitlines())
        assert [line["done"] for line in lines] == [False] * len(lines)
        said = {"chat": {"message": {"role": "assistant", "content": ""}}}.get(
            path, {"response": ""}
        )
        assert said.items() <= last.items()
        assert (last["done"], last["done_reason"]) == (True, "stop")
        whole = post(named, path, {**body, "stream": False})
        assert whole.headers["content-type"] == "application/json"
        assert whole.json().keys() == last.keys()

    def test_are_json_where_that_is_asked_for(self, client):
        for format in (COLOUR, "json"):
            answer = client.chat("llava", [turn(QUESTION, SHAPES)], format=format)
            if format == COLOUR:
                assert json.loads(answer.message.content) in (
                    {"colour": colour} for colour in ("red", "green", "blue")
                )
            else:
                assert answer.message.content.startswith("{")

    def test_log_probabilities_are_openais(self, client, named):
        asked = named.post(messages=[user(PICTURE, QUESTION)], logprobs=True, top_logprobs=2)
        expected = asked.json()["choices"][0]["logprobs"]["content"]
        body = {"model": "llava", "messages": [turn(QUESTION, BASE64)], "stream": False}
        found = post(named, "chat", {**body, "logprobs": True, "top_logprobs": 2}).json()
        assert found["logprobs"] == expected
        streamed = client.chat(
            "llava", [turn(QUESTION, SHAPES)], logprobs=True, top_logprobs=2, stream=True
        )
        tokens = [entry.token for piece in streamed for entry in piece.logprobs or ()]
        assert tokens == [entry["token"] for entry in expected]

    def test_raw_text_is_read_as_it_is(self, client, tiny):
        text = f"USER: <image>\n{QUESTION} ASSISTANT:"
        answer = client.generate("llava", text, images=[SHAPES], raw=True)
        assert answer.response == generate(*tiny, text, PICTURE, raw=True)

    def test_begin_as_the_last_message_does(self, client, tiny):
        messages = [turn("Describe the picture.", SHAPES), turn("A small", role="assistant")]
        answer = client.chat("llava", messages)
        whole = generate(*tiny, "Describe the picture.", PICTURE)
        assert f"A small{answer.message.content}" == whole

    def test_nothing_loads_the_model(self, client):
        for keep_alive in ("5m", -1, 0, "0s", 3.5, None):
            answer = client.generate("llava", keep_alive=keep_alive)
            reason = "unload" if keep_alive in (0, "0s") else "load"
            assert (answer.response, answer.done, answer.done_reason) == ("", True, reason)
        answer = client.chat("llava", [])
        assert (answer.message.content, answer.done_reason) == ("", "load")
        (line,) = client.generate("llava", stream=True)
        assert (line.done, line.done_reason) == (True, "load")

    def test_a_long_chat_loses_its_oldest_turns(self, named, client):
        """As many as make room for the answer; system texts and the last question stay."""
        turns = []
        for i in range(12):
            shown = [BASE64 if i > 5 else RED] if i % 2 else []
            turns += [turn(f"Question {i}. " + "a b c d " * 12, *shown)]
            turns += [turn("e f g h " * 12, role="assistant")]
        system, last = turn("Be brief.", role="system"), turn(QUESTION)
        asked = {"model": "llava", "options": {"num_predict": 200}}
        cut = client.chat(messages=[*turns, system, last], **asked)
        whole = {**asked, "truncate": False, "stream": False}
        answers = [
            post(named, "chat", {**whole, "messages": [system, *turns[first:], last]}).json()
            for first in range(0, len(turns), 2)
        ]
        assert "context" in answers[0]["error"]
        said = [answer for answer in answers if "error" not in answer]
        lengths = {answer["prompt_eval_count"]: answer["message"]["content"] for answer in said}
        longest = max(length for length in lengths if length + 200 <= 1024)
        assert (cut.prompt_eval_count, cut.message.content) == (longest, lengths[longest])
        alone = {**asked, "messages": [turn("x " * 9000)]}
        assert "context" in post(named, "chat", alone).json()["error"]


class TestModels:
    def test_are_listed_with_their_other_names(self, client):
        listed, loaded = client.list().models, client.ps().models
        names = [f"{MODEL}:latest", "llava:latest"]
        assert [model.model for model in listed] == [model.name for model in loaded] == names
        for model in (*listed, *loaded):
            assert len(model.digest) == 64
            assert "clip" in model.details.families
            assert model.size > 1_000_000
        for name in names:
            assert client.generate(name, "Hi", options={"num_predict": 1}).done

    @pytest.mark.parametrize("name", ["llava", "llava:7b", MODEL])
    def test_show_what_they_can(self, client, tiny, name):
        shown = client.show(name)
        assert shown.capabilities == ["completion", "vision"]
        assert shown.modelinfo["general.architecture"] == "llama"
        assert shown.modelinfo["llama.context_length"] == tiny[1].context_length
        sizes = [array.size for _, array in tree_flatten(tiny[0].parameters())]
        assert shown.modelinfo["general.parameter_count"] == sum(sizes)
        assert shown.details.parameter_size == "1.9M"
        assert shown.parameters.splitlines() == [
            f"{'num_ctx':<30} 1024",
            f"{'num_predict':<30} 512",
            f"{'temperature':<30} 0.0",
            f'{"stop":<30} "</s>"',
        ]
        assert shown.template == "SYSTEM: {{ .System }} USER: {{ .Prompt }} ASSISTANT:"

    def test_tell_whether_they_know_videos(self, client, named, monkeypatch):
        processor = named.engine.processor
        config = replace(processor.config, model_type="llava_next_video")
        monkeypatch.setattr(processor, "config", config)
        assert client.show("llava").capabilities == ["completion", "vision", "video"]

    def test_are_pulled_if_they_are_here(self, client, named):
        assert client.pull("llava").status == "success"
        assert [state.status for state in client.pull("llava", stream=True)][-1] == "success"
        assert post(named, "pull", {"name": "llava:13b"}).text.endswith('{"status": "success"}\n')

    def test_that_are_not_here(self, client):
        for ask in (client.show, client.pull, client.generate, client.chat):
            with pytest.raises(ollama.ResponseError, match="does not exist") as caught:
                ask("moondream")
            assert caught.value.status_code == 404

    def test_are_neither_made_nor_copied_nor_embed(self, client):
        asked = {
            "create": lambda: client.create("x", from_="llava"),
            "copy": lambda: client.copy("llava", "x"),
            "delete": lambda: client.delete("llava"),
            "push": lambda: client.push("llava"),
            "embed": lambda: client.embed("llava", "x"),
            "embeddings": lambda: client.embeddings("llava", "x"),
            "blobs": lambda: client.create_blob(SHAPES),
        }
        for name, ask in asked.items():
            with pytest.raises(ollama.ResponseError, match=f"/api/{name}") as caught:
                ask()
            assert caught.value.status_code == 501

    def test_what_else_clients_look_for(self, named):
        assert httpx.get(named.url, timeout=60).text == "Ollama is running"
        assert httpx.head(named.url, timeout=60).status_code == 200
        page = httpx.get(named.url, headers={"Accept": "text/html,*/*"}, timeout=60)
        assert page.headers["content-type"].startswith("text/html")
        version = httpx.get(f"{named.url}/api/version", timeout=60).json()["version"]
        assert [*map(int, version.split("."))] >= [0, 6, 4]
        for path, status in (("nothing", 404), ("chat", 405)):
            reply = httpx.get(f"{named.url}/api/{path}", timeout=60)
            assert (reply.status_code, [*reply.json()]) == (status, ["error"])


def read(kind=ChatRequest, **body):
    asked = {"messages": [turn("Hi")]} if kind is ChatRequest else {"prompt": "Hi"}
    whole = {"model": "x", **asked, **body}
    form = read_form(json.dumps(whole).encode(), kind)
    return form, form.request(Options(max_tokens=9, stop=("END",)))


class TestRequests:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"temperature": 0.8}, {"temp": 0.8}),
            ({"temperature": 3}, {"temp": 3}),
            ({"temperature": 1, "top_p": 0.9, "top_k": 40}, {"temp": 1, "top_p": 0.9, "top_k": 40}),
            ({"temperature": 1, "top_p": 0}, {"temp": 0}),
            ({"top_k": -1}, {"top_k": 0}),
            ({"min_p": 0.1, "repeat_penalty": 1.1}, {"min_p": 0.1, "repetition_penalty": 1.1}),
            ({"repeat_penalty": 1.1, "repeat_last_n": 20}, {"repetition_penalty": 1.1}),
            ({"repeat_penalty": 1.0, "repeat_last_n": 64}, {"repetition_penalty": 1}),
            (
                {"presence_penalty": 0.3, "frequency_penalty": -0.5},
                {"presence_penalty": 0.3, "frequency_penalty": -0.5},
            ),
            ({"num_predict": 7}, {"max_tokens": 7}),
            ({"seed": 3}, {"seed": 3}),
            ({"seed": 2**64 + 3}, {"seed": 3}),
            ({"seed": -1}, {"seed": None}),
            ({"stop": ["a", "", "b"]}, {"stop": ("END", "a", "b")}),
            ({"stop": "a"}, {"stop": ("END", "a")}),
            ({}, {"max_tokens": 9, "stop": ("END",)}),
        ],
        ids=str,
    )
    def test_options(self, options, expected):
        for kind in (ChatRequest, GenerateRequest):
            taken = read(kind, options=options)[1].options
            assert {name: getattr(taken, name) for name in expected} == expected

    @pytest.mark.parametrize("number", [-2, -1, 0])
    def test_no_limit(self, number):
        assert read(options={"num_predict": number})[1].options.max_tokens > 10**9

    def test_what_only_says_how_to_compute(self):
        how = {
            "num_ctx": 8192.0,
            "num_batch": 2,
            "num_gpu": 1,
            "main_gpu": 0,
            "num_thread": 8,
            "low_vram": False,
            "use_mmap": True,
            "use_mlock": False,
            "numa": False,
            "num_keep": 5,
            "mirostat": 0,
            "mirostat_tau": 5,
            "mirostat_eta": 0.1,
            "tfs_z": 1,
            "typical_p": 1,
            "repeat_last_n": 64,
            "penalize_newline": True,
            "temperature": None,
            "presence_penalty": 0,
            "frequency_penalty": 0.0,
            "new_topic_penalty": 1,
        }
        plain = read()[1]
        assert read(options=how, think=False, tools=[{}])[1] == plain
        assert read(options=None, format="", format_version=2, shift=True)[1] == plain

    @pytest.mark.parametrize(
        ("name", "body"),
        [
            ("mirostat", {"options": {"mirostat": 2}}),
            ("typical_p", {"options": {"typical_p": 0.7}}),
            ("tfs_z", {"options": {"tfs_z": 0.5}}),
            ("repeat_last_n", {"options": {"repeat_penalty": 1.1, "repeat_last_n": 64}}),
            ("temperature", {"options": {"temperature": -1}}),
            ("top_p", {"options": {"top_p": 1.5}}),
            ("repeat_penalty", {"options": {"repeat_penalty": 0}}),
            ("presence_penalty", {"options": {"presence_penalty": "x"}}),
            ("stop", {"options": {"stop": [1]}}),
            ("options", {"options": [1]}),
            ("suffix", {"suffix": "x"}),
            ("think", {"think": True}),
            ("think", {"think": "high"}),
            ("format", {"format": "xml"}),
            ("format", {"format": [1]}),
            ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
            ("messages.0.role", {"messages": [turn("Hi", role="robot")]}),
            ("messages.0.content", {"messages": [{"role": "user", "content": [{}]}]}),
            ("messages.0.images", {"messages": [{**turn("Hi"), "images": "x"}]}),
            ("messages.0.tool_calls", {"messages": [{**turn("Hi"), "tool_calls": "x"}]}),
            ("keep_alive", {"keep_alive": "soon"}),
            ("keep_alive", {"keep_alive": {}}),
        ],
        ids=str,
    )
    def test_what_would_change_the_answer_is_named(self, name, body):
        with pytest.raises(ApiError) as caught:
            read(**body)
        assert caught.value.status == 400
        (message,) = caught.value.body("/api/chat").values()
        assert message.startswith(name)
        assert "\n" not in message

    def test_turns(self):
        messages = [
            turn("s", role="system"),
            {"role": "user", "content": "a", "images": None, "thinking": None},
            {"role": "assistant", "content": None, "tool_calls": []},
            turn("b", "/9j/", "data:image/png;base64,iVBORw0KGgo="),
        ]
        request = read(messages=messages)[1]
        assert request.prompts == [
            [
                Message("system", "s"),
                Message("user", "a"),
                Message("assistant", ""),
                Message("user", "b", images=2),
            ]
        ]
        assert request.images == ["data:;base64,/9j/", "data:image/png;base64,iVBORw0KGgo="]

    def test_tools_say_what_the_user_says(self):
        call = {"function": {"name": "light", "arguments": {"where": "hall"}}}
        messages = [
            turn("Is it dark?"),
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": '{"data": "no"}', "tool_name": "light"},
        ]
        assert read(messages=messages)[1].prompts == [
            [
                Message("user", "Is it dark?"),
                Message("assistant", '{"where": "hall"}'),
                Message("user", '{"data": "no"}'),
            ]
        ]

    def test_marks_of_pictures_are_no_words(self):
        messages = [turn("At one:\n[img]\nat two:\n[img]\n[img]?", "/9j/", "/9k/")]
        message = Message("user", "At one:\n\nat two:\n\n[img]?", images=2)
        assert read(messages=messages)[1].prompts == [[message]]

    @pytest.mark.parametrize(
        ("said", "seconds"), [(-1, math.inf), ("5m", 300), (0, 0), (None, None), ("1.5h", 5400)]
    )
    def test_how_long_a_model_stays(self, said, seconds):
        for kind in (ChatRequest, GenerateRequest):
            assert read(kind, keep_alive=said)[1].keep_alive == seconds

    def test_formats(self):
        hint = {**COLOUR, **LENIENT}
        for format, expected in (("json", ANY_OBJECT), (COLOUR, hint), ("", None), (None, None)):
            assert read(format=format)[1].options.json_schema == expected

    def test_system_text_of_a_prompt(self):
        request = read(GenerateRequest, system="s", images=["/9j/"])[1]
        assert request.prompts == [[Message("system", "s"), Message("user", "Hi", images=1)]]

    @pytest.mark.parametrize(
        ("body", "ignored"),
        [
            ({"template": "{{ .Prompt }}"}, "template"),
            ({"context": [1, 2], "template": "x"}, "context, template"),
            ({"context": [], "template": ""}, ""),
        ],
    )
    def test_what_is_ignored_is_warned_of(self, named, body, ignored):
        asked = {"model": MODEL, "prompt": "Hi", "options": {"num_predict": 1}, **body}
        for stream in (True, False):
            reply = post(named, "generate", {**asked, "stream": stream})
            assert reply.status_code == 200
            assert ignored in reply.headers.get("warning", "")
            assert ("warning" in reply.headers) == bool(ignored)


class TestErrors:
    def test_in_a_stream_are_its_last_line(self, served):
        with serving("--timeout", "0.3", engine=served.engine) as hasty:
            body = {"model": MODEL, "prompt": "Hi", "format": endless_schema()}
            reply = post(hasty, "generate", {**body, "options": {"num_predict": -1}})
        assert reply.status_code == 200
        assert json.loads(reply.text.splitlines()[-1]) == {
            "error": "The answer took more than 0.3 s."
        }

    def test_a_client_that_goes_away_ends_its_answer(self, client, served):
        options = {"num_predict": -1}
        answer = client.generate(
            "llava", "Hi", format=endless_schema(), options=options, stream=True
        )
        next(answer)
        assert served.engine.taken == 1
        answer.close()
        assert waits_until(lambda: served.engine.taken == 0)


LABELS = {
    "type": "object",
    "properties": {"labels": {"type": "array", "items": {"type": "string"}, "maxItems": 1}},
    "required": ["labels"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "HassTurnOn", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"function": {"name": "HassTurnOn", "arguments": {"name": "lamp"}}}
#: What programs send with their defaults, as their sources build it: path, body.
PROGRAMS = {
    "Frigate 0.16's description": (
        "generate",
        {"prompt": QUESTION, "images": [BASE64], "stream": False},
    ),
    "Frigate's description": (
        "generate",
        {
            "prompt": QUESTION,
            "images": [BASE64],
            "stream": False,
            "format": LABELS,
            "options": {"temperature": 0.5, "repeat_penalty": 1.05, "presence_penalty": 0.3},
        },
    ),
    "Frigate's chat": (
        "chat",
        {
            "messages": [{"role": "user", "content": QUESTION}],
            "tools": [TOOL],
            "stream": True,
            "options": {"temperature": 0.5, "repeat_penalty": 1.05, "presence_penalty": 0.3},
        },
    ),
    "Frigate's description by chat": (
        "chat",
        {
            "messages": [
                {"role": "user", "content": f"{QUESTION}\n[img]\n[img]", "images": [BASE64] * 2}
            ],
            "stream": False,
            "format": LABELS,
            "options": {"temperature": 0.5, "repeat_penalty": 1.05, "presence_penalty": 0.3},
        },
    ),
    "Frigate's chat with a tool's result": (
        "chat",
        {
            "messages": [
                {"role": "system", "content": "You are a helpful assistant for Frigate."},
                {"role": "user", "content": "What is at the door?"},
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "{}", "tool_call_id": "a", "name": "get_live_context"},
                {"role": "user", "content": f"{QUESTION}\n[img]", "images": [BASE64]},
            ],
            "tools": [TOOL],
            "stream": False,
            "options": {"temperature": 0.5, "repeat_penalty": 1.05, "presence_penalty": 0.3},
        },
    ),
    "Frigate's count of tokens": (
        "chat",
        {
            "messages": [{"role": "user", "content": ".", "images": [BASE64]}],
            "stream": False,
            "options": {"temperature": 0.5, "repeat_penalty": 1.05, "num_predict": 1},
        },
    ),
    "PhotoPrism's caption": (
        "generate",
        {
            "id": "b5f1c6d2",
            "prompt": QUESTION,
            "suffix": "",
            "stream": False,
            "options": {"temperature": 0.1},
            "images": [BASE64],
        },
    ),
    "PhotoPrism's labels": (
        "generate",
        {
            "id": "b5f1c6d2",
            "prompt": QUESTION,
            "suffix": "",
            "stream": False,
            "system": "Output concise JSON that matches the schema.",
            "format": "json",
            "options": {"temperature": 0.1, "top_p": 0.9, "stop": ["\n\n"], "num_predict": 20},
            "images": [BASE64],
        },
    ),
    "Home Assistant's conversation": (
        "chat",
        {
            "messages": [
                {"role": "system", "content": "You are a voice assistant for Home Assistant."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello.", "tool_calls": None},
                {"role": "user", "content": QUESTION, "images": [BASE64]},
            ],
            "tools": [TOOL],
            "stream": True,
            "keep_alive": -1,
            "think": False,
            "options": {"num_ctx": 8192.0},
            "format": None,
        },
    ),
    "Home Assistant's conversation after a tool": (
        "chat",
        {
            "messages": [
                {"role": "system", "content": "You are a voice assistant for Home Assistant."},
                {"role": "user", "content": "Turn on the light", "images": None},
                {"role": "assistant", "content": "", "thinking": None, "tool_calls": [CALL]},
                {"role": "tool", "content": '{"data": {"success": []}, "error": null}'},
            ],
            "tools": [TOOL],
            "stream": True,
            "keep_alive": -1,
            "think": False,
            "options": {"num_ctx": 8192.0},
            "format": None,
        },
    ),
    "Home Assistant's task": (
        "chat",
        {
            "messages": [{"role": "user", "content": QUESTION, "images": [BASE64]}],
            "stream": True,
            "keep_alive": "300s",
            "options": {"num_ctx": 8192},
            "format": LABELS,
        },
    ),
    "Open WebUI's chat": (
        "chat",
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": QUESTION, "images": [BASE64]},
            ],
            "stream": True,
            "keep_alive": "5m",
            "num_predict": 128,
            "options": {"temperature": 0.0, "top_k": 40, "repeat_last_n": 64, "stop": ["###"]},
            "metadata": {"chat_id": "x", "features": {}},
        },
    ),
    "Open WebUI's title": (
        "chat",
        {
            "messages": [{"role": "user", "content": "Create a title."}],
            "stream": False,
            "options": {"num_predict": 1000},
            "metadata": {"task": "title"},
        },
    ),
}


def test_a_client_that_says_no_type(named):
    """LiteLLM's, for `ollama/` and `ollama_chat/`."""
    for path, body in (PROGRAMS["PhotoPrism's caption"], PROGRAMS["Open WebUI's title"]):
        text = json.dumps({"model": "llava", **body})
        reply = httpx.post(f"{named.url}/api/{path}", content=text, **HTTP)
        assert reply.json()["done_reason"] == "stop"


@pytest.mark.parametrize(("path", "body"), PROGRAMS.values(), ids=PROGRAMS.keys())
def test_what_programs_send(named, path, body):
    reply = post(named, path, {"model": "llava:7b", **body})
    assert reply.status_code == 200, reply.text
    last = json.loads(reply.text.splitlines()[-1])
    assert last["done_reason"] in ("stop", "length")
    assert last["eval_count"] > 0
    assert len(reply.text.splitlines()) > body["stream"]
