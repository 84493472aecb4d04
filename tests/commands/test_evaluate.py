"""Question files are answered as generate answers, and go on where they stopped."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_llava import batch_generate, generate, load
from mlx_llava.evaluate import SINGLE_PREDICTION, choose_chunk, main
from tests.conftest import GOLDENS, PICTURE

LLAVA = GOLDENS / "llava"
QUESTIONS = ("What is it?", "How many dogs are there near the old pier?", "Why?", "Who sleeps?")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four questions, the third without a picture, the first and last with the same id."""
    shutil.copy(PICTURE, tmp_path / "a.png")
    lines = [
        {
            "question_id": i % 3,
            "text": text,
            "answer": "x",
            **({} if i == 2 else {"image": "a.png"}),
        }
        for i, text in enumerate(QUESTIONS)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def run(folder: Path, *more: str) -> int:
    return main(
        [
            *("--model", str(LLAVA), "--questions", str(folder / "q.jsonl")),
            *(
                "--image-folder",
                str(folder),
                "--answers",
                str(folder / "a.jsonl"),
                "-m",
                "9",
                *more,
            ),
        ]
    )


def answers(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]


def expected() -> list[str]:
    model, processor = load(LLAVA)
    return [
        generate(model, processor, text, PICTURE if i != 2 else None, max_tokens=9).strip()
        for i, text in enumerate(QUESTIONS)
    ]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_batch_answers_what_each_question_gets_alone(size, folder):
    assert run(folder, "--batch-size", str(size)) == 0
    found = answers(folder)
    assert [answer["text"] for answer in found] == expected()
    assert [answer["question_id"] for answer in found] == [0, 1, 2, 0]
    assert [answer["prompt"] for answer in found] == list(QUESTIONS)
    assert found[0].keys() == {
        *("question_id", "prompt", "text", "answer_id", "model_id", "metadata"),
    }
    assert {answer["model_id"] for answer in found} == {"llava"}


def test_what_is_answered_is_not_asked_again(folder, capsys):
    assert run(folder) == 0
    whole = answers(folder)
    lines = (folder / "a.jsonl").read_text().splitlines(keepends=True)
    (folder / "a.jsonl").write_text(lines[0] + lines[3] + lines[1][:30])  # killed while writing
    assert run(folder) == 0
    assert {a["answer_id"] for a in answers(folder)} >= {
        whole[0]["answer_id"],
        whole[3]["answer_id"],
    }
    texts = {a["prompt"]: a["text"] for a in answers(folder)}
    assert texts == {a["prompt"]: a["text"] for a in whole}
    assert len(answers(folder)) == 4


def test_answers_of_another_model_are_neither_gone_on_with_nor_scored(folder, capsys):
    adapters = [folder / name / "adapter" for name in ("one", "two")]
    projector = tree_flatten(load(LLAVA)[0].multi_modal_projector.parameters())
    for scale, adapter in enumerate(adapters, 1):
        adapter.mkdir(parents=True)
        weights = {f"multi_modal_projector.{name}": w * scale for name, w in projector}
        mx.save_safetensors(str(adapter / "adapters.safetensors"), weights)
        (adapter / "adapter_config.json").write_text('{"stage": "projector"}')
    with_one = ("--adapter-path", str(adapters[0]))
    assert run(folder, *with_one, "--num-chunks", "2") == 0
    (named,) = {answer["model_id"] for answer in answers(folder)}
    assert re.fullmatch("llava[+]one_adapter@[0-9a-f]{8}", named)
    assert run(folder, *with_one, "--score", "exact") == 0
    before = (folder / "a.jsonl").read_bytes()
    capsys.readouterr()
    shutil.rmtree(adapters[0])
    adapters[1].rename(adapters[0])  # trained again
    for more in ((), with_one):
        assert run(folder, *more, "--score", "exact") == 2
        error = capsys.readouterr().err
        assert f"a.jsonl, line 1 is an answer of {named}, expected one of llava" in error
        assert "name another --answers" in error
    scored = ["--questions", str(folder / "q.jsonl"), "--answers", str(folder / "a.jsonl")]
    assert main([*scored, "--score", "exact"]) == 0  # whose ever they are
    assert (folder / "a.jsonl").read_bytes() == before
    (folder / "a.jsonl").write_bytes(before.split(b"\n")[0])
    assert main(scored) == 2
    assert "expected one of tiny-llava; name" in capsys.readouterr().err


def test_answers_of_the_original_and_of_nobody_named_are_gone_on_with(folder):
    lines = [{"question_id": 0, "prompt": QUESTIONS[0], "text": "A", "model_id": "llava"}]
    lines += [{"question_id": 1, "prompt": QUESTIONS[1], "text": "B"}]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(folder) == 0
    assert [answer["text"] for answer in answers(folder)][:2] == ["A", "B"]
    assert len(answers(folder)) == 4


@pytest.mark.parametrize("kind", ["image", "video"])
def test_one_question_on_two_pictures_needs_two_ids(kind, folder, capsys):
    question = {"question_id": "seven", "text": "Q", kind: "a.png"}
    lines = [question, question, {**question, kind: "b.png"}]
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(folder) == 2
    assert (
        f"q.jsonl, line 3 has the question_id 'seven' and the text of {folder / 'q.jsonl'}, line 1,"
        " but shows something else; give it another question_id."
    ) in capsys.readouterr().err
    assert not (folder / "a.jsonl").exists()


def test_options_of_answers_are_those_of_generate(folder, capsys):
    stop = expected()[0][2:5]
    assert run(folder, "--stop", stop) == 0
    assert answers(folder)[0]["text"] == expected()[0].partition(stop)[0].strip()
    assert run(folder, "--top-p", "2", "--model", "never read") == 2
    assert "top_p is 2.0" in capsys.readouterr().err


def test_what_is_read_is_not_written(folder, capsys):
    before = (folder / "q.jsonl").read_bytes()
    (folder / "link.jsonl").symlink_to("q.jsonl")
    for name in ("q.jsonl", "link.jsonl"):
        assert run(folder, "--answers", str(folder / name)) == 2
        assert "is read, and cannot be written" in capsys.readouterr().err
    assert (folder / "q.jsonl").read_bytes() == before


def test_chunks_make_up_the_whole(folder, capsys):
    assert run(folder, "--num-chunks", "3", "--chunk-idx", "1", "--score", "exact") == 2
    assert "2 of 4 questions have no answer" in capsys.readouterr().err
    assert [answer["prompt"] for answer in answers(folder)] == list(QUESTIONS[2:])
    assert run(folder, "--num-chunks", "3") == 0
    assert run(folder, "--num-chunks", "3", "--chunk-idx", "2", "--score", "exact") == 0
    assert json.loads(capsys.readouterr().out)["questions"] == 4
    assert run(folder, "--num-chunks", "3", "--chunk-idx", "3") == 2
    assert "no chunk 3 of 3" in capsys.readouterr().err


def test_chunks_are_the_originals():
    items = list(range(10))
    assert [list(choose_chunk(items, 4, i)) for i in range(4)] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
        [9],
    ]


