"""How answers are scored: LLaVA 1.5's benchmarks by their original rules, quirks included.

Every scorer takes questions, answers (LLaVA's answer files) and the benchmark's own annotation
file or folder, and returns figures by name. Rates are between 0 and 1.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

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
#: VQA's table of contractions that lack an apostrophe (vqaEval.py; its keys with capitals are
#: left out, since text is lower-cased before it is looked up).
_CONTRACTIONS = dict(
    pair.split("=")
    for pair in """
    aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't
    couldn'tve=couldn't've couldnt've=couldn't've didnt=didn't doesnt=doesn't dont=don't
    hadnt=hadn't hadnt've=hadn't've hadn'tve=hadn't've hasnt=hasn't havent=haven't hed=he'd
    hed've=he'd've he'dve=he'd've hes=he's howd=how'd howll=how'll hows=how's isnt=isn't
    itd=it'd itd've=it'd've it'dve=it'd've itll=it'll maam=ma'am mightnt=mightn't
    mightnt've=mightn't've mightn'tve=mightn't've mightve=might've mustnt=mustn't
    mustve=must've neednt=needn't notve=not've oclock=o'clock oughtnt=oughtn't
    ow's'at='ow's'at 'ows'at='ow's'at 'ow'sat='ow's'at shant=shan't shed've=she'd've
    she'dve=she'd've shouldve=should've shouldnt=shouldn't shouldnt've=shouldn't've
    shouldn'tve=shouldn't've somebody'd=somebodyd somebodyd've=somebody'd've
    somebody'dve=somebody'd've somebodyll=somebody'll somebodys=somebody's
    someoned=someone'd someoned've=someone'd've someone'dve=someone'd've
    someonell=someone'll someones=someone's somethingd=something'd
    somethingd've=something'd've something'dve=something'd've somethingll=something'll
    thats=that's thered=there'd thered've=there'd've there'dve=there'd've therere=there're
    theres=there's theyd=they'd theyd've=they'd've they'dve=they'd've theyll=they'll
    theyre=they're theyve=they've twas='twas wasnt=wasn't wed've=we'd've we'dve=we'd've
    weve=we've werent=weren't whatll=what'll whatre=what're whats=what's whatve=what've
    whens=when's whered=where'd wheres=where's whereve=where've whod=who'd whod've=who'd've
    who'dve=who'd've wholl=who'll whos=who's whove=who've whyll=why'll whyre=why're
    whys=why's wont=won't wouldve=would've wouldnt=wouldn't wouldnt've=wouldn't've
    wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll y'allll=y'all'll yall'd've=y'all'd've
    y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd youd've=you'd've you'dve=you'd've
    youll=you'll youre=you're youve=you've
    """.split()
)


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
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, human_answers: Sequence[str]) -> float:
    """How far ten people agree with an answer (m4c_evaluator.py, TextVQAAccuracyEvaluator).

    It is min(1, matches / 3), averaged over leaving out each of the people.

    Raises:
        ValueError: There are not ten human answers.
    """
    if len(human_answers) != 10:
        raise ValueError(f"There are {len(human_answers)} human answers; the rule needs 10.")
    wanted = normalise(answer)
    matches = [normalise(human) == wanted for human in human_answers]
    return sum(min(1.0, (sum(matches) - own) / 3) for own in matches) / 10


def score_exact(questions: Sequence[Record], answers: Sequence[Record], _: Path | None) -> Figures:
    """Exact matches with each question's own ``answer``, in all and by ``category``."""
    given = {answer["question_id"]: answer["text"].strip() for answer in answers}
    hits = defaultdict(list)
    for question in questions:
        if "answer" not in question:
            raise ValueError(f"Question {question['question_id']} has no answer to compare with.")
        hit = given.get(question["question_id"]) == question["answer"]
        hits["accuracy"].append(hit)
        hits[f"accuracy, {question.get('category', 'no category')}"].append(hit)
    return {name: _mean(values) for name, values in hits.items()}


def score_pope(
    questions: Sequence[Record], answers: Sequence[Record], annotations: Path | None
) -> Figures:
    """POPE: is an object there? (eval_pope.py)

    A first sentence that holds No, not or no is a no, anything else a yes. Labels are those of
    ``coco_pope_CATEGORY.json``, matched by order.
    """
    figures: Figures = {}
    category_of = {question["question_id"]: question["category"] for question in questions}
    files = sorted(_needed(annotations).glob("coco_pope_*.json"))
    if not files:
        raise ValueError(f"{annotations} has no coco_pope_CATEGORY.json.")
    for file in files:
        category = file.stem.removeprefix("coco_pope_")
        labels = [record["label"] != "no" for record in read_lines(file)]
        own = [answer for answer in answers if category_of[answer["question_id"]] == category]
        said = [_says_yes(answer["text"]) for answer in own]
        figures |= {f"{name}, {category}": value for name, value in _yes_no(said, labels).items()}
    f1 = [value for name, value in figures.items() if name.startswith("f1")]
    return {**figures, "f1": _mean(f1)}


def _says_yes(text: str) -> bool:
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & {*words}


def _yes_no(said: Sequence[bool], labels: Sequence[bool]) -> Figures:
    pairs = list(zip(said, labels, strict=False))
    hits = sum(yes and label for yes, label in pairs)
    precision = _ratio(hits, sum(yes for yes, _ in pairs))
    recall = _ratio(hits, sum(label for _, label in pairs))
    return {
        "accuracy": _mean([yes == label for yes, label in pairs]),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes ratio": _mean(said),
    }


