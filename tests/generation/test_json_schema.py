"""Answers that are JSON: of any schema, at any temperature, on any vocabulary."""

from __future__ import annotations

import json
import sys
from functools import cache

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlx_llava import batch_generate, generate, load, stream_generate
from mlx_llava.checkpoint.hub import embedded_model
from mlx_llava.generate import main
from mlx_llava.generation.batch import AnswerError, BatchGenerator
from mlx_llava.generation.json_schema import ANY_OBJECT, LENIENT, JsonConstraint, read_schema
from mlx_llava.generation.sampling import Options
from mlx_llava.inputs.tokenizer import Tokenizer
from mlx_llava.inputs.vocabulary import spec_from_sentencepiece

SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue", "grün", "日本"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "is_large": {"type": "boolean"},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 3},
        "where": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^(top|bottom)$"}]},
    },
    "required": ["colour", "count", "is_large", "words", "where"],
    "additionalProperties": False,
}
PICTURE = Image.new("RGB", (60, 60), "red")


@cache
def embedded():
    return load(dtype="float32")


@pytest.fixture(scope="module")
def tiny():
    return embedded()


@pytest.fixture(scope="module")
def llama(llama_tokenizer_model):
    spec = spec_from_sentencepiece(llama_tokenizer_model, {})
    config = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(spec, config, 32000)


def draw(tokenizer, eos_ids, vocab_size, schema, seed, steps=400):
    """A text of random logits under a schema, and whether it came to its end."""
    constraint = JsonConstraint(schema, tokenizer, eos_ids, vocab_size)
    random = np.random.default_rng(seed)
    ids = []
    for _ in range(steps):
        logits = mx.array(random.normal(size=(1, vocab_size)).astype(np.float32))
        token = int(mx.argmax(constraint(logits), axis=-1).item())
        if token in eos_ids:
            return tokenizer.decode(ids), True
        constraint.follow(token)
        ids.append(token)
    return tokenizer.decode(ids), False


@pytest.mark.parametrize("seed", range(8))
def test_random_logits_follow_the_schema(tiny, seed):
    _, processor = tiny
    text, ended = draw(processor.tokenizer, processor.eos_ids, 512, SCHEMA, seed)
    assert ended
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("vocab_size", [32000, 32064])
def test_llamas_vocabulary(llama, seed, vocab_size):
    text, ended = draw(llama, {2}, vocab_size, SCHEMA, seed)
    assert ended
    jsonschema.validate(json.loads(text), SCHEMA)


SCHEMAS = st.recursive(
    st.sampled_from(
        [
            {"type": "integer", "minimum": -5, "maximum": 5},
            {"type": "boolean"},
            {"type": "null"},
            {"type": "string", "maxLength": 5},
            {"const": {"a": [1, "é"]}},
            {"enum": ["x", 2, None]},
        ]
    ),
    lambda inner: st.one_of(
        inner.map(lambda schema: {"type": "array", "items": schema, "maxItems": 2}),
        st.dictionaries(st.text('abcé "\\', min_size=1, max_size=4), inner, max_size=3).map(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": [*properties],
                "additionalProperties": False,
            }
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda schemas: {"anyOf": schemas}),
    ),
    max_leaves=5,
)


@settings(max_examples=25, deadline=None)
@given(schema=SCHEMAS, seed=st.integers(0, 1000))
def test_any_schema_is_followed(schema, seed):
    _, processor = embedded()
    text, ended = draw(processor.tokenizer, processor.eos_ids, 512, schema, seed, steps=800)
    assert ended
    jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("text", ["A small dog, naïve café 🦙 日本語\n\t{}", "x", "  two"])
def test_bytes_of_ids_are_those_of_the_text(tiny, llama, text):
    for tokenizer in (tiny[1].tokenizer, llama):
        ids = tokenizer.encode(text)[len(tokenizer.bos_ids) :]
        found = b"".join(map(tokenizer.bytes_of, ids)).decode()
        assert found in (text, " " + text)  # SentencePiece puts a space before all
    assert llama.bytes_of(10**6) == b""


@pytest.mark.usefixtures("machine")
def test_what_the_model_would_have_said_is_left_alone(tiny):
    """A schema that allows the answer gives that answer, in quotes."""
    shapes = Image.open(embedded_model() / "examples" / "shapes.png")
    question = "What colour is the square?"
    said = generate(*tiny, question, shapes)
    schema = {"enum": ["blue", said, "green"]}
    assert json.loads(generate(*tiny, question, shapes, json_schema=schema)) == said == "orange"