def test_scienceqa_is_asked_as_the_original_does(folder):
    entries = [
        {"id": "7", "image": "a.png", "conversations": [{"from": "human", "value": "Q?\n<image>"}]},
        {"id": "8", "conversations": [{"from": "human", "value": "R?"}]},
    ]
    (folder / "q.json").write_text(json.dumps(entries))
    assert run(folder, "--questions", str(folder / "q.json"), "--single-pred-prompt") == 0
    assert [answer["prompt"] for answer in answers(folder)] == [
        f"<image>\nQ?\n{SINGLE_PREDICTION}",
        f"R?\n{SINGLE_PREDICTION}",
    ]
    model, processor = load(LLAVA)
    alone = generate(model, processor, f"Q?\n{SINGLE_PREDICTION}", PICTURE, max_tokens=9)
    assert answers(folder)[0]["text"] == alone.strip()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question_id": 1}', "q.jsonl, line 1 has no text; it has question_id."),
        ("[3", "q.jsonl is not valid JSON (line 1): Expecting ',' delimiter"),
        ("", "q.jsonl holds no question"),
        (
            '{"question_id": 1, "text": "Q", "image": "gone.png"}',
            "pictures of 1 of 1 questions are not in --image-folder",
        ),
        ('{"question_id": 1, "text": "Q", "image": "a\\u0000"}', "line 1: a"),
        ('[{"question_id": 1, "text": "Q", "image": ["a.png"]}]', "index 0 has a list as image"),
        ('{"question_id": 1, "text": "Q", "image": 391895}', "a whole number (391895) as image"),
        ('{"question_id": [1], "text": "Q"}', "line 1 has a list as question_id, expected a text"),
        ('{"question_id": NaN, "text": "Q"}', "line 1 has a number (NaN) as question_id"),
        ('{"question_id": 1, "text": 5}', "line 1 has a whole number (5) as text, expected a text"),
        ('{"question_id": 1, "text": "Q", "answer_id": ""}', "is an answer, expected a question"),
        ('{"annotations": []}', "line 1 has no question_id; it has annotations"),
        ('[{"id": 1, "conversations": []}]', "index 0, first turn has no value"),
    ],
)
def test_mistakes_are_one_line(content, message, folder, capsys):
    (folder / "q.jsonl").write_text(content)
    assert run(folder) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_pictures_that_are_missing_are_counted(folder, capsys):
    lines = [{"question_id": i, "text": "Q", "image": f"{i}.png"} for i in range(3)]
    shutil.copy(PICTURE, folder / "0.png")
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(folder) == 2
    error = capsys.readouterr().err
    assert "The pictures of 2 of 3 questions are not in" in error
    assert "q.jsonl, line 2: 1.png" in error


