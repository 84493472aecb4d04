"""The scorers follow the published rules (LLaVA's eval scripts), case by case, by hand."""

from __future__ import annotations

import json

import pytest

from mlx_llava.analysis.scores import SCORERS, gqa_prediction, normalise, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Red Car", "red car"),  # lower case, articles
        ("a an the", ""),
        ("Two dogs", "2 dogs"),  # number words up to ten
        ("none", "0"),
        ("eleven", "eleven"),
        ("dont know", "don't know"),  # contractions without an apostrophe
        ("couldn'tve couldnt've", "couldn't've couldn't've"),  # or without one of two
        ("couldntve yall'd've", "couldntve y'all'd've"),
        ("It's", "it 's"),  # 's stands alone
        ("what?", "what"),  # question marks and commas go
        ("1,000", "1000"),
        ("yes, no", "yes no"),
        ("black/white", "black white"),  # punctuation between letters is a space
        ("black / white", "black white"),  # beside a space it goes
        ("black /white/red", "black whitered"),  # and then everywhere in the text
        ("(left)", "left"),
        ("yes.", "yes"),  # a period goes ...
        ("3.5", "3.5"),  # ... unless a digit follows
        ("5.", "5"),
        ("." * 40, "." * 8),  # at most 32 of them: the original passes a flag as count
        ("a\nb\tc", "b c"),
        ("  Blue  ", "blue"),
        ("somebody'd", "somebodyd"),  # the table's own oddity
        ("top-left", "top left"),
        ("10:30", "10:30"),  # a colon is no punctuation here
    ],
)
def test_the_normal_form_of_an_answer(answer, normal):
    assert normalise(answer) == normal


@pytest.mark.parametrize(
    ("matches", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]
)
def test_agreement_with_ten_people(matches, accuracy):
    """Leaving one out in turn: with m matches, m times (m - 1) / 3 and else m / 3, at most 1."""
    humans = ["Yes."] * matches + [f"other {i}" for i in range(10 - matches)]
    assert vqa_accuracy("yes", humans) == pytest.approx(accuracy)


def test_ten_people_are_needed():
    with pytest.raises(ValueError, match="There are 9 human answers; the rule needs 10"):
        vqa_accuracy("yes", ["yes"] * 9)


def answer(question_id, text, prompt="Q", **question):
    """A question of a file, with what was answered."""
    place = f"q.jsonl, line {question_id}"
    own = {"question_id": question_id, "text": text, "prompt": prompt, "place": place}
    return {**own, **question}


def pope_labels(folder, **labels):
    """Label files as POPE has them; each label is one of a picture and a question."""
    for category, records in labels.items():
        lines = [
            json.dumps({"question_id": 99, "image": image, "text": text, "label": label}) + "\n"
            for image, text, label in records
        ]
        (folder / f"coco_pope_{category}.json").write_text("".join(lines))


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no", False),
        ("There is not one", False),
        ("Yes. There is no cat", True),  # the first sentence counts
        ("No, there is", False),  # commas go
        ("Nothing", True),  # whole words only
        ("NO", True),  # in this spelling only
        ("I see none", True),
        ("", True),
    ],
)
def test_pope_reads_yes_and_no(text, yes, tmp_path):
    pope_labels(tmp_path, random=[("a.jpg", "Q", "yes")])
    own = answer(1, text, image="a.jpg", category="random")
    figures = SCORERS["pope"]([own], tmp_path)
    assert figures["accuracy, random"] == yes
    assert figures["yes ratio, random"] == yes


POPE = {
    "random": [(f"{i}.jpg", "Is there a cat in the image?", "yes") for i in range(2)]
    + [(f"{i}.jpg", "Is there a dog in the imange?", "no") for i in range(3)],
    "popular": [("0.jpg", "Is there a cat in the image?", "yes")],
}


