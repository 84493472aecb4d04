"""Tools that have to be called, penalties and answers that have begun, in OpenAI's chats."""

from __future__ import annotations

import json
from dataclasses import replace

import anthropic
import openai
import pytest
from PIL import Image

from mlx_llava import generate
from mlx_llava.inputs.image import data_url, png
from mlx_llava.serving.tools import ForcedTools, described, forced_tools
from tests.conftest import SHAPES
from tests.servers import MODEL, WIRES, user

PICTURE = Image.open(SHAPES).convert("RGB")
QUESTION = "What colour is the triangle?"
DESCRIBE = "Describe the picture."
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["red", "green", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
FUNCTION = {"name": "paint", "description": "Paints.", "parameters": SCHEMA, "strict": True}
PAINT = {"type": "function", "function": FUNCTION}
POINT = {
    "type": "function",
    "function": {
        "name": "point",
        "parameters": {
            "$defs": {"P": {"type": "object", "properties": {"x": {"type": "integer"}},
                            "required": ["x"], "additionalProperties": False}},
            "properties": {"at": {"$ref": "#/$defs/P"}},
            "required": ["at"],
            "additionalProperties": False,
        },
    },
}  # fmt: skip
NAMED = {"type": "function", "function": {"name": "paint"}}


@pytest.fixture(scope="module")
def painted(tiny):
    """What `generate` says where it has to paint, and is told so."""
    question = f"{QUESTION}\nAnswer with the arguments of\npaint: Paints."
    return generate(*tiny, question, PICTURE, json_schema=SCHEMA)


def ask(client, *messages, **options):
    messages = messages or [user(PICTURE, QUESTION)]
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def call_of(stream):
    """The name and the arguments of the call that a stream tells, and why it ends."""
    names, arguments, reasons = [], "", []
    for chunk in stream:
        (choice,) = chunk.choices
        for call in choice.delta.tool_calls or ():
            names += [call.function.name] if call.function.name else []
            arguments += call.function.arguments or ""
        reasons += [choice.finish_reason] if choice.finish_reason else []
    return names, arguments, reasons


class TestForcedTools:
    """As instructor, langchain and pydantic-ai ask for objects."""

    @pytest.mark.parametrize("choice", [NAMED, "required"], ids=["named", "required"])
    def test_a_call_is_json_of_its_schema(self, client, painted, choice):
        (said,) = ask(client, tools=[PAINT], tool_choice=choice).choices
        (call,) = said.message.tool_calls
        assert (call.type, call.function.name, call.function.arguments) == (
            *("function", "paint"),
            painted,
        )
        assert (said.message.content, said.finish_reason) == (None, "tool_calls")
        stream = ask(client, tools=[PAINT], tool_choice=choice, stream=True)
        assert call_of(stream) == (["paint"], painted, ["tool_calls"])

    def test_one_of_several_is_chosen(self, client):
        for seed in range(4):
            how = {"tools": [PAINT, POINT], "tool_choice": "required", "temperature": 2.0}
            how |= {"seed": seed, "max_tokens": 60}
            (said,) = ask(client, **how).choices
            (call,) = said.message.tool_calls
            keys = {"paint": ["colour"], "point": ["at"]}[call.function.name]
            assert [*json.loads(call.function.arguments)] == keys
            streamed = call_of(ask(client, **how, stream=True))
            assert streamed == ([call.function.name], call.function.arguments, ["tool_calls"])

    def test_arguments_are_those_that_the_schema_names(self):
        inner = {"properties": {"x": {"type": "integer"}}}
        open_one = {"properties": {}, "additionalProperties": True}
        schema = {"properties": {"a": inner, "b": open_one}, "$defs": {"C": inner}}
        schema["allOf"] = [{"properties": {"d": {"const": {"properties": 1}}}}]
        function = {"name": "f", "parameters": {"type": "object", "properties": {"s": schema}}}
        tools = forced_tools([{"type": "function", "function": function}], "required")
        shut = {**inner, "additionalProperties": False}
        properties = {"a": shut, "b": open_one}
        expected = {**schema, "properties": properties, "$defs": {"C": shut}}
        assert tools.schema()["properties"]["s"] == expected
        assert tools.schema()["additionalProperties"] is False

    def test_what_they_are_for_is_read_after_the_question(self):
        properties = {"x": {"description": "how far"}, "y": {}, "z": {"description": 1}, "u": True}
        tools = [
            {"name": "go", "description": "Goes.", "parameters": {"properties": properties}},
            {"name": "stop", "parameters": {"properties": {"at": {"description": "where"}}}},
            {"name": "wait"},
        ]
        question = ("user", ["Where to?"], 1)
        said = "Answer with the arguments of\ngo: Goes.; x: how far\nstop: at: where"
        forced = forced_tools(tools, "required")
        assert described([question], forced) == [question, ("user", [said], 0)]
        long = {"name": "go", "description": "x" * 3000}
        for offered in ([tools[2]], [long]):
            assert described([question], forced_tools(offered, "required")) == [question]
        answer = ("assistant", ["There."], 0)
        assert described([question, answer], forced) == [question, answer]
        assert described([question], forced_tools(tools, "auto")) == [question]

    def test_a_call_that_is_cut_off_is_said_to_be(self, client, painted):
        (said,) = ask(client, tools=[PAINT], tool_choice=NAMED, max_tokens=3).choices
        assert said.finish_reason == "length"
        assert painted.startswith(said.message.tool_calls[0].function.arguments)
        how = {"tools": [PAINT, POINT], "tool_choice": "required", "max_tokens": 2}
        (said,) = ask(client, **how).choices
        assert (said.finish_reason, said.message.tool_calls) == ("length", None)

    def test_results_of_tools_are_what_the_user_says(self, client, tiny, painted):
        call = {"id": "a", "type": "function", "function": {"name": "paint", "arguments": painted}}
        messages = [
            user(PICTURE, QUESTION),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": "Final result processed."},
            {"role": "user", "content": "And the star?"},
        ]
        same = [
            {"role": "user", "content": f"<image>\n{QUESTION}"},
            {"role": "assistant", "content": painted},
            {"role": "user", "content": "Final result processed.\nAnd the star?"},
        ]
        expected = generate(*tiny, same, PICTURE)
        assert ask(client, *messages).choices[0].message.content == expected

    @pytest.mark.parametrize(
        "options",
        [
            {"tool_choice": "required"},
            {"tools": [PAINT], "tool_choice": {"type": "function", "function": {"name": "other"}}},
            {"tools": [PAINT], "tool_choice": {"type": "allowed_tools"}},
            {"tools": [PAINT], "tool_choice": "sometimes"},
            {"tools": [{"type": "web_search"}], "tool_choice": "required"},
        ],
        ids=str,
    )
    def test_choices_that_cannot_be(self, client, options):
        with pytest.raises(openai.BadRequestError, match="tool_choice") as caught:
            ask(client, user("Hi"), **options)
        assert caught.value.param == "tool_choice"

    def test_schemas_that_are_too_long(self, client):
        many = {f"p{i}": {"type": "string"} for i in range(9999)}
        function = {"name": "f", "parameters": {"type": "object", "properties": many}}
        tools = [{"type": "function", "function": function}]
        with pytest.raises(openai.BadRequestError, match="characters of 100,000"):
            ask(client, user("Hi"), tools=tools, tool_choice="required")


def test_the_last_bracket_of_several_is_no_argument():
    tools = ForcedTools({"a": {}, "é": {}}, {})
    whole = '{"name": "é", "arguments": {"x": {}}}'
    assert tools.read(whole, "stop") == ("é", '{"x": {}}')
    assert tools.read(whole[:-1], "length") == ("é", '{"x": {}}')
    assert tools.read(whole[:-1], None) == ("é", '{"x": {}')
    assert tools.read(whole[:12], None) == (None, "")


class TestBegunAnswers:
    @pytest.mark.parametrize("prefill", ["A small", "A small black star,"])
    def test_go_on(self, client, tiny, prefill):
        messages = [user(PICTURE, DESCRIBE), {"role": "assistant", "content": prefill}]
        said = ask(client, *messages).choices[0].message.content
        assert said == generate(*tiny, DESCRIBE, PICTURE, prefill=prefill)
        assert prefill + said == generate(*tiny, DESCRIBE, PICTURE)

    def test_what_has_no_word_begins_nothing(self, client, tiny):
        expected = generate(*tiny, QUESTION, PICTURE)
        for nothing in ("", " ", "\n"):
            messages = [user(PICTURE, QUESTION), {"role": "assistant", "content": nothing}]
            assert ask(client, *messages).choices[0].message.content == expected


class TestPenalties:
    def test_are_those_of_generate(self, client, tiny):
        comma = tiny[1].tokenizer.encode("star,")[-1]
        options = [
            {"frequency_penalty": 2.0},
            {"presence_penalty": 2.0},
            {"logit_bias": {str(comma): -100}},
        ]
        said = set()
        for option in options:
            answer = ask(client, user(PICTURE, DESCRIBE), max_tokens=40, **option)
            expected = generate(*tiny, DESCRIBE, PICTURE, max_tokens=40, **option)
            assert answer.choices[0].message.content == expected
            said.add(expected)
        assert len(said) > 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"frequency_penalty": 3}, "frequency_penalty"),
            ({"presence_penalty": -3}, "presence_penalty"),
            ({"logit_bias": {"x": 1}}, "logit_bias"),
            ({"logit_bias": {"5": 101}}, "logit_bias"),
            ({"logit_bias": {"999999": 1}}, "vocabulary"),
        ],
        ids=str,
    )
    def test_that_make_no_sense(self, client, options, message):
        with pytest.raises(openai.BadRequestError, match=message):
            ask(client, user("Hi"), **options)


