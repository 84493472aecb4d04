"""Several ranks run one model: what they say is what one process says, and they end together."""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_llava import caption, chat, evaluate
from mlx_llava.checkpoint.hub import Source
from mlx_llava.generate import main as generate
from mlx_llava.launched import _facts
from mlx_llava.model.links import SECONDS
from mlx_llava.model.ranks import ALONE
from tests.conftest import GOLDENS, ROOT
from tests.ranks import Ranks, launched
from tests.servers import endless_schema

sys.path.insert(0, str(ROOT / "scripts"))
import load_server
import shapes
from served import served

#: Of several ranks, in seconds; for those that are to be waited for, a short one.
DEADLINE = 3.0
QUESTIONS = ("Describe the picture.", "What colour is the circle?", "How many shapes are there?")
ENDLESS = ["--prompt", "x", "--json-schema", json.dumps(endless_schema()), "-m", "100000"]
PACKAGE = ROOT / "mlx_llava"


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawings")
    shapes.write_split(folder, "seen", pictures=6, seed=4)
    return folder


@pytest.fixture(scope="module")
def images(drawings) -> list[str]:
    return sorted(str(path) for path in (drawings / "images").glob("*.png"))


def test_a_prompts_file_is_answered_as_by_one_process(images, tmp_path, capsys):
    """Sampled rows, constrained ones and those that fail; rank 1 finds none of the files."""
    lines = [
        {
            "prompt": QUESTIONS[i % 3],
            "images": [Path(images[i % 6]).name] if i % 3 else [],
            **({"videos": ["."]} if i == 3 else {}),
            **({"temp": 0.8, "seed": i} if i % 2 else {}),
            **({"json_schema": {"enum": ["red", "blue"]}} if i % 4 == 1 else {}),
            **({"logit_bias": {"99999999": 1}} if i == 6 else {}),
        }
        for i in range(12)
    ]
    folder = Path(images[0]).parent
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["-m", "mlx_llava.generate", "--prompts-file", "prompts.jsonl", "--max-tokens", "30"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert generate(command[2:]) == 2
        alone = answers(capsys.readouterr().out)
        with launched(*command, elsewhere=tmp_path) as ranks:
            first, second = ranks.finish()
    assert answers(first.out) == alone
    assert (first.code, second.code) == (2, 2)
    assert "error: 1 of 12 prompts have no answer; their lines say why.\n" in first.err
    assert (second.out, second.err) == ("", "")


def answers(printed: str) -> dict[int, tuple[str, int]]:
    found = [json.loads(line) for line in printed.splitlines()]
    return {a["index"]: (a.get("error", a.get("text")), a.get("cached_tokens")) for a in found}


def test_a_chat_is_as_with_one_process(images, capsys, monkeypatch):
    """Its prompts are reused, its template changes, and it ends an answer that is taken back."""
    lines = [*QUESTIONS, "/regenerate", "/undo", "/template llava_v0", QUESTIONS[0], "/exit"]
    said = "".join(f"{line}\n" for line in lines)
    command = ["--image", images[0], "--max-tokens", "30"]
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    assert chat.main(command) == 0
    alone = capsys.readouterr()
    with launched("-m", "mlx_llava.chat", *command, "--pipeline") as ranks:
        first, second = ranks.finish(said)
    assert (first.code, first.out, first.err) == (0, alone.out, alone.err)
    assert (second.code, second.out, second.err) == (0, "", "")


PRESSES_AT_ONCE = """
import os, signal, sys
from mlx_llava import chat
from mlx_llava.generation.prompt_cache import PromptCache
embed = PromptCache.embed
def press(self, prompts):
    os.kill(os.getpid(), signal.SIGINT)
    PromptCache.embed = embed
    return embed(self, prompts)
PromptCache.embed = press
sys.exit(chat.main(sys.argv[1:]))
"""


def test_control_c_ends_an_answer_and_the_chat_goes_on(images):
    """While the picture is encoded, and in the midst of the answer."""
    command = ["--image", images[0], "-m", "100000", "--json-schema"]
    with launched("-c", PRESSES_AT_ONCE, *command, json.dumps(endless_schema())) as ranks:
        tell(ranks, QUESTIONS[0])
        await_line(ranks, "stopped\n")
        tell(ranks, QUESTIONS[0])
        assert ranks[0].stdout.read(3).strip().startswith("[")
        ranks[0].send_signal(signal.SIGINT)
        ranks[1].send_signal(signal.SIGINT)  # as a terminal does
        await_line(ranks, "stopped\n")
        assert [rank.code for rank in ranks.finish("/exit\n")] == [0, 0]


def await_line(ranks: Ranks, line: str) -> None:
    assert line in iter(ranks[0].stderr.readline, "")


def tell(ranks: Ranks, line: str) -> None:
    ranks[0].stdin.write(f"{line}\n")
    ranks[0].stdin.flush()


def test_captions_are_those_of_one_process(drawings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [str(drawings / "images"), "--max-tokens", "20"]
    assert caption.main([*command, "--out", "alone.jsonl"]) == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    out = ["--out", "captions.jsonl"]
    with launched("-m", "mlx_llava.caption", *command, *out, elsewhere=elsewhere) as ranks:
        assert [rank.code for rank in ranks.finish()] == [0, 0]
    assert Path("captions.jsonl").read_text() == Path("alone.jsonl").read_text()
    assert not [*elsewhere.iterdir()]


def test_an_evaluation_is_that_of_one_process(drawings, tmp_path, capsys):
    command = ["--questions", str(drawings / "question.jsonl"), "--score", "exact", "-m", "20"]
    command += ["--image-folder", str(drawings), "--answers"]
    assert evaluate.main([*command, str(tmp_path / "alone.jsonl")]) == 0
    alone = capsys.readouterr().out
    split = [str(tmp_path / "a.jsonl"), "--pipeline", "--split", "3,1"]
    with launched("-m", "mlx_llava.evaluate", *command, *split) as ranks:
        first, second = ranks.finish()
    assert (first.code, first.out) == (0, alone)
    assert (second.code, second.out) == (0, "")


def test_a_server_answers_as_with_one_process():
    """Eight clients at a time, some of whom go away or ask for what there is not."""
    questions = load_server.make_questions(24, seed=1)
    with served(*load_server.OPTIONS, ranks=2) as server:
        found = load_server.run(server.url, server.pid, (), questions, clients=8)
    assert (found["wrong"], found["other_fates"], found["places_taken"]) == ([], 0, 0)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_dies_ends_the_other(killed):
    with launched("-m", "mlx_llava.generate", *ENDLESS) as ranks:
        ranks[0].stdout.read(2)
        started = time.monotonic()
        ranks[killed].kill()
        left = ranks.finish()[1 - killed]
        assert time.monotonic() - started < SECONDS
    assert left.code == 1
    assert f"error: rank {killed} has ended\n" in left.err


def test_a_rank_that_is_stopped_ends_the_other():
    with launched("-m", "mlx_llava.generate", *ENDLESS, "--rank-timeout", str(DEADLINE)) as ranks:
        ranks[0].stdout.read(2)
        ranks[1].send_signal(signal.SIGSTOP)
        _, err = ranks[0].communicate(timeout=3 * DEADLINE)
        assert ranks[0].returncode == 1
        assert f"error: rank 1 has been silent for {DEADLINE:g} s\n" in err


HANGS = """
import itertools, sys, time
from mlx_llava.generation.follow import _Follower
from mlx_llava.generate import main
calls, step = itertools.count(), _Follower.step
_Follower.step = lambda self, of: step(self, of) if next(calls) < 21 else time.sleep(100)
sys.exit(main(sys.argv[1:]))
"""


def test_a_rank_that_hangs_ends_all():
    command = [*ENDLESS, "--rank-timeout", str(DEADLINE)]
    with launched("-m", "mlx_llava.generate", *command, others=["-c", HANGS, *command]) as ranks:
        first, second = ranks.finish(seconds=10 * DEADLINE)
    assert (first.code, second.code) == (1, 1)
    assert f"error: rank 1 hangs: no step has ended for {DEADLINE:g} s" in first.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", str(GOLDENS / "llava_next")], "The model of rank 1 is "),
        (["--model", "there/is/none"], "rank 1: "),
        (["--pipeline"], "The --pipeline of rank 1 is True, rank 0 has False; "),
    ],
)
def test_ranks_that_differ_are_refused(more, message):
    command = ["-m", "mlx_llava.generate", "--prompt", "x", "--model", str(GOLDENS / "llava")]
    with launched(*command, others=[*command, *more]) as ranks:
        first, second = ranks.finish()
    assert (first.code, second.code) == (2, 2)
    assert first.err.startswith(f"error: {message}")
    assert first.err.count("\n") == 1
    assert second.err == ""


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["convert", "--model", "x", "--mlx-path", "y"], "This command is for one process"),
        (["generate", "--prompt", "x", "--image", "nothing.png"], "nothing.png"),
        (["generate", "--prompt", "x", "--prompt-cache-file", "y"], "--prompt-cache-file is for"),
    ],
)
def test_only_rank_0_says_what_is_wrong(command, message):
    name, *arguments = command
    with launched("-m", f"mlx_llava.{name}", *arguments) as ranks:
        first, second = ranks.finish()
    assert (first.code, second.code) == (2, 2)
    assert message in first.err
    assert second.err == ""


