"""The command: the answer on stdout, all else on stderr, one line for a mistake."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_llava import cli, generate, load
from mlx_llava.checkpoint.save import save
from tests.conftest import GOLDENS, PICTURE, ROOT
from tests.inputs.test_image import png_header

MODEL = str(GOLDENS / "llava")
main = importlib.import_module("mlx_llava.generate").main


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["--model", MODEL, *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def ask(capsys, *arguments: str) -> tuple[int, str, str]:
    return run(capsys, "--prompt", "What is this?", "--max-tokens", "8", *arguments)


def expected(prompt: str = "What is this?", image=PICTURE, **options) -> str:
    model, processor = load(MODEL)
    return generate(model, processor, prompt, image, max_tokens=8, **options)


def test_the_answer_is_on_stdout_and_the_timings_are_on_stderr(capsys):
    code, out, err = ask(capsys, "--image", str(PICTURE))
    assert (code, out) == (0, expected() + "\n")
    images, times, speeds, memory = err.splitlines()
    assert images == "images: 1, 16 tokens"
    assert times.startswith("load ")
    assert " | preprocess " in times
    assert " | encode " in times
    assert speeds.startswith("prefill 28 tokens, ")
    assert "tokens/s | decode 8 tokens, " in speeds
    assert memory.startswith("peak memory ")


def test_quiet_says_nothing_but_the_answer(capsys):
    assert ask(capsys, "--quiet") == (0, expected(image=None) + "\n", "")


@pytest.fixture
def echo(tmp_path) -> Path:
    """A model that says its last token again."""
    model, processor = load(MODEL, dtype="float32")
    decoder = model.language_model
    for layer in decoder.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight = mx.zeros_like(linear.weight)
    tokens = decoder.model.embed_tokens.weight
    decoder.model.norm.weight = mx.ones_like(decoder.model.norm.weight)
    decoder.lm_head.weight = tokens / mx.linalg.norm(tokens, axis=-1, keepdims=True)
    save(model, processor, tmp_path / "echo")
    return tmp_path / "echo"


def test_an_answer_that_goes_round_in_circles_is_ended(echo, capsys):
    arguments = ["--prompt", "hi", "--model", str(echo)]
    assert main([*arguments, "--quiet", "--max-repeats", "99", "-m", "50"]) == 0
    whole = capsys.readouterr().out.rstrip("\n")
    assert whole
    assert whole == whole[: len(whole) // 50] * 50
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.rstrip("\n") == whole[: 32 * len(whole) // 50]
    assert "note: the answer repeats itself and was ended" in err


def test_a_warning_is_one_line_for_people(capsys, tmp_path):
    shutil.copytree(MODEL, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "frobnicate": 7}))
    command = [sys.executable, "-m", "mlx_llava.generate", "--model", tmp_path / "m", "-q"]
    done = subprocess.run(
        [*command, "--prompt", "hi", "-m", "2"], cwd=ROOT, capture_output=True, text=True
    )
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: config.json ")
    assert "frobnicate" in line


def test_json_is_one_object(capsys):
    code, out, _ = ask(capsys, "--image", str(PICTURE), "--image", str(PICTURE), "--json")
    answer = json.loads(out)
    assert code == 0
    assert set(answer) == {
        "text",
        "prompt",
        "tokens",
        "prompt_tokens",
        "image_tokens",
        "whole_image_tokens",
        "cached_tokens",
        "generation_tokens",
        "finish_reason",
        "timings",
        "peak_memory",
    }
    assert set(answer["timings"]) == {"load", "preprocess", "encode", "prefill", "decode"}
    assert answer["text"] == expected(image=[PICTURE, PICTURE])
    assert (answer["image_tokens"], answer["generation_tokens"]) == (32, len(answer["tokens"]))
    assert answer["finish_reason"] in ("stop", "length")


def test_show_prompt_prints_what_the_model_reads(capsys):
    _, _, err = ask(capsys, "--image", str(PICTURE), "--show-prompt", "--quiet")
    assert err == "USER: <image x 16>\nWhat is this? ASSISTANT:\n"
    template = [
        "--template",
        "mistral_instruct",
        "--system",
        "Be brief.",
        "--image-position",
        "end",
    ]
    _, _, err = ask(capsys, "--image", str(PICTURE), "--show-prompt", "--quiet", *template)
    assert err == "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is this?\n<image x 16> [/INST]\n"
    raw = ["--raw", "--prompt", "a<image>b", "--show-prompt", "--quiet", "--image", str(PICTURE)]
    _, _, err = run(capsys, *raw)
    assert err == "a<image x 16>b\n"


def test_options_reach_the_model(capsys):
    _, out, _ = ask(capsys, "--quiet", "--image", str(PICTURE), "--image-mode", "pad")
    model, processor = load(MODEL, image_mode="pad")
    assert out == generate(model, processor, "What is this?", PICTURE, max_tokens=8) + "\n"
    sampled = ["--temp", "1", "--top-k", "20", "--seed", "4", "--repetition-penalty", "1.1"]
    _, out, _ = ask(capsys, "--quiet", *sampled)
    assert out == expected(image=None, temp=1, top_k=20, seed=4, repetition_penalty=1.1) + "\n"
    greedy = expected(image=None)
    _, out, _ = ask(capsys, "--quiet", "--stop", greedy[4:6])
    assert out == greedy[: greedy.index(greedy[4:6])] + "\n"
    parts = ["--dtype", "float16", "--vision-dtype", "float32", "--projector-dtype", "bfloat16"]
    code, _, _ = ask(capsys, *parts, "--vision-device", "cpu", "--image", str(PICTURE))
    assert code == 0


class Stdin(io.TextIOWrapper):
    """A stdin that holds these bytes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")