def score_scienceqa(
    _: Sequence[Record], answers: Sequence[Record], annotations: Path | None
) -> Figures:
    """ScienceQA's test split: right letters, of all and of those with a picture.

    (eval_science_qa.py; the folder holds problems.json and pid_splits.json.) A question that
    was not answered counts as wrong, and as one without a picture.
    """
    folder = _needed(annotations)
    problems = json.loads((folder / "problems.json").read_text(encoding="utf-8"))
    splits = json.loads((folder / "pid_splits.json").read_text(encoding="utf-8"))
    given = {str(answer["question_id"]): answer for answer in answers}
    hits, with_image = [], []
    for index in splits["test"]:
        answer = given.get(str(index), {"text": "FAILED", "prompt": "Unknown"})
        problem = problems[index]
        letter = _chosen_letter(answer["text"])
        choices = OPTIONS[: len(problem["choices"])]
        hits.append(letter in choices and choices.index(letter) == problem["answer"])
        if "<image>" in answer["prompt"]:
            with_image.append(hits[-1])
    return {"accuracy": _mean(hits), "image accuracy": _mean(with_image)}


def _chosen_letter(text: str) -> str:
    """The letter of a multiple-choice answer, or FAILED."""
    if text in tuple(OPTIONS):
        return text
    if len(text) >= 3 and text[0] in OPTIONS and text[1:3] == ". ":
        return text[0]
    said = re.findall(r"The answer is ([A-Z]).", text)
    return said[0] if len(said) == 1 else "FAILED"


def score_textvqa(
    _: Sequence[Record], answers: Sequence[Record], annotations: Path | None
) -> Figures:
    """TextVQA: `vqa_accuracy`, joined on the picture and the question in the prompt.

    (eval_textvqa.py; the file is TextVQA_0.5.1_val.json.)
    """
    data = json.loads(_needed(annotations).read_text(encoding="utf-8"))["data"]
    humans = {(item["image_id"], item["question"].lower()): item["answers"] for item in data}
    scores = []
    for answer in answers:
        key = (answer["question_id"], _textvqa_question(answer["prompt"]))
        if key not in humans:
            raise ValueError(f"{annotations} has no question {key[1]!r} about {key[0]}.")
        scores.append(vqa_accuracy(answer["text"], humans[key]))
    return {"accuracy": _mean(scores)}


def _textvqa_question(prompt: str) -> str:
    """The question inside a prompt with OCR tokens, in lower case."""
    lines = prompt.split("\n")
    legacy = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
    if prompt.startswith("OCR tokens: ") and legacy:
        return legacy[1].lower()
    if "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise ValueError(f"The prompt {prompt!r} has none of TextVQA's forms (2 or 3 lines).")


def score_gqa(_: Sequence[Record], answers: Sequence[Record], annotations: Path | None) -> Figures:
    """GQA: exact matches after LLaVA's conversion (convert_gqa_for_eval.py; GQA's eval.py).

    The file is testdev_balanced_questions.json; every balanced question must be answered.
    """
    questions = json.loads(_needed(annotations).read_text(encoding="utf-8"))
    given = {str(answer["question_id"]): gqa_prediction(answer["text"]) for answer in answers}
    balanced = {key: value for key, value in questions.items() if value.get("isBalanced", True)}
    missing = balanced.keys() - given.keys()
    if missing:
        raise ValueError(f"{len(missing)} of {len(balanced)} questions have no answer.")
    return {"accuracy": _mean([given[key] == item["answer"] for key, item in balanced.items()])}


def gqa_prediction(text: str) -> str:
    """What LLaVA submits to GQA for an answer."""
    return text.rstrip(".").lower()


def score_vqa(_: Sequence[Record], answers: Sequence[Record], annotations: Path | None) -> Figures:
    """VQAv2-style accuracy: `vqa_accuracy`, joined on the question's id.

    The file is v2_mscoco_val2014_annotations.json. A question without an answer scores 0, as
    LLaVA's conversion submits an empty text for it (convert_vqav2_for_submission.py).
    """
    data = json.loads(_needed(annotations).read_text(encoding="utf-8"))["annotations"]
    given = {str(answer["question_id"]): answer["text"] for answer in answers}
    scores = [
        vqa_accuracy(
            given.get(str(item["question_id"]), ""), [human["answer"] for human in item["answers"]]
        )
        for item in data
    ]
    return {"accuracy": _mean(scores)}


Scorer: TypeAlias = "Callable[[Sequence[Record], Sequence[Record], Path | None], Figures]"
SCORERS: Mapping[str, Scorer] = {
    "exact": score_exact,
    "gqa": score_gqa,
    "pope": score_pope,
    "scienceqa": score_scienceqa,
    "textvqa": score_textvqa,
    "vqa": score_vqa,
}


def read_lines(path: Path) -> list[Any]:
    """The objects of a JSON-lines file.

    Raises:
        ValueError: A line is no JSON.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} has no JSON in line {number}: {error}.") from error
    return records


def _needed(annotations: Path | None) -> Path:
    if annotations is None:
        raise ValueError("This score needs the benchmark's own labels: give --annotations.")
    return annotations


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return _ratio(sum(values), len(values))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