def pope_answers(said: dict[tuple, str]) -> list[dict]:
    """Answers in another order than the labels, to questions as LLaVA writes them."""
    return [
        answer(i, text, f"Is there a {what} in the image?\nAnswer in one word.", image=image)
        | {"category": category}
        for i, ((category, image, what), text) in enumerate(reversed(said.items()))
    ]


SAID = {
    ("random", "0.jpg", "cat"): "yes",
    ("random", "val2014/1.jpg", "cat"): "no",
    ("random", "0.jpg", "dog"): "yes",
    ("random", "1.jpg", "dog"): "no",
    ("random", "2.jpg", "dog"): "no",
    ("popular", "0.jpg", "cat"): "yes",
}


def test_pope_counts_in_each_category_by_picture_and_question(tmp_path):
    pope_labels(tmp_path, **POPE)
    figures = SCORERS["pope"](pope_answers(SAID), tmp_path)
    assert figures["accuracy, random"] == 3 / 5
    assert figures["precision, random"] == figures["recall, random"] == 1 / 2
    assert figures["f1, random"] == 1 / 2
    assert figures["yes ratio, random"] == 2 / 5
    assert figures["f1, popular"] == 1
    assert figures["f1"] == 3 / 4  # the published figure is the mean of the categories
    with pytest.raises(ValueError, match="give --annotations"):
        SCORERS["pope"](pope_answers(SAID), None)


OTHER_POPE = {
    "a label more": (
        {"random": [*POPE["random"], ("9.jpg", "Q", "no")]},
        {},
        "random.json has 6 labels, but the questions of the category random are 5; LLaVA's",
    ),
    "no question": ({}, {("popular", "0.jpg", "cat"): None}, "category popular are 0"),
    "another question": (
        {"popular": [("0.jpg", "Is there a bus in the image?", "no")]},
        {},
        r"q.jsonl, line 0 asks 'is there a cat in the image\?' of 0.jpg; .*popular.json does not",
    ),
    "another picture": ({"popular": [("1.jpg", *POPE["popular"][0][1:])]}, {}, "of 0.jpg; "),
    "another category": (
        {},
        {("odd", "0.jpg", "cat"): "yes"},
        "q.jsonl, line 0 has the category 'odd', of which .* has no labels",
    ),
    "a label twice": (
        {"popular": [*POPE["popular"], *POPE["popular"]]},
        {},
        "popular.json, line 2 is the same as .*line 1: 'is there a cat",
    ),
    "a question twice": (
        {"popular": [*POPE["popular"], ("7.jpg", "Q", "no")]},
        {("popular", "x/0.jpg", "cat"): "yes"},
        "q.jsonl, line 1 is the same as q.jsonl, line 0: 'is there a cat",
    ),
    "no yes and no no": (
        {"popular": [(*POPE["popular"][0][:2], "No")]},
        {},
        "line 1 has the label 'No', expected yes or no",
    ),
}


@pytest.mark.parametrize("name", OTHER_POPE)
def test_pope_is_refused_for_labels_of_other_questions(name, tmp_path):
    labels, said, message = OTHER_POPE[name]
    pope_labels(tmp_path, **{**POPE, **labels})
    answers = pope_answers({key: text for key, text in {**SAID, **said}.items() if text})
    with pytest.raises(ValueError, match=message):
        SCORERS["pope"](answers, tmp_path)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("B", True),
        ("b", False),
        ("B. a cat", True),
        ("B.", False),
        ("B) a cat", False),
        ("The answer is B.", True),
        ("So The answer is B. The answer is B.", False),  # twice is not unique
        ("The answer is b.", False),
        ("The answer is B", False),  # one more character is wanted
        ("E", False),  # there are two choices only
        ("", False),
    ],
)
def test_scienceqa_reads_letters(text, right, tmp_path):
    problems = {"7": {"choices": ["a dog", "a cat"], "answer": 1}}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["7"]}))
    answers = [answer("7", text, "<image>\nQ")]
    assert SCORERS["scienceqa"](answers, tmp_path) == {
        "accuracy": right,
        "image accuracy": right,
    }