@pytest.mark.parametrize("question", [QUESTION, DESCRIBE])
def test_every_api_says_the_same(served, client, tiny, question):
    expected = generate(*tiny, question, PICTURE)
    fields = {"model": MODEL, "messages": [user(PICTURE, question)], "max_tokens": 60}
    chat = client.chat.completions.create(**fields).choices[0].message.content
    response = client.responses.create(**WIRES["responses"].body(fields)).output_text
    with anthropic.Anthropic(base_url=served.url, api_key="none", timeout=60) as other:
        (block,) = other.messages.create(**WIRES["anthropic"].body(fields)).content
    assert chat == response == block.text == expected


@pytest.mark.parametrize("wire", ["openai", "responses", "anthropic", "ollama chat"])
def test_objects_have_the_properties_that_their_schema_names(served, wire):
    """As instructor's and Frigate's schemas, which say nothing of others."""
    schema = {key: value for key, value in SCHEMA.items() if key != "additionalProperties"}
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked = replace(served, wire=WIRES[wire])
    reply = asked.post(messages=[user(PICTURE, QUESTION)], response_format=format, max_tokens=60)
    assert '{\\"colour\\": \\"red\\"}' in reply.text


#: Keywords and formats of ordinary schemas that nothing enforces.
ODD = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"], "not": {"const": "green"}},
        "password": {"const": "a", "format": "password"},
        "tags": {"type": "array", "items": {"const": 1}, "maxItems": 1, "uniqueItems": True},
    },
    "required": ["colour", "password", "tags"],
    "dependentRequired": {"colour": ["tags"]},
    "if": {"required": ["tags"]},
    "then": {"propertyNames": {"minLength": 1}},
}