def test_what_cannot_be_asked_is_named_and_the_rest_is_answered(folder, capsys):
    questions = [json.loads(line) for line in (folder / "q.jsonl").read_text().splitlines()]
    questions[1]["image"] = "b.png"
    questions[3]["text"] = "word " * 2000
    (folder / "b.png").write_bytes(PICTURE.read_bytes()[:100])
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    assert run(folder, "--score", "exact") == 2
    out, error = capsys.readouterr()
    assert not out
    assert f"q.jsonl, line 2: {folder / 'b.png'} is a broken image" in error
    assert "q.jsonl, line 4: The prompt has" in error
    assert "error: 2 of 4 questions have no answer" in error
    assert [answer["prompt"] for answer in answers(folder)] == [QUESTIONS[0], QUESTIONS[2]]
    shutil.copy(PICTURE, folder / "b.png")
    assert run(folder) == 2
    assert "error: 1 of 2 questions have no answer" in capsys.readouterr().err
    assert [answer["text"] for answer in answers(folder)] == [expected()[i] for i in (0, 2, 1)]


def test_a_question_file_is_read_as_people_have_it(folder):
    """A byte-order mark, and a line's separator within a text; and so is what is written of it."""
    (folder / "q.jsonl").write_text('\ufeff{"question_id": 1, "text": "A\u2028B\x85"}\n')
    assert run(folder, "-m", "2") == 0
    before = (folder / "a.jsonl").read_bytes()
    assert run(folder) == 0
    assert (folder / "a.jsonl").read_bytes() == before
    assert json.loads(before)["prompt"] == "A\u2028B\x85"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question_id": 1, "text": "red"}', "a.jsonl, line 1 has no prompt"),
        ('{"question_id": 1, "prompt": "Q", "text": null}', "has null as text, expected a text"),
        ("Dear diary", "a.jsonl is not valid JSON (line 1)"),
        ("[]\n", "holds a list, expected an object with question_id"),
    ],
)
def test_a_file_of_something_else_is_no_answer_file(content, message, folder, capsys):
    (folder / "a.jsonl").write_text(content)
    assert run(folder) == 2
    assert message in capsys.readouterr().err
    assert (folder / "a.jsonl").read_text() == content


def test_batch_generate_stops_each_row_at_its_own_end(loaded):
    model, processor = loaded
    prompts = [[{"role": "user", "content": text}] for text in QUESTIONS]
    whole = batch_generate(model, processor, prompts, [PICTURE, None, PICTURE, None], max_tokens=12)
    first = processor.tokenizer.encode(whole[0])[-1]
    from dataclasses import replace

    from mlx_llava.inputs.processor import Processor

    stopping = Processor(
        processor.config,
        processor.tokenizer,
        processor.image_processor,
        template=replace(processor.template, stops=(whole[0][3:5],)),
        eos_ids=[first],
    )
    for prompt, image, text in zip(
        prompts,
        [PICTURE, None, PICTURE, None],
        batch_generate(model, stopping, prompts, [PICTURE, None, PICTURE, None], max_tokens=12),
        strict=True,
    ):
        assert text == generate(model, stopping, prompt, image, max_tokens=12)