def test_scienceqa_tells_pictures_apart_and_counts_what_is_missing(tmp_path):
    problems = {str(i): {"choices": ["x", "y", "z"], "answer": i % 3} for i in range(6)}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": list("01234"), "val": ["5"]}))
    answers = [
        answer(0, "A", "<image>\nQ"),
        answer(1, "A", "<image>\nQ"),
        answer(2, "C"),
        answer(3, "A. x"),
    ]
    figures = SCORERS["scienceqa"](answers, tmp_path)
    assert figures == {"accuracy": 3 / 5, "image accuracy": 1 / 2}


@pytest.mark.parametrize(
    "prompt",
    [
        "What Brand?\nReference OCR token: A, B\nAnswer the question.",
        "Reference OCR token: A, B\nWhat Brand?\nAnswer the question.",
        "What Brand?\nAnswer the question.",
        "OCR tokens: A, B. Question: What Brand? Short answer:",
    ],
)
def test_textvqa_finds_the_question_in_the_prompt(prompt, tmp_path):
    humans = ["nokia"] * 3 + ["sony"] * 7
    data = [{"image_id": "x", "question": "what brand?", "answers": humans}]
    path = tmp_path / "val.json"
    path.write_text(json.dumps({"data": data}))
    answers = [answer("x", "Nokia", prompt)]
    assert SCORERS["textvqa"](answers, path)["accuracy"] == pytest.approx(0.9)
    with pytest.raises(ValueError, match="has no question 'what brand"):
        SCORERS["textvqa"]([answer("y", "Nokia", prompt)], path)
    with pytest.raises(ValueError, match="none of TextVQA's forms"):
        SCORERS["textvqa"]([answer("x", "Nokia", "What brand?")], path)


def test_gqa_is_an_exact_match_of_the_balanced_questions(tmp_path):
    assert [gqa_prediction(text) for text in ("Yes.", "The Left..", "a. b")] == [
        "yes",
        "the left",
        "a. b",
    ]
    questions = {str(i): {"answer": "yes", "isBalanced": i < 4} for i in range(5)}
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(questions))
    answers = [answer(i, text) for i, text in enumerate(["Yes.", "yes", "no", "yes it is"])]
    assert SCORERS["gqa"](answers, path) == {"accuracy": 2 / 4}
    with pytest.raises(ValueError, match=r"1 of 4 questions of .*questions.json have no answer"):
        SCORERS["gqa"](answers[1:], path)


def test_vqa_is_joined_by_id_and_counts_what_is_missing(tmp_path):
    def people(*answers):
        return [{"answer": text} for text in answers]

    data = [
        {"question_id": 1, "answers": people(*["two"] * 10)},
        {"question_id": 2, "answers": people("a", *["red"] * 2, *["blue"] * 7)},
        {"question_id": 3, "answers": people(*["x"] * 10)},
    ]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"annotations": data}))
    answers = [answer(1, "2"), answer(2, "Red")]
    accuracy = SCORERS["vqa"](answers, path)["accuracy"]
    assert accuracy == pytest.approx((1 + 0.6 + 0) / 3)


def test_exact_matches_by_category():
    answers = [
        answer(1, "red ", answer="red", category="colour"),
        answer(2, "Two", answer="two", category="count"),
        answer(2, "one", "R", answer="one", category="count"),  # of the same picture
        answer(3, "x", answer="x"),
    ]
    assert SCORERS["exact"](answers, None) == {
        "accuracy": 3 / 4,
        "accuracy, colour": 1,
        "accuracy, count": 1 / 2,
        "accuracy, no category": 1,
    }
    with pytest.raises(ValueError, match="q.jsonl, line 4 has no answer; it has question_id"):
        SCORERS["exact"]([answer(4, "x")], None)
