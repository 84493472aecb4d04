"""The server, asked by Anthropic's own client, against `generate` on the same model."""

from __future__ import annotations

import base64
import json
from typing import Literal

import anthropic
import httpx
import pytest
from PIL import Image
from pydantic import BaseModel

from mlx_llava import generate
from mlx_llava.inputs.image import png
from tests.conftest import SHAPES
from tests.servers import MODEL, endless_schema, serving

PICTURE = Image.open(SHAPES).convert("RGB")
QUESTION = "What colour is the triangle?"
DESCRIBE = "Describe the picture."
BASE64 = base64.b64encode(png(PICTURE)).decode()
IMAGE = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": BASE64},
}
COLOURS = {"type": "string", "enum": ["red", "green", "blue"]}
SCHEMA = {
    "type": "object",
    "properties": {"colour": COLOURS},
    "required": ["colour"],
    "additionalProperties": False,
}
TOOL = {"name": "paint", "description": "Paints.", "input_schema": SCHEMA}


@pytest.fixture(scope="module")
def client(served):
    options = {"base_url": served.url, "api_key": "none", "max_retries": 0, "timeout": 60}
    with anthropic.Anthropic(**options) as client:
        yield client


def asking(*content, **options):
    messages = [{"role": "user", "content": [*content]}]
    return {"model": MODEL, "max_tokens": 60, "messages": messages, **options}


def text(words):
    return {"type": "text", "text": words}


class TestMessages:
    def test_answer_is_that_of_generate(self, client, tiny):
        reply = client.messages.create(**asking(IMAGE, text(QUESTION)))
        (block,) = reply.content
        assert block.text == generate(*tiny, QUESTION, PICTURE) == "red"
        assert (reply.type, reply.role, reply.model) == ("message", "assistant", MODEL)
        assert (reply.stop_reason, reply.stop_sequence) == ("end_turn", None)
        length = tiny[1](QUESTION, PICTURE).input_ids.shape[1]
        usage = reply.usage
        assert usage.input_tokens + usage.cache_read_input_tokens == length
        assert usage.output_tokens == 2

    def test_stream_is_the_whole_answer_event_by_event(self, client):
        whole = client.messages.create(**asking(IMAGE, text(DESCRIBE)))
        with client.messages.stream(**asking(IMAGE, text(DESCRIBE))) as stream:
            said = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert said == final.content[0].text == whole.content[0].text
        assert final.stop_reason == "end_turn"
        assert final.usage.output_tokens == whole.usage.output_tokens
        events = list(client.messages.create(**asking(IMAGE, text(DESCRIBE)), stream=True))
        kinds = [event.type for event in events]
        assert kinds[:2] == ["message_start", "content_block_start"]
        assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
        assert {*kinds[2:-3]} == {"content_block_delta"}
        usage = events[0].message.usage
        length = whole.usage.input_tokens + whole.usage.cache_read_input_tokens
        assert usage.input_tokens + usage.cache_read_input_tokens == length

    def test_turns_system_and_results_of_tools_are_the_conversation(self, client, tiny):
        messages = [
            {"role": "user", "content": [IMAGE, text(QUESTION)]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "x"},
                    {"type": "tool_use", "id": "a", "name": "paint", "input": {"colour": "red"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "a", "content": [text("Done."), IMAGE]},
                    text("And the star?"),
                ],
            },
        ]
        system = [{**text("Be brief."), "cache_control": {"type": "ephemeral"}}]
        asked = {"model": MODEL, "max_tokens": 60, "messages": messages, "system": system}
        reply = client.messages.create(**asked)
        same = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"<image>\n{QUESTION}"},
            {"role": "assistant", "content": '{"colour": "red"}'},
            {"role": "user", "content": "<image>\nDone.\nAnd the star?"},
        ]
        expected = generate(*tiny, same, [PICTURE, PICTURE], max_tokens=60)
        assert reply.content[0].text == expected

    def test_options(self, client, tiny):
        how = {"temperature": 1, "top_k": 1, "top_p": 0.9}  # of which the client has none
        asked = asking(IMAGE, text(DESCRIBE), max_tokens=3, extra_body=how)
        reply = client.messages.create(**asked)
        assert reply.content[0].text == generate(*tiny, DESCRIBE, PICTURE, max_tokens=3)
        assert (reply.stop_reason, reply.usage.output_tokens) == ("max_tokens", 3)
        whole = generate(*tiny, DESCRIBE, PICTURE)
        stops = {"stop_sequences": ["nothing", "triangle"]}
        reply = client.messages.create(**asking(IMAGE, text(DESCRIBE), **stops))
        assert reply.content[0].text == whole[: whole.index("triangle")]
        assert (reply.stop_reason, reply.stop_sequence) == ("stop_sequence", "triangle")

    def test_an_answer_that_has_begun_goes_on(self, client, tiny):
        asked = asking(IMAGE, text(DESCRIBE))
        asked["messages"].append({"role": "assistant", "content": "A small"})
        reply = client.messages.create(**asked)
        expected = generate(*tiny, DESCRIBE, PICTURE, prefill="A small", max_tokens=60)
        assert reply.content[0].text == expected
        assert generate(*tiny, DESCRIBE, PICTURE) == "A small" + expected

    def test_pictures_at_urls(self, served, client, tmp_path):
        remote = {"type": "image", "source": {"type": "url", "url": "https://a.example/a.png"}}
        with pytest.raises(anthropic.BadRequestError, match="--allow-remote-images"):
            client.messages.create(**asking(remote, text(QUESTION)))
        PICTURE.save(tmp_path / "a.png")
        local = {"type": "image", "source": {"type": "url", "url": "a.png"}}
        with serving("--image-root", str(tmp_path), engine=served.engine) as rooted:
            here = client.with_options(base_url=rooted.url)
            reply = here.messages.create(**asking(local, text(QUESTION)))
        assert reply.content[0].text == "red"


