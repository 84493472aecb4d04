"""The plugin of llm, by llm's own Python API and its own command, against `generate`."""

from __future__ import annotations

import importlib
import json

import llm
import pytest
from click.testing import CliRunner
from llm.cli import cli

from mlx_llava import generate, load
from mlx_llava.generation.sampling import Options
from tests.conftest import GOLDENS, ROOT, SHAPES

pytest.importorskip("av", reason="pip install '.[video]'")
from tests.films import film

QUESTION = "What is in this picture?"
FOLLOW_UP = "What colour is the square?"
COLOUR = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


@pytest.fixture(autouse=True, scope="module")
def user(tmp_path_factory):
    """A folder of llm's own, which is empty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_USER_PATH", str(tmp_path_factory.mktemp("llm")))
        yield


@pytest.fixture(scope="module")
def model():
    return llm.get_model("mlx-llava")


@pytest.fixture(scope="module")
def tiny():
    return load()


def shown(source=SHAPES) -> list[llm.Attachment]:
    if isinstance(source, bytes):
        return [llm.Attachment(content=source)]
    return [llm.Attachment(path=str(source))]


@pytest.mark.parametrize("source", [SHAPES, SHAPES.read_bytes()], ids=["path", "bytes"])
def test_words_stream_as_generate_gives_them(model, tiny, source):
    response = model.prompt(QUESTION, attachments=shown(source))
    words = [*response]
    assert "".join(words) == generate(*tiny, QUESTION, SHAPES)
    assert len(words) > 5
    assert (response.usage().input, response.usage().output) == (49, 16)
    assert model.prompt(QUESTION, attachments=shown(source), stream=False).text() == "".join(words)


def test_a_conversation_goes_on_about_its_pictures(model, tiny):
    conversation = model.conversation()
    first = conversation.prompt(QUESTION, attachments=shown(), system="Be brief.").text()
    second = conversation.prompt(FOLLOW_UP).text()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first},
        {"role": "user", "content": FOLLOW_UP},
    ]
    assert first == generate(*tiny, QUESTION, SHAPES, system="Be brief.")
    assert second == generate(*tiny, messages, SHAPES)


def test_options_reach_the_model(model):
    golden = load(GOLDENS / "llava", template="mistral_instruct")
    options = {"max_tokens": 8, "seed": 3, "top_k": 20, "image_tokens": 9}
    where = {"model": str(GOLDENS / "llava"), "template": "mistral_instruct", "offline": True}
    said = model.prompt("Hi", attachments=shown(), temperature=1, **options, **where).text()
    assert said == generate(*golden, "Hi", SHAPES, temp=1, **options)


def test_a_schema_is_followed(model, tiny):
    question = "What colour is the triangle?"
    said = model.prompt(question, attachments=shown(), schema=COLOUR).text()
    assert said == generate(*tiny, question, SHAPES, json_schema=COLOUR)
    assert json.loads(said) == {"colour": "red"}


def test_films_are_shown_too(model, tiny):
    moving = film(frames=3)
    said = model.prompt(QUESTION, attachments=shown(moving), frames=2).text()
    assert said == generate(*tiny, QUESTION, video=moving, frames=2)


def test_options_are_those_of_other_commands():
    names = importlib.import_module("mlx_llava.llm_plugin").LlavaModel.Options.model_fields
    assert {"temperature", *Options.__dataclass_fields__} - {
        "temp",
        "json_schema",
        "logit_bias",
    } <= {*names}
    assert all(field.description for field in names.values())


REFUSED = {
    "no model": (["-o", "model", "/none"], "There is no folder /none."),
    "temperature": (["-o", "temperature", "-1"], "greater than or equal to 0"),
    "option": (["-o", "heat", "1"], "heat"),
    "template": (["-o", "template", "none"], "none"),
    "no picture": (["-a", "pyproject.toml"], "attachment"),
}


@pytest.mark.parametrize(("arguments", "why"), REFUSED.values(), ids=REFUSED)
def test_mistakes_end_the_command_with_a_reason(arguments, why, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(cli, ["-m", "mlx-llava", *arguments, "Hi"])
    assert result.exit_code != 0
    assert why in result.output
    assert "Traceback" not in result.output