@pytest.mark.usefixtures("machine")
def test_rows_of_a_batch_follow_their_own(tiny):
    schemas = [SCHEMA, {"const": 7}, None, ANY_OBJECT]
    prompts = ["Describe the picture.", "How many?", "What colour is it?", "Describe it."]
    options = {"max_tokens": 120, "temp": 0.8, "seed": [1, 2, 3, 4]}
    answers = batch_generate(*tiny, prompts, [PICTURE] * 4, json_schema=schemas, **options)
    for prompt, schema, seed, answer in zip(prompts, schemas, (1, 2, 3, 4), answers, strict=True):
        alone = generate(
            *tiny, prompt, PICTURE, max_tokens=120, temp=0.8, seed=seed, json_schema=schema
        )
        assert answer == alone
    jsonschema.validate(json.loads(answers[0]), SCHEMA)
    assert answers[1] == "7"


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("is_removed", [False, True])
def test_a_row_that_fails_leaves_the_others_alone(tiny, monkeypatch, is_removed):
    model, processor = tiny
    called = []
    follow = JsonConstraint.__call__

    def fail_at_last(self, logits):
        called.append(1)
        if len(called) == 4:
            raise ValueError("it is too complex")
        return follow(self, logits)

    monkeypatch.setattr(JsonConstraint, "__call__", fail_at_last)
    generator = BatchGenerator(model, processor)
    failing = generator.insert(
        processor("Describe it.", PICTURE), Options(json_schema={"type": "string"})
    )
    other = generator.insert(processor("Describe the picture.", PICTURE), Options(max_tokens=20))
    texts = {failing: "", other: ""}
    failed = []
    while not generator.is_idle:
        try:
            for uid, response in generator.next():
                texts[uid] += response.text
        except AnswerError as error:
            failed.append((error.uid, str(error)))
        if is_removed and len(called) == 4:
            generator.remove(failing)
    assert failed == ([] if is_removed else [(failing, "it is too complex")])
    assert texts[other] == generate(*tiny, "Describe the picture.", PICTURE, max_tokens=20)


def test_an_answer_that_is_cut_off_says_so(tiny):
    parts = list(stream_generate(*tiny, "Describe it.", json_schema=SCHEMA, max_tokens=4))
    assert parts[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "objekt"}, "objekt"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "http://example.org/schema"}, "does not fetch"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"not": {"type": "string"}}, "not"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable"),
        ({"const": float("nan")}, "Out of range"),
        ({"type": "string", "format": "invented", "not": {"const": ""}}, r"""\["not"\]$"""),
        ({"oneOf": [{"type": "object"}, {"properties": {}}]}, "oneOf not fully supported$"),
        ({"$ref": "#"}, "No text can follow it, as it refers to itself"),
    ],
)
def test_schemas_that_cannot_be_used(tiny, schema, words):
    with pytest.raises(ValueError, match="The JSON schema cannot be used: .*" + words) as caught:
        generate(*tiny, "Hi", json_schema=schema)
    assert "<state>" not in str(caught.value)


@pytest.mark.parametrize("format", ["password", "ipvanyaddress", "not\nUnimplemented keys"])
def test_formats_that_are_not_known_are_no_constraint(tiny, caplog, format):
    schema = {"properties": {"format": {"const": format, "format": format}}, "required": ["format"]}
    schema = {"type": "object", "additionalProperties": False, **schema}
    said = generate(*tiny, "Hi", json_schema=schema)
    assert json.loads(said)["format"] == format
    assert not caplog.records


def test_of_a_hint_the_rest_is_enforced(tiny, caplog):
    schema = {"items": {"const": "a"}, "minItems": 2, "maxItems": 2, "uniqueItems": True, **LENIENT}
    for _ in range(2):
        assert generate(*tiny, "Hi", json_schema={"type": "array", **schema}) == '["a", "a"]'
    (record,) = caplog.records
    assert "uniqueItems" in record.message


def test_without_llguidance(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"mlx_llava\[json\]"):
        generate(*tiny, "Hi", json_schema={"const": "of no other test"})


def test_a_schema_is_compiled_once(tiny, monkeypatch):
    """The second answer begins where the first began, and not where it ended."""
    schema = {"const": "compiled once"}
    first = generate(*tiny, "Hi", json_schema=schema)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert generate(*tiny, "Hi", json_schema=schema) == first == '"compiled once"'


def test_model_without_an_end(tiny):
    with pytest.raises(ValueError, match="no end-of-answer token"):
        JsonConstraint(ANY_OBJECT, tiny[1].tokenizer, (), 512)


class TestCommand:
    def test_schema_as_text_and_as_file(self, tmp_path, capsys):
        (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
        for schema in (json.dumps(SCHEMA), str(tmp_path / "schema.json")):
            assert main(["--prompt", "Describe it.", "--json-schema", schema, "--quiet"]) == 0
            jsonschema.validate(json.loads(capsys.readouterr().out), SCHEMA)

    def test_lines_of_a_file_have_their_own(self, tmp_path, capsys):
        lines = [{"prompt": "Hi", "json_schema": {"const": i}} for i in (1, 2)]
        lines.append({"prompt": "Hi", "json_schema": {"type": "objekt"}})
        (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
        assert main(["--prompts-file", str(tmp_path / "lines.jsonl"), "--quiet"]) == 2
        answers = {a["index"]: a for a in map(json.loads, capsys.readouterr().out.splitlines())}
        assert [answers[0]["text"], answers[1]["text"]] == ["1", "2"]
        assert "objekt" in answers[2]["error"]

    @pytest.mark.parametrize(
        ("schema", "words"),
        [
            ("nowhere.json", "no schema file"),
            ("~nobody-of-that-name/a.json", "no schema file ~nobody"),
            ("{", "is not valid JSON"),
            ('{"type": 1}', "cannot be used"),
        ],
    )
    def test_mistakes_are_one_line(self, capsys, schema, words):
        assert main(["--prompt", "Hi", "--json-schema", schema, "--quiet"]) == 2
        error = capsys.readouterr().err.strip()
        assert words in error
        assert len(error.splitlines()) == 1

    def test_a_file_that_is_no_object(self, tmp_path):
        (tmp_path / "list.json").write_text("[1]")
        with pytest.raises(ValueError, match="list.json"):
            read_schema(str(tmp_path / "list.json"))
