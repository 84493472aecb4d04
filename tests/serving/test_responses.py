"""OpenAI's Responses API, asked by OpenAI's own client, against `generate` on the same model."""

from __future__ import annotations

import json
from typing import Literal

import openai
import pytest
from PIL import Image
from pydantic import BaseModel

from mlx_llava import generate
from mlx_llava.inputs.image import data_url, png
from mlx_llava.serving.errors import ApiError
from mlx_llava.serving.kept import Answered, Kept
from tests.conftest import SHAPES
from tests.servers import MODEL, endless_schema, serving

PICTURE = Image.open(SHAPES).convert("RGB")
QUESTION = "What colour is the triangle?"
DESCRIBE = "Describe the picture."
URL = data_url(png(PICTURE))
IMAGE = {"type": "input_image", "image_url": URL, "detail": "auto"}
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["red", "green", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
PAINT = {"type": "function", "name": "paint", "parameters": SCHEMA, "strict": True}


def said(*parts):
    content = [{"type": "input_text", "text": p} if isinstance(p, str) else p for p in parts]
    return [{"role": "user", "content": content}]


def ask(client, *parts, **options):
    return client.responses.create(model=MODEL, input=said(*parts), **options)


def test_answer_is_that_of_generate(client, tiny):
    reply = ask(client, IMAGE, QUESTION)
    assert reply.output_text == generate(*tiny, QUESTION, PICTURE) == "red"
    assert (reply.object, reply.status, reply.model) == ("response", "completed", MODEL)
    length = tiny[1](QUESTION, PICTURE).input_ids.shape[1]
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (length, 2)
    assert (reply.store, reply.incomplete_details, reply.error) == (True, None, None)
    file = {"type": "input_file", "filename": "a.png", "file_data": URL}
    assert ask(client, file, QUESTION).output_text == "red"
    text = client.responses.create(model=MODEL, input="Hi", max_output_tokens=5)
    assert text.output_text == generate(*tiny, "Hi", max_tokens=5)


def test_stream_is_the_whole_answer_event_by_event(client):
    whole = ask(client, IMAGE, DESCRIBE)
    with client.responses.stream(model=MODEL, input=said(IMAGE, DESCRIBE)) as stream:
        events = [*stream]
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == (
        whole.output_text
    )
    kinds = [event.type for event in events]
    assert [kind for kind in kinds if not kind.endswith(".delta")] == [
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == [*range(len(events))]
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_lengths_and_logprobs(client):
    reply = ask(client, IMAGE, DESCRIBE, max_output_tokens=3, top_logprobs=2)
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    (part,) = reply.output[0].content
    assert "".join(token.token for token in part.logprobs).strip() == reply.output_text
    assert [len(token.top_logprobs) for token in part.logprobs] == [2, 2, 2]
    *_, last = ask(client, IMAGE, DESCRIBE, max_output_tokens=3, stream=True)
    assert last.type == "response.incomplete"


class TestConversation:
    def test_items_are_the_conversation(self, client, tiny):
        items = [
            *said(IMAGE, QUESTION),
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": '{"a": 1}'},
            {"type": "function_call_output", "call_id": "a", "output": "Done."},
            {"role": "developer", "content": "In one word."},
            {"role": "user", "content": "And the star?"},
        ]
        reply = client.responses.create(model=MODEL, input=items, instructions="Be brief.")
        same = [
            {"role": "system", "content": "Be brief.\nIn one word."},
            {"role": "user", "content": f"<image>\n{QUESTION}"},
            {"role": "assistant", "content": '{"a": 1}'},
            {"role": "user", "content": "Done.\nAnd the star?"},
        ]
        assert reply.output_text == generate(*tiny, same, PICTURE)

    def test_items_that_are_kept_are_named(self, client, tiny):
        """As Vercel's AI SDK does for each earlier answer."""
        first = ask(client, IMAGE, QUESTION)
        (message,) = first.output
        call = {"type": "function", "name": "paint"}
        second = ask(client, "Paint.", tools=[PAINT], tool_choice=call)
        references = [{"type": "item_reference", "id": message.id}, {"id": second.output[0].id}]
        items = [*said(IMAGE, QUESTION), *references, *said("And the star?")]
        reply = client.responses.create(model=MODEL, input=items)
        same = [
            {"role": "user", "content": f"<image>\n{QUESTION}"},
            {"role": "assistant", "content": f"red\n{second.output[0].arguments}"},
            {"role": "user", "content": "And the star?"},
        ]
        assert reply.output_text == generate(*tiny, same, PICTURE)
        client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError, match=message.id) as caught:
            client.responses.create(model=MODEL, input=items)
        assert (caught.value.param, caught.value.type) == ("input", "invalid_request_error")

    def test_refusals_are_what_an_assistant_said(self, client, tiny):
        part = {"type": "refusal", "refusal": "No."}
        items = [*said("Hi"), {"role": "assistant", "content": [part]}, *said("And?")]
        same = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": "And?"},
        ]
        expected = generate(*tiny, same, max_tokens=9)
        reply = client.responses.create(model=MODEL, input=items, max_output_tokens=9)
        assert reply.output_text == expected
        for refusal in (
            {"role": "assistant", "content": [part]},
            {"role": "assistant", "content": None, "refusal": "No."},
        ):
            messages = [same[0], refusal, same[2]]
            chat = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=9)
            assert chat.choices[0].message.content == expected

    def test_what_does_not_fit_is_dropped_where_that_is_asked(self, client):
        kept = [*said("Hi", IMAGE), {"role": "assistant", "content": "A."}, *said(QUESTION)]
        old = [*said(IMAGE, "x " * 3000), {"role": "assistant", "content": "B."}]
        asked = {"model": MODEL, "instructions": "Be brief.", "max_output_tokens": 9}
        reply = client.responses.create(input=[*old * 9, *kept], truncation="auto", **asked)
        expected = client.responses.create(input=kept, **asked)
        assert reply.output_text == expected.output_text
        assert reply.usage.input_tokens == expected.usage.input_tokens
        assert (reply.truncation, expected.truncation) == ("auto", "disabled")
        for wrong in ({"input": [*old, *kept]}, {"input": old[:1], "truncation": "auto"}):
            with pytest.raises(openai.BadRequestError, match="context") as caught:
                client.responses.create(**asked, **wrong)
            assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")

    @pytest.mark.parametrize("stream", [False, True])
    def test_goes_on_from_what_was_stored(self, client, tiny, stream):
        first = ask(client, IMAGE, QUESTION, instructions="Be brief.", stream=stream)
        if stream:
            *_, last = first
            first = last.response
        known = {"model": MODEL, "previous_response_id": first.id}
        reply = client.responses.create(input="And the star?", **known)
        same = [
            {"role": "user", "content": f"<image>\n{QUESTION}"},
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": "And the star?"},
        ]
        assert reply.output_text == generate(*tiny, same, PICTURE)
        assert reply.previous_response_id == first.id
        assert client.responses.retrieve(reply.id).output_text == reply.output_text

    def test_what_is_deleted_or_not_stored_is_gone(self, client):
        stored = ask(client, "Hi", max_output_tokens=1)
        other = ask(client, "Hi", max_output_tokens=1, store=False)
        assert (stored.store, other.store) == (True, False)
        client.responses.delete(stored.id)
        for name in (stored.id, other.id):
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(name)
            with pytest.raises(openai.NotFoundError):
                client.responses.delete(name)
            with pytest.raises(openai.BadRequestError) as caught:
                client.responses.create(model=MODEL, input="Hi", previous_response_id=name)
            assert caught.value.code == "previous_response_not_found"

    def test_what_is_stored_is_not_streamed_again(self, client):
        stored = ask(client, "Hi", max_output_tokens=1)
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.retrieve(stored.id, stream=True)
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "stream")

    def test_memory_is_bounded(self):
        kept = Kept(max_bytes=1000, max_answers=3)
        long = Answered([("user", ["x" * 400], 0)], ["y" * 50], {})
        assert kept.fits(long)
        assert not kept.fits(Answered([("user", ["x" * 999], 0)], ["yy"], {}))
        for name in "abc":
            kept.add(name, long)
        assert kept.get("b") == kept.get("c") == long
        with pytest.raises(ApiError, match="'a'"):
            kept.get("a")
        short = Answered([], [], {})
        kept.get("b")  # so that c goes first
        kept.add("d", short)
        kept.add("e", short)
        with pytest.raises(ApiError, match="'c'"):
            kept.get("c")
        kept.remove("b")
        kept.add("i", Answered([], [], {"output": [{"id": "m", "text": "a"}]}))
        assert kept.item("m")["text"] == "a"
        kept.remove("i")
        with pytest.raises(ApiError, match="no item 'm'"):
            kept.item("m")
        kept.add("f", long)
        assert kept.get("d") == kept.get("e") == short

    def test_one_that_takes_too_much_room_is_said_not_to_be_stored(self, client, monkeypatch):
        monkeypatch.setattr(Kept, "fits", lambda *_: False)
        assert ask(client, "Hi", max_output_tokens=1).store is False


