"""Whatever stands in the place of a benchmark's file: a score, or one line that says where."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_llava.evaluate import main, read_questions
from tests.conftest import shared_data

TEN = ["red"] * 9 + ["a red"]
#: Each benchmark's questions and label files, by name; those that end in .jsonl are lines.
FILES: dict[str, dict[str, Any]] = {
    "exact": {"q.jsonl": [{"question_id": 1, "text": "Q", "answer": "red", "category": "c"}]},
    "pope": {
        "q.jsonl": [{"question_id": 1, "text": "Q\nA", "image": "a.png", "category": "x"}],
        "labels/coco_pope_x.json": [{"image": "a.png", "text": "Q", "label": "yes"}],
    },
    "scienceqa": {
        "q.json": [{"id": "1", "conversations": [{"from": "human", "value": "Q"}]}],
        "labels/problems.json": {"1": {"choices": ["x", "y"], "answer": 0}},
        "labels/pid_splits.json": {"test": ["1"]},
    },
    "textvqa": {
        "q.jsonl": [{"question_id": "i", "text": "Q\nA", "image": "a.png"}],
        "labels": {"data": [{"image_id": "i", "question": "q", "answers": TEN}]},
    },
    "vqa": {
        "q.jsonl": [{"question_id": 1, "text": "Q"}],
        "labels": {"annotations": [{"question_id": 1, "answers": [{"answer": a} for a in TEN]}]},
    },
    "gqa": {
        "q.jsonl": [{"question_id": "1", "text": "Q"}],
        "labels": {"1": {"answer": "red", "isBalanced": True}},
    },
}


def write(folder: Path, files: dict[str, Any], answers: list[Any]) -> None:
    for name, value in {**files, "a.jsonl": answers}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        text = json.dumps(value)
        if isinstance(value, list) and ("pope" in name or name.endswith(".jsonl")):
            text = "".join(json.dumps(record) + "\n" for record in value)
        (folder / name).write_text(text)


def answers_to(benchmark: str) -> list[dict]:
    (question,) = next(iter(FILES[benchmark].values()))
    prompt = question.get("text", "Q")
    question_id = question.get("question_id", question.get("id"))
    return [{"question_id": question_id, "prompt": prompt, "text": "red"}]


def score(folder: Path, benchmark: str) -> int:
    questions = next(iter(FILES[benchmark]))
    return main(
        [
            *("--questions", str(folder / questions), "--answers", str(folder / "a.jsonl")),
            *("--image-folder", str(folder), "--model", "no model is needed"),
            *("--score", benchmark, "--annotations", str(folder / "labels")),
        ]
    )


@pytest.mark.parametrize("benchmark", FILES)
def test_the_files_as_they_should_be_are_scored(benchmark, tmp_path, capsys):
    write(tmp_path, FILES[benchmark], answers_to(benchmark))
    assert score(tmp_path, benchmark) == 0
    assert json.loads(capsys.readouterr().out)["questions"] == 1


def nodes(value: Any, path: tuple = ()) -> list[tuple]:
    """The ways to all values inside a value, and to itself."""
    if not isinstance(value, (dict, list)):
        return [path]
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [path, *(way for key, item in inner for way in nodes(item, (*path, key)))]


def changed(value: Any, path: tuple, new: Any) -> Any:
    """A copy with another value at the end of a path, or none there."""
    if not path:
        return new
    value = copy.deepcopy(value)
    target = value
    for key in path[:-1]:
        target = target[key]
    if new is GONE:
        del target[path[-1]]
    else:
        target[path[-1]] = new
    return value


GONE = "this is taken away"
KEYS = st.sampled_from(["question_id", "text", "answer", "answers", "1", "test", "data"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | KEYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("benchmark", FILES)
@given(data=st.data())
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_json_in_any_place_is_a_score_or_one_line(benchmark, data, tmp_path, capsys):
    files = {**FILES[benchmark], "a.jsonl": answers_to(benchmark)}
    name = data.draw(st.sampled_from(sorted(files)))
    path = data.draw(st.sampled_from(nodes(files[name])))
    files[name] = changed(files[name], path, data.draw(JSON | st.just(GONE)))
    write(tmp_path, files, files["a.jsonl"])
    code = score(tmp_path, benchmark)
    error = capsys.readouterr().err
    assert (code, error.count("\n")) in ((0, 0), (2, 1))
    assert code == 0 or error.startswith("error: ")


WRONG = {
    "no split": ("scienceqa", "labels/pid_splits.json", {"train": ["1"]}, "has no test; it has tr"),
    "no problem": ("scienceqa", "labels/problems.json", {}, "problems.json has no 1; it has not"),
    "no label": ("pope", "labels/coco_pope_x.json", [{"image": "a.png", "text": "Q"}], "no label"),
    "a test split": (
        "textvqa",
        "labels",
        {"data": [{"image_id": "i", "question": "q"}]},
        "labels, data, index 0 has no answers; it has image_id, question",
    ),
    "questions": ("vqa", "labels", {"questions": []}, "has no annotations; it has questions"),
    "a list": ("vqa", "labels", [{"question_id": 1}], "holds a list, expected an object"),
    "others": (
        "gqa",
        "labels",
        {"7": {"answer": "x"}},
        "None of the 1 answered questions is among the 1 of ",
    ),
    "nine people": (
        "vqa",
        "labels",
        {"annotations": [{"question_id": 1, "answers": [{"answer": "x"}] * 9}]},
        "annotations, index 0 has 9 answers, expected 10 texts",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_named_with_the_place(name, tmp_path, capsys):
    benchmark, file, value, message = WRONG[name]
    write(tmp_path, {**FILES[benchmark], file: value}, answers_to(benchmark))
    assert score(tmp_path, benchmark) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", FILES)
def test_the_files_of_reports_are_scored_or_named(benchmark, tmp_path, capsys):
    folder = shared_data("reports/evaluate_wrong_files")
    for questions in sorted(folder.glob("*.jsonl")):
        answers = tmp_path / "a.jsonl"
        try:
            known = read_questions(questions)
        except ValueError:
            known = []
        keys = ("question_id", "prompt", "text")
        lines = [json.dumps({key: question[key] for key in keys}) for question in known]
        answers.write_text("\n".join(lines))
        for labels in sorted(path for path in folder.iterdir() if path.suffix != ".jsonl"):
            arguments = ["--questions", str(questions), "--answers", str(answers)]
            code = main(
                [*arguments, "--score", benchmark, "--annotations", str(labels), "--model", "none"]
            )
            error = capsys.readouterr().err
            assert (code, error.count("\n")) in ((0, 0), (2, 1))


def test_labels_of_other_questions_are_refused_with_the_numbers(tmp_path, capsys):
    folder = shared_data("reports/pope_label_count")
    answers = tmp_path / "a.jsonl"
    answers.write_bytes((folder / "pope4_ans.jsonl").read_bytes())
    arguments = ["--questions", str(folder / "pope4.jsonl"), "--answers", str(answers)]
    assert main([*arguments, "--score", "pope", "--annotations", str(folder / "labels")]) == 2
    assert "has 5 labels, but the questions of the category random are 4" in capsys.readouterr().err
