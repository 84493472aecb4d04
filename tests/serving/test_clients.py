"""What clients were seen to send: each is answered as the plain request is.

The shapes are those of Open WebUI, LangChain, LiteLLM, Continue, LibreChat, SillyTavern, Home
Assistant's LLM Vision, Frigate, AnythingLLM, LM Studio's and llama.cpp's clients and Vercel's AI
SDK, as their sources build them.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest

from mlx_llava.generation.sampling import Options
from mlx_llava.inputs.image import data_url
from mlx_llava.inputs.messages import Message, Reading, read_messages
from mlx_llava.inputs.templates import TEMPLATES
from mlx_llava.serving.errors import ApiError
from mlx_llava.serving.forms import read_form
from mlx_llava.serving.openai_chat import ChatRequest
from mlx_llava.serving.openai_completions import CompletionRequest
from mlx_llava.serving.parameters import UNSUPPORTED
from tests.conftest import SHAPES, shared_data
from tests.servers import MODEL

URL = data_url(SHAPES.read_bytes())
QUESTION = "What colour is the star?"
TEXT = {"type": "text", "text": QUESTION}
IMAGE = {"type": "image_url", "image_url": {"url": URL}}
NOTHING = {"type": "text", "text": ""}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def post(served, body):
    return served.post(**{"max_tokens": 4, **body})


def said(reply):
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    return choice["message"]["content"], reply.json()["usage"]["prompt_tokens"]


@pytest.fixture(scope="module")
def plain(served):
    """The answer to the plain request, and the length of its prompt."""
    return said(post(served, {"messages": [{"role": "user", "content": [IMAGE, TEXT]}]}))


def image(**fields):
    return {"type": "image_url", "image_url": {"url": URL, **fields}}


CONTENTS = {
    "AnythingLLM's plain URL": [{"type": "image_url", "image_url": URL}, TEXT],
    "Frigate's low detail": [image(detail="low"), TEXT],
    "Frigate 0.14's plain text": [image(detail="low"), QUESTION],
    "LLM Vision's detail": [image(detail="auto"), TEXT],
    "detail of the future": [image(detail="original"), TEXT],
    "no detail": [image(detail=None), TEXT],
    "detail that is no text": [image(detail={"x": 1}), TEXT],
    "Continue's empty text": [{**IMAGE, "text": None}, {**TEXT, "image_url": None}],
    "LiteLLM's format": [image(format="image/png"), TEXT],
    "Vercel's own fields": [{**IMAGE, "providerOptions": {}}, {**TEXT, "providerOptions": {}}],
    "cache control": [IMAGE, {**TEXT, "cache_control": {"type": "ephemeral"}}],
    "ids of parts": [{**IMAGE, "id": "a", "uuid": None}, {**TEXT, "id": "b", "annotations": []}],
    "bare base64": [{"type": "image_url", "image_url": {"url": URL.partition(",")[2]}}, TEXT],
    "capitals": [{"type": "image_url", "image_url": URL.replace("data:", "DATA:")}, TEXT],
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_parts(served, plain, content):
    assert said(post(served, {"messages": [{"role": "user", "content": content}]})) == plain


OPTIONS = {
    "LibreChat": {
        "user": "6650",
        "temperature": 0,
        "top_p": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "stream": False,
    },
    "SillyTavern": {
        "temperature": 0,
        "max_tokens": 4,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "top_p": 1,
        "top_k": 0,
        "logit_bias": {},
        "seed": 7,
        "n": 1,
        "stop": [],
        "logprobs": 0,
    },
    "Continue": {
        "max_tokens": 4,
        "stop": ["<|im_end|>"],
        "prediction": {"type": "content", "content": "x"},
    },
    "AnythingLLM's text for a number": {"temperature": "0", "max_tokens": "4"},
    "LangChain": {"n": 1, "temperature": 0.0, "stream": False, "store": False, "logprobs": False},
    "LangChain's nulls": {
        "n": None,
        "stop": None,
        "seed": None,
        "top_p": None,
        "user": None,
        "tools": None,
        "logit_bias": None,
        "response_format": None,
        "stream_options": None,
        "max_completion_tokens": None,
    },
    "LiteLLM": {
        "metadata": {"a": "b"},
        "extra_body": {},
        "parallel_tool_calls": True,
        "service_tier": "flex",
    },
    "LM Studio": {"max_tokens": -1, "ttl": 300},
    "llama.cpp": {
        "cache_prompt": True,
        "id_slot": -1,
        "timings_per_token": True,
        "typical_p": 1,
        "mirostat": 0,
        "samplers": None,
        "xtc_probability": 0.0,
    },
    "llama.cpp's page": {
        "samplers": "edkypmxt",
        "dynatemp_range": 0,
        "dynatemp_exponent": 1,
        "typical_p": 1,
        "xtc_threshold": 0.1,
        "repeat_last_n": 64,
        "repeat_penalty": 1,
        "dry_multiplier": 0,
        "dry_sequence_breakers": ["\n"],
        "grammar": "",
        "logit_bias": [],
        "reasoning_format": "auto",
        "max_tokens": -1,
    },
    "vLLM": {
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "skip_special_tokens": True,
        "guided_json": None,
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "Ollama": {"keep_alive": "5m", "options": {}, "think": False},
    "Open WebUI": {
        "stream_options": {"include_usage": True},
        "tools": [TOOL],
        "tool_choice": "auto",
        "session_id": "x",
        "chat_id": "y",
        "background_tasks": {},
    },
    "both lengths": {"max_tokens": 900, "max_completion_tokens": 4},
    "no length": {"max_completion_tokens": -1},
    "functions": {"functions": [TOOL["function"]], "function_call": "auto"},
    "empty stops": {"stop": ["", ""]},
    "options of streams": {
        "stream_options": {"include_usage": None, "continuous_usage_stats": True}
    },
    "a field of the future": {"moderation_level": {"deep": [1, None, "x"]}, "store": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(served, plain, options):
    messages = [{"role": "user", "content": [IMAGE, TEXT]}]
    assert said(post(served, {"messages": messages, **options})) == plain


def turn(role, *content, **fields):
    return {"role": role, "content": content[0] if len(content) == 1 else [*content], **fields}


def texts(*parts):
    return [{"type": "text", "text": part} for part in parts]


ORDERS = {
    "names": (
        [
            turn("user", "a", name="bob", id="x", timestamp=1),
            turn("assistant", "b", name="bot"),
            turn("user", "c"),
        ],
        [("user", texts("a")), ("assistant", texts("b")), ("user", texts("c"))],
    ),
    "two questions": (
        [turn("user", "a"), turn("user", "b", "c")],
        [("user", texts("a", "b", "c"))],
    ),
    "two answers": (
        [turn("user", "a"), turn("assistant", "b"), turn("assistant", "c"), turn("user", "d")],
        [("user", texts("a")), ("assistant", texts("b", "c")), ("user", texts("d"))],
    ),
    "system texts anywhere": (
        [
            turn("system", "s"),
            turn("user", "a"),
            turn("developer", "t"),
            turn("user", "b"),
            turn("system", "u"),
        ],
        [("system", texts("s", "t", "u")), ("user", texts("a", "b"))],
    ),
    "an empty system text": (
        [turn("system", ""), turn("user", "a")],
        [("system", texts("")), ("user", texts("a"))],
    ),
    "a greeting": (
        [turn("system", "s"), turn("assistant", "hello"), turn("user", "a")],
        [("system", texts("s")), ("user", []), ("assistant", texts("hello")), ("user", texts("a"))],
    ),
    "no answer": (
        [
            turn("user", "a"),
            turn("assistant", None, refusal=None, audio=None, tool_calls=None),
            turn("user", "b"),
        ],
        [("user", texts("a")), ("assistant", []), ("user", texts("b"))],
    ),
    "an answer to come": (
        [turn("user", "a"), turn("assistant", ""), turn("assistant", None)],
        [("user", texts("a"))],
    ),
    "no content": (
        [turn("user", "a"), {"role": "assistant", "tool_calls": []}, turn("user", "b")],
        [("user", texts("a")), ("assistant", []), ("user", texts("b"))],
    ),
    "thoughts": (
        [
            turn("user", "a"),
            turn("assistant", "b", reasoning_content="hm", reasoning="hm", annotations=[{}]),
            turn("user", "c"),
        ],
        [("user", texts("a")), ("assistant", texts("b")), ("user", texts("c"))],
    ),
    "thoughts as parts": (
        [
            turn("user", "a"),
            turn("assistant", {"type": "thinking", "thinking": "hm"}, TEXT),
            turn("user", "c"),
        ],
        [("user", texts("a")), ("assistant", [TEXT]), ("user", texts("c"))],
    ),
    "a picture after its question": (
        [turn("user", "a"), {"role": "user", "content": [IMAGE]}],
        [("user", [*texts("a"), 0])],
    ),
    "a picture of the system's": (
        [{"role": "system", "content": [TEXT, IMAGE]}, turn("user", IMAGE, NOTHING)],
        [("system", [TEXT]), ("user", [0, 1, NOTHING])],
    ),
    "a picture of the assistant's": (
        [
            turn("user", IMAGE, TEXT),
            {"role": "assistant", "content": [IMAGE]},
            turn("user", "b", IMAGE),
        ],
        [("user", [0, TEXT]), ("assistant", []), ("user", [1, *texts("b"), 2])],
    ),
    "a picture that comes late": (
        [turn("user", "a"), {"role": "system", "content": [IMAGE]}],
        [("system", []), ("user", [*texts("a"), 0])],
    ),
    "nothing": ([{"role": "user", "content": []}], [("user", [])]),
}


def read(messages, **fields):
    body = {"model": MODEL, "messages": messages, **fields}
    return read_form(json.dumps(body).encode(), ChatRequest).request(Options())


@pytest.mark.parametrize(("messages", "expected"), ORDERS.values(), ids=ORDERS.keys())
def test_turns(messages, expected):
    request = read(messages)
    turns = []
    for role, parts in expected:
        said = [part["text"] for part in parts if not isinstance(part, int)]
        turns.append(Message(role, "\n".join(said), images=len(parts) - len(said)))
    assert request.prompts == [turns]
    images = [part for _, parts in expected for part in parts if isinstance(part, int)]
    assert images == [*range(len(request.images))]  # so that they stay in their order


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_every_template_writes_them(template):
    for messages, _ in ORDERS.values():
        request = read(messages)
        turns, _ = read_messages(request.prompts[0], (), Reading(lambda text, **_: text))
        written = template.render(turns)
        assert all(line in written for turn in turns for line in turn.text.split("\n"))


def refusal(messages, **fields):
    with pytest.raises(ApiError) as caught:
        read(messages, **fields)
    assert caught.value.status == 400
    error = caught.value.body()["error"]
    assert "\n" not in error["message"]
    assert error["param"] in error["message"]
    return error["param"]


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ([TEXT, {"type": "text"}], "1.text"),
        ([{"type": "text", "text": None}], "0.text"),
        ([{"type": "text", "text": 5}], "0.text"),
        ([{"text": "Hi"}], "0"),
        ([{}], "0"),
        ([None], "0"),
        ([[TEXT]], "0"),
        ([IMAGE, {"type": "image_url"}], "1.image_url"),
        ([{"type": "image_url", "image_url": None}], "0.image_url"),
        ([{"type": "image_url", "image_url": {}}], "0.image_url.url"),
        ([{"type": "image_url", "image_url": {"url": None}}], "0.image_url.url"),
        ([{"type": "input_image", "file_id": "x"}], "0.image_url"),
        ([{"type": "file", "file": {"file_id": "x"}}], "0.file.file_data"),
        ([{"type": "input_audio", "input_audio": {}}], "0"),
        ([{"type": ["text"], "text": "Hi"}], "0"),
        (None, ""),
        (5, ""),
        ({"type": "text", "text": "Hi"}, ""),
    ],
    ids=str,
)
def test_a_part_that_says_nothing_is_named(content, place):
    messages = [turn("system", "s"), {"role": "user", "content": content}]
    assert refusal(messages) == f"messages.1.content.{place}".rstrip(".")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("function_call", {"name": "f", "arguments": "{}"}),
        ("images", ["iVBORw0KGgo="]),
        ("audio", {"id": "x"}),
        ("prefix", True),
    ],
)
def test_fields_that_say_more_than_text_are_named(field, value):
    messages = [turn("user", "a"), turn("assistant", "b", **{field: value}), turn("user", "c")]
    assert refusal(messages) == f"messages.1.{field}"


@pytest.mark.parametrize("role", ["function", "User", "", None, 5])
def test_other_roles_are_named(role):
    assert refusal([turn("user", "a"), turn(role, "b")]) == "messages.1.role"


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_would_change_the_answer_is_named(name):
    for value in ("something", [1], {"a": 1}, 0.7):
        assert refusal([turn("user", "a")], **{name: value}) == name
    for value in (None, *UNSUPPORTED[name]):
        read([turn("user", "a")], **{name: value})


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_minus_one_is_no_limit(kind):
    said = {"messages": [turn("user", "a")], "prompt": "a"}
    for name in ("max_tokens", "max_completion_tokens"):
        body = json.dumps({"model": MODEL, **said, name: -1}).encode()
        options = read_form(body, kind).request(Options(max_tokens=5)).options
        has_it = name in kind.model_fields
        assert (options.max_tokens > 10**9) is has_it


def test_seeds_of_any_size_are_seeds_of_mlx():
    for seed, expected in ((-1, 2**64 - 1), (2**64, 0), (2**70 + 3, 3), ("7", 7), (7.0, 7)):
        request = read([turn("user", "a")], seed=seed, n=2)
        seeds = [options.seed for options in request.seeded()]
        assert seeds == [expected, (expected + 1) % 2**64]


def test_a_schema_of_llama_cpps_clients_is_followed(served):
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    format = {"type": "json_object", "schema": {**schema, "additionalProperties": False}}
    body = {"messages": [turn("user", IMAGE, TEXT)], "response_format": format, "max_tokens": 20}
    text, _ = said(post(served, body))
    assert json.loads(text)["a"] in ("x", "y")


def test_a_body_with_a_byte_order_mark():
    body = json.dumps({"model": MODEL, "messages": [turn("user", "a")]}).encode("utf-8-sig")
    assert read_form(body, ChatRequest).messages[0].turn() == ("user", ["a"], 0)


#: What the reports' requests are answered with, where that is not 200.
STATUSES = {
    400: [
        "anthropic source", "image type with url",
        "images field (ollama)", 'quoted b"..." python bytes', "double prefix", "empty image",
        "empty url", "url null", "only system", "max_tokens 0",
        "/api/chat (ollama)", "ollama keep_alive, options", "top-level system (cua)",
        "image root name", "image root bad exif", "utf16 body", "latin1 body",
        "lone surrogate \\ud83d",
    ],
    404: ["model other", "model empty", "GET-like /chat/completions"],
}  # fmt: skip


@pytest.fixture
def run_report(served, tmp_path):
    """Runs one of the reports' scripts on the server, and gives the lines that it prints."""
    folder = shared_data("reports/server_requests")
    shutil.copytree(SHAPES.parent, tmp_path / "weights/tiny-llava/examples")
    for path in folder.glob("*.py"):
        text = re.sub("1823[12]", str(served.port), path.read_text())
        (tmp_path / path.name).write_text(text)

    def run(name):
        command = [sys.executable, name]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    return run


def test_requests_of_the_reports(run_report):
    found = {line[:34].strip(): line[35:38] for line in run_report("srv1.py")}
    expected = {name: str(status) for status, names in STATUSES.items() for name in names}
    assert len(found) > 70
    wrong = {
        name: status
        for name, status in found.items()
        if name != "trailing slash" and status != expected.get(name, "200")
    }
    assert wrong == {}


def test_openais_client_in_the_reports(run_report):
    """A remote picture, other endpoints and what no schema can follow are not."""
    found = [line.split(" -> ") for line in run_report("oa.py")]
    refused = {name.split()[0] for name, answer in found if answer.startswith("!!")}
    assert refused == {"rapid#457", "embeddings", "json_schema"}
    assert len(found) == 14
