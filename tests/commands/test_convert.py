"""Conversion: the same model in MLX's layout, whole or not at all, in little memory."""

from __future__ import annotations

import base64
import http.server
import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import mlx_llava
from mlx_llava import convert
from mlx_llava.checkpoint.convert import Quantization
from mlx_llava.checkpoint.hub import Source
from mlx_llava.checkpoint.open import open_checkpoint
from mlx_llava.checkpoint.verify import compare
from mlx_llava.folders import _write_manifest
from mlx_llava.fuse import main as fuse
from tests.conftest import GOLDENS, PICTURE, ROOT
from tests.conftest import load_as_stored as load

torch = pytest.importorskip("torch", reason="the oracle: pip install '.[test]'")
layouts = pytest.importorskip("tests.layouts")
tiny = pytest.importorskip("tests.tiny")

main = importlib.import_module("mlx_llava.convert").main


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """An original LLaVA v1.5, in .bin shards, and CLIP beside it."""
    folder = tmp_path_factory.mktemp("original")
    reference = tiny.make_model(layouts.case(), torch.float16)
    state = layouts.state_dict(reference)
    clip = layouts.write_clip(folder / "clip", state, reference)
    bare = {k: t for k, t in layouts.to_original(state).items() if "vision_tower" not in k}
    config = layouts.original_config(reference, mm_vision_tower=str(clip))
    return layouts.write_folder(folder / "llava-v1.5", bare, config, "zip", 3)