class TestJson:
    def test_schema_is_followed(self, client):
        class Colour(BaseModel):
            colour: Literal["red", "green", "blue"]

        reply = client.responses.parse(model=MODEL, input=said(IMAGE, QUESTION), text_format=Colour)
        assert reply.output_parsed == Colour(colour="red")

    def test_a_forced_function_is_called(self, client, tiny):
        expected = generate(*tiny, QUESTION, PICTURE, json_schema=SCHEMA)
        asked = {"tools": [PAINT], "tool_choice": {"type": "function", "name": "paint"}}
        reply = ask(client, IMAGE, QUESTION, **asked)
        (call,) = reply.output
        assert (call.type, call.name, call.arguments) == ("function_call", "paint", expected)
        with client.responses.stream(model=MODEL, input=said(IMAGE, QUESTION), **asked) as stream:
            assert stream.get_final_response().output[0].arguments == expected
        answer = {"type": "function_call_output", "call_id": call.call_id, "output": "Done."}
        later = client.responses.create(
            model=MODEL, previous_response_id=reply.id, input=[answer], max_output_tokens=5
        )
        same = [
            {"role": "user", "content": f"<image>\n{QUESTION}"},
            {"role": "assistant", "content": expected},
            {"role": "user", "content": "Done."},
        ]
        assert later.output_text == generate(*tiny, same, PICTURE, max_tokens=5)

    def test_one_of_several_functions_is_called(self, client):
        point = {
            "$defs": {"P": {"type": "object", "properties": {"x": {"type": "integer"}},
                            "required": ["x"], "additionalProperties": False}},
            "properties": {"at": {"$ref": "#/$defs/P"}},
            "required": ["at"],
            "additionalProperties": False,
        }  # fmt: skip
        tools = [PAINT, {"type": "function", "name": "point", "parameters": point}]
        for seed in range(4):
            asked = {"tools": tools, "tool_choice": "required", "temperature": 2.0}
            body = {"seed": seed}
            reply = ask(client, IMAGE, DESCRIBE, **asked, extra_body=body, max_output_tokens=60)
            (call,) = reply.output
            said = json.loads(call.arguments)
            assert [*said] == {"paint": ["colour"], "point": ["at"]}[call.name]


