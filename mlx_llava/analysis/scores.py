"""How answers are scored: LLaVA 1.5's benchmarks by their original rules, quirks included.

Every scorer takes what was answered - the records of a question file, each with its ``place``, its
``prompt``, and the answer as ``text`` - and the benchmark's own annotation file or folder. It
returns figures by name; rates are between 0 and 1. It raises ValueError with the place of whatever
is missing, of another kind, or belongs to other questions.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from mlx_llava.json_files import Place, field, read_json, read_records

Record: TypeAlias = "Mapping[str, Any]"
Figures: TypeAlias = "dict[str, float]"

OPTIONS = "ABCDE"
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
#: The original passes a flag where re.sub takes a count (m4c_evaluator.py).
_MOST_PERIODS = int(re.UNICODE)
_DIGIT_COMMA = re.compile(r"(?<=\d),+(?=\d)")
_CONTRACTIONS = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't
    hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd
    it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd
    they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd
    you'd've you'll you're you've
    """
#: VQA's table of contractions that lack one of their apostrophes, and its own oddity (vqaEval.py;
#: its keys with capitals are left out, since text is lower-cased before it is looked up).
_MENDED = {
    word[:i] + word[i + 1 :]: word
    for word in _CONTRACTIONS.split()
    for i, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def normalise(answer: str) -> str:
    """VQA's normal form of a short answer (EvalAI; LLaVA's m4c_evaluator.py)."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    without = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        drop = beside_space or _DIGIT_COMMA.search(text) is not None
        without = without.replace(mark, "" if drop else " ")
    without = _PERIOD.sub("", without, count=_MOST_PERIODS)
    numbers = {"none": "0", **{word: str(n) for n, word in enumerate(NUMBERS)}}
    words = [numbers.get(word, word) for word in without.lower().split()]
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, human_answers: Sequence[str]) -> float:
    """How far ten people agree with an answer (m4c_evaluator.py, TextVQAAccuracyEvaluator).

    It is min(1, matches / 3), averaged over leaving out each of the people.

    Raises:
        ValueError: There are not ten human answers.
    """
    if len(human_answers) != 10:
        raise ValueError(f"There are {len(human_answers)} human answers; the rule needs 10.")
    text = normalise(answer)
    matches = [normalise(human) == text for human in human_answers]
    return sum(min(1.0, (sum(matches) - left_out) / 3) for left_out in matches) / 10


def score_exact(answers: Sequence[Record], _: Path | None) -> Figures:
    """Exact matches with each question's own ``answer``, in all and by ``category``."""
    hits = defaultdict(list)
    for answer in answers:
        hit = answer["text"].strip() == field(answer, "answer", str, answer["place"])
        category = field(answer, "category", str, answer["place"], default="no category")
        hits["accuracy"].append(hit)
        hits[f"accuracy, {category}"].append(hit)
    return {name: _mean(values) for name, values in hits.items()}


def score_pope(answers: Sequence[Record], annotations: Path | None) -> Figures:
    """POPE: is an object there? (eval_pope.py)

    A first sentence that holds No, not or no is a no, anything else a yes. Labels are those of
    ``coco_pope_CATEGORY.json``. The original matches them by their order; here they are matched
    by picture and question, and are refused unless they are those of the same questions.
    """
    files = sorted(_needed(annotations).glob("coco_pope_*.json"))
    if not files:
        raise ValueError(f"{annotations} has no coco_pope_CATEGORY.json.")
    by_category = defaultdict(list)
    for answer in answers:
        by_category[field(answer, "category", str, answer["place"])].append(answer)
    figures: Figures = {}
    for file in files:
        category = file.stem.removeprefix("coco_pope_")
        rates = _yes_no(_pope_pairs(by_category.pop(category, []), file, category))
        figures |= {f"{name}, {category}": value for name, value in rates.items()}
    for category, unknown in by_category.items():
        raise ValueError(
            f"{unknown[0]['place']} has the category {category!r:.80}, of which {annotations} has "
            "no labels."
        )
    f1 = [value for name, value in figures.items() if name.startswith("f1")]
    return {**figures, "f1": _mean(f1)}


def _pope_pairs(answers: Sequence[Record], file: Path, category: str) -> list[tuple[bool, bool]]:
    """What was said to each question of a category, and what is true."""
    given = _by_pope_question((answer["place"], answer, answer["prompt"]) for answer in answers)
    records = [(place, r, field(r, "text", str, place)) for place, r in read_records(file)]
    labels = _by_pope_question(records)
    if len(given) != len(labels):
        raise ValueError(
            f"{file} has {len(labels):,} labels, but the questions of the category {category} "
            f"are {len(given):,}; LLaVA's questions belong to POPE's commit e3e3926."
        )
    pairs = []
    for key, (place, answer) in given.items():
        if key not in labels:
            raise ValueError(f"{place} asks {key[1]!r:.80} of {key[0]}; {file} does not.")
        pairs.append((_says_yes(answer["text"]), _pope_label(*labels[key])))
    return pairs


def _by_pope_question(
    records: Iterable[tuple[object, Record, str]],
) -> dict[tuple[str, str], tuple[object, Record]]:
    """Records with their places by picture and question; each may stand there once.

    The question is the first line of a prompt. POPE's commit e3e3926 spells some with "imange".
    """
    found: dict[tuple[str, str], tuple[object, Record]] = {}
    for place, record, text in records:
        image = PurePosixPath(field(record, "image", str, place)).name
        question = text.strip().split("\n")[0].strip().lower().replace("imange", "image")
        if (image, question) in found:
            raise ValueError(
                f"{place} is the same as {found[image, question][0]}: {question!r:.80}"
            )
        found[image, question] = place, record
    return found


def _pope_label(place: object, record: Record) -> bool:
    label = field(record, "label", str, place)
    if label not in ("yes", "no"):
        raise ValueError(f"{place} has the label {label!r:.40}, expected yes or no.")
    return label == "yes"


def _says_yes(text: str) -> bool:
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & {*words}


def _yes_no(pairs: Sequence[tuple[bool, bool]]) -> Figures:
    hits = sum(yes and label for yes, label in pairs)
    precision = _ratio(hits, sum(yes for yes, _ in pairs))
    recall = _ratio(hits, sum(label for _, label in pairs))
    return {
        "accuracy": _mean([yes == label for yes, label in pairs]),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes ratio": _mean([yes for yes, _ in pairs]),
    }


def score_scienceqa(answers: Sequence[Record], annotations: Path | None) -> Figures:
    """ScienceQA's test split: right letters, of all and of those with a picture.

    (eval_science_qa.py; the folder holds problems.json and pid_splits.json.) A question that
    was not answered counts as wrong, and as one without a picture.
    """
    problems_file = _needed(annotations) / "problems.json"
    splits_file = _needed(annotations) / "pid_splits.json"
    problems = _object(problems_file)
    test = field(_object(splits_file), "test", list, splits_file)
    given = {str(answer["question_id"]): answer for answer in answers}
    _check_overlap(given, test, splits_file)
    hits, with_image = [], []
    for index in test:
        problem = field(problems, str(index), dict, problems_file)
        place = f"{problems_file}, problem {index}"
        choices = OPTIONS[: len(field(problem, "choices", list, place))]
        answer = given.get(str(index), {"text": "FAILED", "prompt": "Unknown"})
        letter = _chosen_letter(answer["text"])
        right = field(problem, "answer", int, place)
        hits.append(letter in choices and choices.index(letter) == right)
        if "<image>" in answer["prompt"]:
            with_image.append(hits[-1])
    return {"accuracy": _mean(hits), "image accuracy": _mean(with_image)}


def _chosen_letter(text: str) -> str:
    """The letter of a multiple-choice answer, or FAILED."""
    if text in tuple(OPTIONS):
        return text
    if len(text) >= 3 and text[0] in OPTIONS and text[1:3] == ". ":
        return text[0]
    letters = re.findall(r"The answer is ([A-Z]).", text)
    return letters[0] if len(letters) == 1 else "FAILED"


def score_textvqa(answers: Sequence[Record], annotations: Path | None) -> Figures:
    """TextVQA: `vqa_accuracy`, joined on the picture and the question in the prompt.

    (eval_textvqa.py; the file is TextVQA_0.5.1_val.json.)
    """
    humans = {}
    for place, item in _items(annotations, "data"):
        question = field(item, "question", str, place).lower()
        key = field(item, "image_id", (str, int), place), question
        humans[key] = _ten_texts(field(item, "answers", list, place), place)
    scores = []
    for answer in answers:
        key = (answer["question_id"], _textvqa_question(answer["prompt"], answer["place"]))
        if key not in humans:
            raise ValueError(f"{annotations} has no question {key[1]!r:.80} about {key[0]}.")
        scores.append(vqa_accuracy(answer["text"], humans[key]))
    return {"accuracy": _mean(scores)}


def _textvqa_question(prompt: str, place: object) -> str:
    """The question inside a prompt with OCR tokens, in lower case."""
    lines = prompt.split("\n")
    legacy = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
    if prompt.startswith("OCR tokens: ") and legacy:
        return legacy[1].lower()
    if "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise ValueError(f"{place}: {prompt!r:.80} has none of TextVQA's forms (2 or 3 lines).")


def score_gqa(answers: Sequence[Record], annotations: Path | None) -> Figures:
    """GQA: exact matches after LLaVA's conversion (convert_gqa_for_eval.py; GQA's eval.py).

    The file is testdev_balanced_questions.json; every balanced question must be answered.
    """
    path = _needed(annotations)
    given = {str(answer["question_id"]): gqa_prediction(answer["text"]) for answer in answers}
    truth = {}
    for key, item in _object(path).items():
        place = f"{path}, question {key:.80}"
        answer = field(item, "answer", str, place)
        if field(item, "isBalanced", bool, place, default=True):
            truth[key] = answer
    _check_overlap(given, truth, path)
    missing = truth.keys() - given.keys()
    if missing:
        raise ValueError(f"{len(missing)} of {len(truth)} questions of {path} have no answer.")
    return {"accuracy": _mean([given[key] == answer for key, answer in truth.items()])}


def gqa_prediction(text: str) -> str:
    """What LLaVA submits to GQA for an answer."""
    return text.rstrip(".").lower()


def score_vqa(answers: Sequence[Record], annotations: Path | None) -> Figures:
    """VQAv2-style accuracy: `vqa_accuracy`, joined on the question's id.

    The file is v2_mscoco_val2014_annotations.json. A question without an answer scores 0, as
    LLaVA's conversion submits an empty text for it (convert_vqav2_for_submission.py).
    """
    humans = {}
    for place, item in _items(annotations, "annotations"):
        said = field(item, "answers", list, place)
        texts = [field(human, "answer", str, place) for human in said]
        humans[str(field(item, "question_id", (str, int), place))] = _ten_texts(texts, place)
    given = {str(answer["question_id"]): answer["text"] for answer in answers}
    _check_overlap(given, humans, _needed(annotations))
    scores = [vqa_accuracy(given.get(key, ""), texts) for key, texts in humans.items()]
    return {"accuracy": _mean(scores)}


SCORERS: Mapping[str, Callable[[Sequence[Record], Path | None], Figures]] = {
    "exact": score_exact,
    "gqa": score_gqa,
    "pope": score_pope,
    "scienceqa": score_scienceqa,
    "textvqa": score_textvqa,
    "vqa": score_vqa,
}


def _object(path: Path) -> dict[str, Any]:
    """What a JSON file holds that must be there."""
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}.")
    return read_json(path)


def _items(annotations: Path | None, key: str) -> list[tuple[Place, Any]]:
    """The items of the list that a file has under a key, with their places."""
    path = _needed(annotations)
    items = field(_object(path), key, list, path)
    return [(Place(str(path), f"{key}, index", i), item) for i, item in enumerate(items)]


def _ten_texts(answers: list[Any], place: object) -> list[str]:
    if len(answers) != 10 or not all(isinstance(text, str) for text in answers):
        raise ValueError(f"{place} has {len(answers)} answers, expected 10 texts.")
    return answers


def _check_overlap(given: Iterable[str], truth: Iterable[Any], path: Path) -> None:
    """Raises ValueError where no question that was answered is one of the benchmark's."""
    given, truth = {*given}, {str(key) for key in truth}
    if not given & truth:
        raise ValueError(
            f"None of the {len(given):,} answered questions is among the {len(truth):,} of {path}."
        )


def _needed(annotations: Path | None) -> Path:
    if annotations is None:
        raise ValueError("This score needs the benchmark's own labels: give --annotations.")
    return annotations


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return _ratio(sum(values), len(values))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