def test_prompt_or_image_from_stdin(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Stdin(b"What is this?\n"))
    _, out, _ = run(capsys, "--prompt", "-", "--max-tokens", "8", "--quiet")
    assert out == expected(image=None) + "\n"
    monkeypatch.setattr(sys, "stdin", Stdin(PICTURE.read_bytes()))
    _, out, _ = ask(capsys, "--image", "-", "--quiet")
    assert out == expected() + "\n"
    code, _, err = run(capsys, "--prompt", "-", "--image", "-")
    assert (code, err.startswith("error: Only one of --prompt")) == (2, True)


@pytest.fixture
def files(tmp_path) -> Path:
    (tmp_path / "text.jpg").write_text("no picture")
    jpeg = ROOT / "tests" / "goldens" / "picture.png"
    from PIL import Image

    Image.open(jpeg).convert("RGB").save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "bomb.png").write_bytes(png_header(20_000, 20_000))
    (tmp_path / "empty").mkdir()
    shutil.copytree(GOLDENS / "llava", tmp_path / "text_only")
    config = json.loads((tmp_path / "text_only" / "config.json").read_text())
    (tmp_path / "text_only" / "config.json").write_text(json.dumps(config["text_config"]))
    shutil.copytree(GOLDENS / "llava", tmp_path / "liar")
    config["vision_config"]["hidden_size"] = 48
    (tmp_path / "liar" / "config.json").write_text(json.dumps(config))
    return tmp_path