def test_models_of_other_numbers_or_words_are_told_apart(tmp_path):
    """A folder is told from itself with another fine-tune's weights, and another's vocabulary."""
    facts = launched_facts(shutil.copytree(GOLDENS / "llava", tmp_path / "model"))
    assert facts == launched_facts(GOLDENS / "llava")
    weights = mx.load(str(tmp_path / "model" / "model.safetensors"))
    name = max(n for n in weights if "language_model" in n and "v_proj" in n)
    weights[name] = weights[name] * 1.001
    mx.save_safetensors(str(tmp_path / "model" / "model.safetensors"), weights, {"format": "pt"})
    others = launched_facts(tmp_path / "model")
    assert others["model"] != facts["model"]
    assert others["tokenizer"] == facts["tokenizer"]
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert launched_facts(tmp_path / "model")["tokenizer"] != facts["tokenizer"]


def launched_facts(folder: Path) -> dict[str, str]:
    return _facts(Source(folder), ALONE)


def test_a_rank_that_no_launcher_has_started_does_not_end_in_silence():
    run = [sys.executable, "-m", "mlx_llava.generate", "--prompt", "x"]
    env = {**os.environ, "MLX_RANK": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(run, env=env, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: rank 1 has nobody to meet: no hostfile\n"


MEASURES = """
import sys
from mlx_llava import doctor
doctor.examine = lambda: {"advice": []}
sys.exit(doctor.main(["--json"]))
"""


def test_the_doctor_measures_what_is_between_them():
    with launched("-c", MEASURES) as ranks:
        first, second = ranks.finish()
    found = json.loads(first.out)["ranks"]
    assert 0 < found["latency"] < 1 < found["rate"]
    assert (second.code, second.out, second.err) == (0, "", "")


def test_a_launcher_starts_them(images, capsys):
    """All that `mlx.launch` prints; its own exit code says nothing."""
    launch = [str(Path(sys.executable).parent / "mlx.launch"), "-n", "2", "--backend", "ring", "--"]
    command = [*launch, sys.executable, "-m", "mlx_llava.generate", "-q"]
    command += ["--image", images[0], "--prompt", QUESTIONS[0], "-m", "20"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as launcher:  # whose input stays open
        printed = launcher.stdout.read()
    assert generate(command[9:]) == 0
    assert printed == capsys.readouterr().out


def test_nothing_that_is_read_can_run_code():
    """Pickles are read in one place, by a reader that knows what weights need, and no more."""
    barred = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "multiprocessing"}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name for node in nodes for alias in node.names}
        names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        if {name.partition(".")[0] for name in names} & barred:
            found.add(str(path.relative_to(PACKAGE)))
        words = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
        assert "allow_pickle" not in words
    assert found == {"checkpoint/torch_file.py", "model/linux/kernels.py"}