@pytest.mark.parametrize("wire", ["openai", "responses", "anthropic", "ollama chat"])
def test_what_a_schema_says_beyond_what_is_known_is_a_hint(served, wire):
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": ODD}}
    asked = replace(served, wire=WIRES[wire])
    reply = asked.post(messages=[user(PICTURE, QUESTION)], response_format=format, max_tokens=90)
    assert reply.status_code == 200
    assert '{\\"colour\\": \\"red\\", \\"password\\": \\"a\\"' in reply.text


def test_strict_schemas_are_refused_by_what_is_not_known(client):
    for strict in (False, True):
        function = {"name": "f", "parameters": ODD, "strict": strict}
        format = {"type": "json_schema", "json_schema": {"name": "x", "schema": ODD}}
        format["json_schema"]["strict"] = strict
        hint = {"tools": [{"type": "function", "function": {**function, "strict": False}}]}
        hint["tools"].append({"type": "function", "function": {**function, "name": "g"}})
        for options in (
            {"tools": [{"type": "function", "function": function}], "tool_choice": "required"},
            {"response_format": format},
        ):
            if not strict:
                assert ask(client, **options, max_tokens=1).choices
                continue
            with pytest.raises(openai.BadRequestError, match="dependentRequired"):
                ask(client, **options)
        assert ask(client, **hint, tool_choice="required", max_tokens=1).choices


def test_arguments_of_anthropics_tools_are_hints(served):
    with anthropic.Anthropic(base_url=served.url, api_key="none", timeout=60) as other:
        fields = WIRES["anthropic"].body({"messages": [user(PICTURE, QUESTION)], "max_tokens": 90})
        tool = {"name": "f", "input_schema": ODD}
        (block,) = other.messages.create(
            model=MODEL, **fields, tools=[tool], tool_choice={"type": "any"}
        ).content
    assert block.input["colour"] == "red"


def test_pictures_as_files(client):
    url = data_url(png(PICTURE))
    for part in (
        {"type": "input_image", "image_url": url},
        {"type": "file", "file": {"filename": "a.png", "file_data": url}},
    ):
        content = [part, {"type": "text", "text": QUESTION}]
        said = ask(client, {"role": "user", "content": content})
        assert said.choices[0].message.content == "red"