def test_tokens_are_counted_as_they_are_read(client):
    reply = ask(client, IMAGE, QUESTION)
    counted = client.responses.input_tokens.count(model=MODEL, input=said(IMAGE, QUESTION))
    assert counted.input_tokens == reply.usage.input_tokens
    assert counted.object == "response.input_tokens"


def test_what_is_long_is_not_repeated(client):
    long = {**PAINT, "description": "x" * 100_000}
    for tools, names in (([PAINT], ["paint"]), ([long], [])):
        reply = ask(client, "Hi", max_output_tokens=1, tools=tools, metadata={"a": "b"})
        assert [tool.name for tool in reply.tools] == names
        assert reply.metadata == {"a": "b"}


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"temperature": 3}, "temperature"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"tools": [PAINT], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"input": [{"type": "item_reference"}]}, "input.0.id"),
        ({"input": said({"type": "input_image", "file_id": "x"})}, "input.0.content.0.image_url"),
        ({"input": []}, "input"),
        ({"input": "x " * 5000}, "input"),
        ({"input": said({"type": "input_image", "image_url": "data:,"})}, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ],
    ids=str,
)
def test_parameters_are_refused_by_name(client, options, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": MODEL, "input": "Hi", **options})
    assert caught.value.param == param


def test_a_stream_tells_of_its_error(served):
    form = {"type": "json_schema", "name": "x", "schema": endless_schema()}
    with serving("--timeout", "0.3", engine=served.engine) as hasty, hasty.client() as client:
        asked = {"max_output_tokens": 100_000, "text": {"format": form}}
        *_, last = ask(client, "One two", stream=True, **asked)
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert "more than 0.3 s" in last.response.error.message