MISTAKES = {
    "missing image": (["--image", "none.png"], "There is no image none.png."),
    "text": (["--image", "text.jpg"], "text.jpg is not an image (JPEG, "),
    "truncated": (["--image", "cut.jpg"], "cut.jpg is a broken image"),
    "bomb": (["--image", "bomb.png"], "400,000,000 pixels"),
    "two marks": (
        ["--prompt", "<image> or <image>?", "--image", "whole.jpg"],
        "The prompt has 2 <image> marks but 1 images were given.",
    ),
    "no vision": (["--model", "text_only", "--image", "whole.jpg"], "model_type='llama'"),
    "template": (["--template", "nope"], "There is no template 'nope'; known: "),
    "no config": (["--model", "empty"], "empty has no config.json, and no GGUF pair."),
    "a file": (["--model", "whole.jpg"], "whole.jpg is no checkpoint"),
    "no folder": (["--model", "no/such/folder"], "There is no folder no/such/folder."),
    "lying config": (["--model", "liar"], "where config.json says (48"),
    "mode": (["--image-mode", "anyres"], "anyres needs a model of LLaVA 1.6 or OneVision"),
    "tokens": (["--max-tokens", "-3"], "max_tokens is -3"),
    "context": (["--prompt", "x " * 500], "the model's context is 777"),
    "gpu": (["--vision-device", "gpu"], "This MLX has no GPU"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(name, files, capsys, monkeypatch):
    import mlx.core as mx

    if name == "gpu" and mx.is_available(mx.gpu):
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(files)
    arguments, message = MISTAKES[name]
    code, out, err = ask(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("argument", ["caf\udce9", "--prompt=caf\udce9", "\ud800"])
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_arguments_that_are_no_text_are_one_line_in_every_command(name, argument, capsys):
    assert cli.main([name, "--prompt", argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: The argument ")
    assert error.count("\n") == 1


@pytest.mark.skipif(sys.platform == "darwin", reason="names of files are UTF-8 there")
def test_a_file_may_have_any_name(files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    Path("caf\udce9.jpg").write_bytes(Path("whole.jpg").read_bytes())
    for arguments in (["--image", "caf\udce9.jpg"], ["--image=caf\udce9.jpg"]):
        assert ask(capsys, *arguments)[0] == 0


def test_wrong_arguments_are_argparses(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--no-such-option"])
    assert capsys.readouterr().err == (
        "error: one of the arguments --prompt/-p --prompts-file is required "
        "(mlx_llava.generate --help lists all options)\n"
    )


def process(*arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_python_m_runs_it_without_warnings():
    for module in (["mlx_llava.generate"], ["mlx_llava", "generate"]):
        command = process(
            *module, "--model", MODEL, "--prompt", "What is this?", "-m", "8", "--quiet"
        )
        out, err = command.communicate(timeout=60)
        assert (command.returncode, out, err) == (0, expected(image=None) + "\n", "")


def open_when_read(fifo, seconds=60):
    """Opens a FIFO for writing as soon as another process reads it."""
    for _ in range(seconds * 20):
        with suppress(OSError):  # ENXIO: nobody reads it yet
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.05)
    raise TimeoutError(f"nobody has opened {fifo}")


@pytest.mark.skipif(os.name == "nt", reason="Windows has neither FIFOs nor SIGINT for others")
def test_control_c_ends_cleanly_with_130(tmp_path):
    os.mkfifo(tmp_path / "never.jsonl")  # its reader waits for data that never comes
    command = process(
        *["mlx_llava.generate", "--model", MODEL, "--quiet"],
        *["--prompts-file", str(tmp_path / "never.jsonl")],
        # What runs the tests in the background may have told them to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        writer = open_when_read(tmp_path / "never.jsonl")
        time.sleep(0.1)  # from opening to reading
        command.send_signal(signal.SIGINT)
        out, err = command.communicate(timeout=60)
        os.close(writer)
    finally:
        command.kill()
    assert (command.returncode, out, err) == (130, "", "\n")


#: As `python -m`, and as the two kinds of scripts that pip makes of entry points.
STARTS = {
    "module": ["-m", "mlx_llava.chat"],
    "package": ["-m", "mlx_llava", "chat"],
    "mlx_llava.chat": ["mlx_llava.chat"],
    "mlx-llava": ["mlx-llava", "chat"],
}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for others")
@pytest.mark.parametrize("start", STARTS)
def test_control_c_while_python_imports_ends_in_silence(start, tmp_path):
    name, *arguments = STARTS[start]
    if name != "-m":
        module, function = ("cli", "main") if arguments else ("chat", "main")
        script = f"import sys\nfrom mlx_llava.{module} import {function}\nsys.exit({function}())\n"
        (tmp_path / name).write_text(script)
        name = str(tmp_path / name)
    command = subprocess.Popen(
        [sys.executable, "-X", "importtime", name, *arguments, "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with command:
        try:
            next(line for line in command.stderr if line.endswith(" argparse\n"))
            command.send_signal(signal.SIGINT)
            out, err = command.communicate(timeout=60)
        finally:
            command.kill()
    assert (command.returncode, out) == (-signal.SIGINT, "")  # 130 in a shell
    assert all(line.startswith("import time:") for line in err.splitlines())


def test_others_that_import_the_package_keep_their_interrupts():
    code = "import signal, mlx_llava; print(signal.getsignal(signal.SIGINT).__name__)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert found.stdout == "default_int_handler\n"


def test_a_reader_that_leaves_is_no_error():
    command = process(
        *["mlx_llava.generate", "--model", MODEL, "--prompt", "hi", "-m", "400", "--quiet"]
    )
    command.stdout.close()
    assert command.stderr.read() == ""
    assert command.wait(timeout=60) == 0
    command.stderr.close()


def test_the_table_of_commands(capsys):
    assert cli.main(["--help"]) == 0
    assert "generate" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert cli.main([]) == 2
    assert "error" not in capsys.readouterr().err
    assert cli.main(["nonsense"]) == 2
    assert "no command 'nonsense'" in capsys.readouterr().err
    for name in cli.COMMANDS:
        assert importlib.import_module(f"mlx_llava.{name}").main