class TestJson:
    def test_schema_is_followed(self, client):
        class Colour(BaseModel):
            colour: Literal["red", "green", "blue"]

        asked = asking(IMAGE, text(QUESTION))
        reply = client.messages.parse(**asked, output_format=Colour)
        assert reply.parsed_output == Colour(colour="red")

    @pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "paint"}])
    def test_a_forced_tool_is_called(self, client, tiny, choice):
        asked = asking(IMAGE, text(QUESTION), tools=[TOOL], tool_choice=choice)
        reply = client.messages.create(**asked)
        (call,) = reply.content
        question = f"{QUESTION}\nAnswer with the arguments of\npaint: Paints."
        said = generate(*tiny, question, PICTURE, json_schema=SCHEMA)
        assert (call.type, call.name, call.input) == ("tool_use", "paint", json.loads(said))
        assert reply.stop_reason == "tool_use"
        with client.messages.stream(**asked) as stream:
            final = stream.get_final_message()
        assert final.content[0].input == call.input
        assert final.stop_reason == "tool_use"

    def test_a_call_that_is_cut_off_is_what_there_is_of_it(self, client):
        schema = {"type": "object", "properties": {"a": {"type": "string", "minLength": 500}}}
        tool = {"name": "say", "input_schema": {**schema, "required": ["a"]}}
        asked = asking(text("Hi"), tools=[tool], tool_choice={"type": "any"}, max_tokens=5)
        for stream in (False, True):
            if stream:
                with client.messages.stream(**asked) as running:
                    reply = running.get_final_message()
            else:
                reply = client.messages.create(**asked)
            assert (reply.stop_reason, reply.content[0].name) == ("max_tokens", "say")

    def test_tools_that_may_be_called_are_not(self, client):
        reply = client.messages.create(**asking(IMAGE, text(QUESTION), tools=[TOOL]))
        assert reply.content[0].text == "red"


def test_count_tokens_is_what_an_answer_reads(client, tiny):
    asked = {"messages": asking(IMAGE, text(QUESTION))["messages"], "system": "Be brief."}
    count = client.messages.count_tokens(model=MODEL, **asked).input_tokens
    reply = client.messages.create(model=MODEL, max_tokens=1, **asked)
    assert count == reply.usage.input_tokens + reply.usage.cache_read_input_tokens
    assert count == tiny[1](QUESTION, PICTURE, system="Be brief.").input_ids.shape[1]


def test_models(client):
    (model,) = client.models.list()
    assert (model.id, model.display_name, model.type) == (MODEL, MODEL, "model")
    assert client.models.retrieve(MODEL).id == MODEL


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"extra_body": {"temperature": 2}}, "temperature: .* less than or equal to 1"),
            ({"max_tokens": 0}, "max_tokens: .* greater than or equal to 1"),
            ({"stop_sequences": ["x"] * 17}, "stop_sequences: .* at most 16"),
            ({"tool_choice": {"type": "any"}}, "tool_choice names no function"),
            ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "b"}}, "names no function"),
            ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "content.0"),
            ({"messages": []}, "messages: .* at least 1"),
            ({"messages": [{"role": "assistant", "content": "a"}]}, "must be the user's"),
            ({"extra_body": {"mcp_servers": [{"url": "x"}]}}, "mcp_servers is not supported"),
        ],
        ids=str,
    )
    def test_parameters_are_refused_by_name(self, client, options, message):
        with pytest.raises(anthropic.BadRequestError, match=message) as caught:
            client.messages.create(**{**asking(text("Hi")), **options})
        assert {*caught.value.body} == {"type", "error"}
        assert caught.value.type == "invalid_request_error"

    def test_unknown_model(self, client):
        with pytest.raises(anthropic.NotFoundError, match="'claude' does not exist") as caught:
            client.messages.create(**{**asking(text("Hi")), "model": "claude"})
        assert caught.value.type == "not_found_error"

    def test_what_changes_nothing_is_taken(self, client):
        more = {
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "metadata": {"user_id": "me"},
            "service_tier": "auto",
            "output_config": {"effort": "low"},
        }
        assert client.messages.create(**asking(text("Hi"), max_tokens=1, **more)).content

    def test_api_key(self, served):
        key = "0123456789abcdef"
        with serving("--api-key", key, engine=served.engine) as guarded:
            options = {"base_url": guarded.url, "max_retries": 0, "timeout": 60}
            with anthropic.Anthropic(api_key=key, **options) as knowing:
                assert knowing.messages.create(**asking(text("Hi"), max_tokens=1)).content
            for wrong in (key[:-1], key + "x", "none"):
                refused = pytest.raises(anthropic.AuthenticationError)
                with anthropic.Anthropic(api_key=wrong, **options) as guessing, refused as caught:
                    guessing.messages.create(**asking(text("Hi")))
                assert caught.value.type == "authentication_error"

    def test_a_stream_tells_of_its_error(self, served):
        form = {"type": "json_schema", "schema": endless_schema()}
        asked = asking(text("One two"), max_tokens=100_000, output_config={"format": form})
        with serving("--timeout", "0.3", engine=served.engine) as hasty:
            options = {"base_url": hasty.url, "api_key": "none", "max_retries": 0, "timeout": 60}
            client = anthropic.Anthropic(**options)
            with client, pytest.raises(anthropic.APIStatusError, match="more than 0.3 s"):
                list(client.messages.create(**asked, stream=True))

    def test_other_paths(self, served):
        reply = httpx.get(served.url + "/v1/messages", timeout=60)
        assert (reply.status_code, reply.json()["type"]) == (405, "error")