def arrays(model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def equal(ours, theirs) -> bool:
    ours, theirs = arrays(ours), arrays(theirs)
    return ours.keys() == theirs.keys() and all(mx.array_equal(ours[k], theirs[k]) for k in ours)


def test_the_result_is_the_source(original, tmp_path):
    plan = convert(original, tmp_path / "out")
    source, processor = load(original)
    result, other = load(tmp_path / "out")
    assert equal(result, source)
    assert result.config == source.config
    assert other.image_processor.mode == "pad"
    assert other.template.name == processor.template.name == "vicuna_v1"
    assert other("Q", PICTURE).prompts == processor("Q", PICTURE).prompts
    assert (other("Q", PICTURE).input_ids == processor("Q", PICTURE).input_ids).all()
    assert plan.contents.layout == "original LLaVA"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        ".mlx_llava.json",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_card_says_where_it_comes_from_and_under_which_licence(original, hub_cache, tmp_path):
    from huggingface_hub import ModelCard

    snapshot = hub_cache / "models--someone--llava" / "snapshots" / "abc"
    shutil.copytree(original, snapshot)
    (snapshot / "README.md").write_text("---\nlicense: llama2\nlanguage: en\n---\n# LLaVA\n")
    bits = Quantization(group_size=32)
    for source, target in ((snapshot, "q"), (tmp_path / "q", "again")):
        convert(source, tmp_path / target, quantization=bits if target == "q" else None)
        card = ModelCard.load(tmp_path / target / "README.md")
        found = card.data.to_dict()
        assert (found["license"], found["language"]) == ("llama2", "en")
        assert (found["base_model"], found["library_name"]) == ("someone/llava", "mlx")
        assert f"--model {target} --image" in card.text
        assert re.search(r"size: \d+\.\d MB", card.text)
        assert str(tmp_path) not in card.content
    (tmp_path / "q" / "README.md").write_text("---\n[: no YAML\n---\nmy notes")
    convert(tmp_path / "q", tmp_path / "other", name="me/llava")
    assert "--model me/llava --image" in (tmp_path / "other" / "README.md").read_text()


def test_transformers_reads_a_converted_original(original, tmp_path):
    hf = pytest.importorskip("transformers")
    convert(original, tmp_path / "out", dtype="float32")
    reference, report = hf.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    model, processor = load(tmp_path / "out")
    inputs = layouts.inputs_of(processor)
    ours = model(**inputs)[..., : layouts.VOCABULARY]
    theirs = mx.array(layouts.reference_logits(reference.float(), inputs).astype("float32"))
    assert mx.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_llava_hf_converts_to_itself(name, tmp_path):
    convert(GOLDENS / name, tmp_path / "out")
    assert equal(load(tmp_path / "out")[0], load(GOLDENS / name)[0])
    assert (tmp_path / "out" / "chat_template.jinja").exists()


MODES = [
    Quantization(),
    Quantization(bits=8, group_size=32),
    Quantization(bits=3),
    Quantization(mode="mxfp4"),
    Quantization(mode="nvfp4"),
    Quantization(mode="mxfp8"),
    Quantization(bits=4, recipe="mixed_4_6"),
    Quantization(bits=6, group_size=32, vision=True),
]


@pytest.mark.parametrize("quantization", MODES, ids=lambda q: f"{q.mode}-{q.bits}-{q.recipe}")
def test_quantising(original, quantization, tmp_path):
    plan = convert(original, tmp_path / "out", quantization=quantization)
    model, processor = load(tmp_path / "out")
    source, _ = load(original)
    layer = model.language_model.model.layers[1].self_attn.q_proj
    settings = quantization.settings()
    assert {k: getattr(layer, k) for k in ("bits", "group_size", "mode")} == settings
    weight = source.language_model.model.layers[1].self_attn.q_proj.weight
    expected = mx.quantize(weight, **settings)
    parts = [layer[part] for part in ("weight", "scales", "biases") if part in layer]
    assert len(parts) == len(expected)
    assert all(mx.array_equal(a, b) for a, b in zip(parts, expected, strict=True))
    has_scales = "scales" in model.vision_tower.vision_model.encoder.layers[0].mlp.fc1
    assert has_scales == quantization.vision
    head = model.language_model.lm_head
    assert head.bits == (6 if quantization.recipe else settings["bits"])
    assert mx.isfinite(model(**processor("Q", PICTURE))).all()
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert 0 <= size - plan.nbytes < 100_000


def test_dequantising_gives_the_logits_of_the_codes(original, tmp_path):
    convert(original, tmp_path / "q", quantization=Quantization(bits=4, group_size=32))
    convert(tmp_path / "q", tmp_path / "plain", dequantize=True)
    quantised, processor = load(tmp_path / "q", dtype="float32")
    plain, _ = load(tmp_path / "plain", dtype="float32")
    assert plain.config.quantization is None
    inputs = processor("Q", PICTURE)
    difference = mx.abs(plain(**inputs) - quantised(**inputs)).max()
    assert difference < 2e-2 * mx.abs(plain(**inputs)).max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4", "mxfp8"])
def test_every_mode_computes_in_the_checkpoints_dtype(original, mode, dtype, tmp_path):
    """In the mx modes scales are codes too, which say nothing of the dtype."""
    codes = Quantization(mode=mode, vision=True)
    convert(original, tmp_path / "q", quantization=codes, dtype=dtype)
    on_cpu, processor = mlx_llava.load(tmp_path / "q")
    inputs = processor("Q", PICTURE)
    expected = on_cpu(**inputs)
    scales = (".scales", ".biases")  # are read as they are, as codes are
    dtypes = {a.dtype for name, a in arrays(on_cpu).items() if not name.endswith(scales)}
    assert dtypes <= {mx.float32, mx.uint32}
    logits = load(tmp_path / "q")[0](**inputs)
    assert (logits.dtype, expected.dtype) == (getattr(mx, dtype), mx.float32)
    bound = 1e-5 if dtype == "float32" else 0.2
    assert mx.abs(logits - expected).mean() < bound * mx.abs(expected).mean()


def test_settings_of_single_layers_count_under_any_spelling(original, tmp_path):
    """Other programs may name a layer as another version of transformers does."""
    mixed = Quantization(bits=4, group_size=32, recipe="mixed_4_6")
    convert(original, tmp_path / "q", quantization=mixed)
    path = tmp_path / "q" / "config.json"
    config = json.loads(path.read_text())
    quantization = config["quantization"]
    config["quantization"] = {
        key.replace("language_model.model.", "model.language_model."): value
        for key, value in quantization.items()
    }
    assert config["quantization"] != quantization
    path.write_text(json.dumps(config))
    convert(tmp_path / "q", tmp_path / "plain", dequantize=True)
    quantised, processor = load(tmp_path / "q", dtype="float32")
    plain, _ = load(tmp_path / "plain", dtype="float32")
    assert quantised.config.quantization == quantization
    inputs = processor("Q", PICTURE)
    difference = mx.abs(plain(**inputs) - quantised(**inputs)).max()
    assert difference < 2e-2 * mx.abs(plain(**inputs)).max()


def test_a_dry_run_ends_in_one_line_too(tmp_path, capsys):
    shutil.copytree(GOLDENS / "llava", tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    config["text_config"] = 7
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    assert main(["--model", str(tmp_path / "odd"), "--dry-run"]) == 2
    assert "a value of the wrong kind" in capsys.readouterr().err


def test_act_order_survives_conversion_and_dequantising(tmp_path):
    from tests.checkpoint.test_gptq import quantised_model

    reference, tensors = quantised_model("act-order", 4, original=True)
    config = layouts.original_config(reference)
    folder = layouts.write_folder(tmp_path / "gptq", tensors, config, "safetensors")
    (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 32}')
    convert(folder, tmp_path / "out")
    convert(folder, tmp_path / "plain", dequantize=True)
    model, processor = load(folder)
    same, _ = load(tmp_path / "out")
    plain, _ = load(tmp_path / "plain")
    assert equal(model, same)
    inputs = processor("Q", PICTURE)
    logits = model(**inputs)
    assert mx.array_equal(same(**inputs), logits)
    assert plain.config.text_config.vocab_size > logits.shape[-1]  # with a row for <image>
    dequantised = plain(**inputs)[..., : logits.shape[-1]]
    assert mx.abs(dequantised - logits).max() < 1e-4 * mx.abs(logits).max()


def test_dry_run_prints_the_plan_and_writes_nothing(original, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--model", str(original), "-q", "--dry-run"]) == 0
    plan = capsys.readouterr().out.splitlines()
    assert plan[0] == "layout: original LLaVA"
    target = "embed_tokens.weight -> language_model.model.embed_tokens.scales float16 [384, 1]"
    assert sum(line.endswith(target) for line in plan) == 1
    assert plan[-1] == f"{len(plan) - 2} tensors, 1.1 MB"
    assert not list(tmp_path.iterdir())


def test_verify_compares_with_the_source(original, tmp_path, capsys):
    out = str(tmp_path / "out")
    arguments = ["--model", str(original), "--mlx-path", out, "--verify"]
    assert main(arguments) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "max_difference 0  top_1 1  kl 0"
    assert main([*arguments, "-q", "--q-bits", "8", "--force"]) == 0
    words = capsys.readouterr().err.splitlines()[-1].split()
    assert float(words[1]) > 0
    assert 0 <= float(words[3]) <= 1
    assert 0 < float(words[5]) < 1


def test_compare_notices_a_difference(original):
    source = load(original)
    other = load(original)
    assert compare(source, other) == {"max_difference": 0, "top_1": 1, "kl": 0}
    head = other[0].language_model.lm_head
    head.weight = head.weight[::-1]
    measured = compare(source, other)
    assert measured["top_1"] < 0.5
    assert measured["kl"] > 0.1


def test_existing_output_is_kept_unless_forced(original, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    arguments = ["--model", str(original), "--mlx-path", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "exists already; --force replaces it" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine.txt").exists()
    assert main([*arguments, "--force"]) == 2
    assert "out holds mine.txt, not written by mlx_llava" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    (tmp_path / "out" / "mine.txt").unlink()
    assert main([*arguments, "--force"]) == 0
    assert load(tmp_path / "out")


def test_the_source_and_its_parts_are_never_replaced(original, tmp_path, capsys, monkeypatch):
    source = tmp_path / "source"
    convert(original, source)
    (tmp_path / "link").symlink_to(source)
    names = ["source", "link", "source/../source", str(tmp_path), "link/."]
    monkeypatch.chdir(tmp_path)
    for name in names:
        assert main(["--model", str(source), "--mlx-path", name, "--force"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    assert equal(load(source)[0], load(original)[0])


def test_parts_that_only_the_config_names_are_known(original):
    assert open_checkpoint(Source(original)).contents.read_from == [
        original,
        original.parent / "clip",
    ]


def test_what_an_adapter_is_put_on_is_never_replaced(tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(GOLDENS / "llava", base)
    assert fuse(["--model", str(base), "--adapter-path", "a", "--output", str(base), "--force"])
    assert "which is read" in capsys.readouterr().err
    assert equal(load(base)[0], load(GOLDENS / "llava")[0])


@pytest.mark.parametrize("part", ["clip", "llava-v1.5"])
@pytest.mark.parametrize("command", [main, fuse])
def test_a_tower_that_the_config_names_is_never_replaced(original, part, command, tmp_path, capsys):
    target = original.parent / part
    _write_manifest(target, "model")  # as if all of it were ours
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    arguments = ["--model", str(original), "--force"]
    if command is main:
        arguments += ["--mlx-path", str(target)]
    else:
        arguments += ["--output", str(target), "--adapter-path", str(tmp_path)]
    assert command(arguments) == 2
    assert "which is read" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before


def test_a_full_disk_is_noticed_before_anything_is_written(original, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert main(["--model", str(original), "--mlx-path", str(tmp_path / "out")]) == 2
    assert "0.0 MB free; the result takes 1.3 MB." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--q-bits", "4"], "need -q"),
        (["-q", "--q-group-size", "1024"], "No layer can be quantised in groups of 1024"),
        (["-q", "--q-bits", "0"], "q_bits is 0; it must be at least 1 and at most 8."),
        (["-q", "--q-group-size", "0"], "q_group_size is 0; it must be at least 1."),
        (["-q", "--q-bits", "9" * 23], "it must be at least 1 and at most 8."),
        (["--model", "nowhere/at/all"], "There is no folder"),
    ],
)
def test_mistakes_are_one_line(original, tmp_path, capsys, arguments, message):
    target = ["--mlx-path", str(tmp_path / "out")]
    assert main(["--model", str(original), *target, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--model", "--mlx-path", "--upload-repo"])
def test_an_empty_name_is_no_name(flag, original, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["--model", str(original), flag, ""])
    expected = f"{flag}(/--hf-path)?: it is empty, expected a name"
    assert re.search(expected, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


#: Converts when it is told how long, and kills that then.
KILLED = """
import os, signal, sys, time
import mlx_llava
from mlx_llava.checkpoint import safetensors
from mlx_llava.checkpoint.convert import convert
write = safetensors._write_file
def slowly(path, outputs, metadata, progress):  # so that some kills hit the writing
    write(path, outputs, metadata, lambda n: (progress(n), time.sleep(0.005)))
safetensors._write_file = slowly
for line in sys.stdin:
    child = os.fork()
    if not child:
        convert(*sys.argv[1:], force=True)
        os._exit(0)
    time.sleep(float(line))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(flush=True)
"""


def test_a_kill_leaves_nothing_or_a_whole_folder(original, tmp_path):
    """Killed at 12 random moments."""
    rng = random.Random(0)
    outcomes = []
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, original, tmp_path / "out"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        for _ in range(12):
            print(rng.uniform(0, 0.8), file=process.stdin, flush=True)
            assert process.stdout.readline() == "\n"
            whole = (tmp_path / "out").exists()
            outcomes.append(whole)
            if whole:
                assert equal(load(tmp_path / "out")[0], load(original)[0])
                shutil.rmtree(tmp_path / "out")
            for path in tmp_path.iterdir():
                assert path.name == ".out.partial"
                with suppress(FileNotFoundError, ValueError):
                    assert equal(load(path)[0], load(original)[0])
        process.stdin.close()
    assert False in outcomes
    convert(original, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_memory_does_not_grow_with_the_checkpoint(original, tmp_path):
    """Tensors are read, written and let go of one at a time."""
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    plan = convert(original, tmp_path / "out")
    largest = max(item.nbytes for item in plan.outputs)
    assert mx.get_peak_memory() - before < 6 * largest
    assert plan.nbytes > 10 * largest


def test_the_script_is_the_command():
    done = subprocess.run(
        [sys.executable, "scripts/convert_weights.py", "--help"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "usage: mlx_llava.convert" in done.stdout


def test_the_result_answers(original, tmp_path, capsys):
    convert(original, tmp_path / "out", quantization=Quantization())
    ask = importlib.import_module("mlx_llava.generate").main
    arguments = ["--image", str(PICTURE), "--prompt", "What?", "--max-tokens", "3", "--json"]
    assert ask(["--model", str(tmp_path / "out"), *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["image_tokens"] == 16


class Hub(http.server.BaseHTTPRequestHandler):
    """The calls of the hub's API with which a folder of small files is uploaded."""

    commits: ClassVar[list[dict]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            answer = {"url": "https://huggingface.co/someone/tiny", "name": "someone/tiny"}
        elif self.path.startswith("/api/models/someone/tiny/preupload/"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": path, **modes} for path in paths]}
        elif self.path == "/api/validate-yaml":
            answer = {"warnings": [], "errors": []}
        else:
            assert self.path.startswith("/api/models/someone/tiny/commit/")
            lines = [json.loads(line) for line in body.splitlines()]
            self.commits.extend(line["value"] for line in lines if line["key"] == "file")
            answer = {
                "commitUrl": "https://huggingface.co/someone/tiny/commit/1",
                "commitOid": "1" * 40,
                "pullRequestUrl": None,
            }
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


def upload(tmp_path: Path, endpoint: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_test"}
    environment["HF_HOME"] = str(tmp_path / "home")
    arguments = ["--model", str(GOLDENS / "llava"), "--mlx-path", str(tmp_path / "out")]
    return subprocess.run(
        [sys.executable, "-m", "mlx_llava.convert", *arguments, "--upload-repo", "someone/tiny"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_result_is_uploaded_whole(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = upload(tmp_path, f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert done.returncode == 0, done.stderr
    uploaded = {file["path"]: base64.b64decode(file["content"]) for file in Hub.commits}
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("[!.]*")}
    assert uploaded == written


def test_a_failed_upload_is_one_line_and_keeps_the_result(tmp_path):
    done = upload(tmp_path, "http://127.0.0.1:9")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2
    assert last.startswith(f"error: {tmp_path / 'out'} is complete, but its upload failed: ")
    assert load(tmp_path / "out")
