"""What goes onto a Mac, as far as that can be checked elsewhere."""

from __future__ import annotations

import importlib
import json
import os
import plistlib
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import llm.cli
import pytest
from click.testing import CliRunner

from mlx_llava import generate, load
from mlx_llava.arguments import given_options
from mlx_llava.serving.settings import Settings
from tests.conftest import ROOT, SHAPES
from tests.test_docs import blocks

PACKAGING = ROOT / "packaging"
SCRIPT = PACKAGING / "describe-image.sh"
WORKFLOW = PACKAGING / "Describe image.workflow" / "Contents"
AGENT = plistlib.loads((PACKAGING / "mlx-llava.server.plist").read_bytes())
TOOLS = ROOT / "docs" / "tools.md"


def read_command(words: list[str]):
    """The arguments of `mlx-llava COMMAND ...`, read as that command does."""
    command, *arguments = words
    return importlib.import_module(f"mlx_llava.{command}").build_parser().parse_args(arguments)


def test_the_workflow_hands_pictures_of_the_finder_to_the_script():
    (service,) = plistlib.loads((WORKFLOW / "Info.plist").read_bytes())["NSServices"]
    assert service["NSMenuItem"] == {"default": WORKFLOW.parent.stem}
    assert service["NSMessage"] == "runWorkflowAsService"
    assert service["NSSendFileTypes"] == ["public.image"]
    document = plistlib.loads((WORKFLOW / "document.wflow").read_bytes())
    meta = document["workflowMetaData"]
    assert meta["workflowTypeIdentifier"] == "com.apple.Automator.servicesMenu"
    assert meta["serviceInputTypeIdentifier"] == "com.apple.Automator.fileSystemObject.image"
    (action,) = document["actions"]
    parameters = action["action"]["ActionParameters"]
    as_arguments = 1
    assert (parameters["inputMethod"], parameters["shell"]) == (as_arguments, "/bin/sh")
    assert parameters["COMMAND_STRING"] == SCRIPT.read_text(encoding="utf-8")


def test_the_agent_starts_the_server(tmp_path):
    assert AGENT["Label"] == "mlx-llava.server"
    shell, option, line = AGENT["ProgramArguments"]
    assert (shell, option) == ("/bin/sh", "-c")
    program = tmp_path / ".local" / "bin" / "mlx-llava"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"')
    program.chmod(0o755)
    (tmp_path / "Library" / "Logs").mkdir(parents=True)
    subprocess.run([shell, option, line], env={"HOME": str(tmp_path)}, check=True)
    log = tmp_path / "Library" / "Logs" / "mlx-llava.log"
    args = read_command(log.read_text().splitlines())
    assert args.model == "mlx-community/llava-1.5-7b-4bit"
    assert Settings(**given_options(args, fields(Settings))).alias == ["llava"]


def scripts() -> dict[str, str]:
    """All that a shell is to run."""
    found = {
        f"block {number}": re.sub("^ +", "", block, flags=re.MULTILINE)
        for number, block in enumerate(indented_blocks(PACKAGING / "README.md"))
    }
    return {"script": SCRIPT.read_text("utf-8"), "agent": AGENT["ProgramArguments"][2], **found}


def indented_blocks(page: Path) -> list[str]:
    return re.findall(r"^ *```sh\n(.*?)^ *```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", scripts())
def test_scripts_are_sound(name):
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("there is no shellcheck: pip install '.[test]'")
    done = subprocess.run(
        [checker, "--shell", "sh", "-"], input=scripts()[name], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_commands_of_the_page_are_read():
    lines = "\n".join(scripts().values()).replace("\\\n", " ").splitlines()
    lines += [line for block in blocks(TOOLS, "sh") for line in block.splitlines()]
    commands = [
        line.partition("mlx-llava")[2] for line in lines if re.search('mlx-llava"? g', line)
    ]
    assert len(commands) == 3
    for command in commands:
        words = shlex.split(command.removeprefix('"').partition(" 2>")[0])
        assert read_command(words).prompt


@pytest.fixture
def home(hub_cache, tmp_path):
    """A home in which the embedded model stands for the one that the script names."""
    name = re.search("^model=(.*?) ", SCRIPT.read_text("utf-8"), re.MULTILINE)[1]
    folder = hub_cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(ROOT / "weights" / "tiny-llava", folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    programs = tmp_path / ".local" / "bin"
    programs.mkdir(parents=True)
    for program, line in {
        "mlx-llava": f'exec "{sys.executable}" -m mlx_llava "$@"',
        "osascript": 'cat >/dev/null; shift; printf "%s|" "$@"',
    }.items():
        (programs / program).write_text(f"#!/bin/sh\n{line}\n")
        (programs / program).chmod(0o755)
    return tmp_path


def test_the_script_shows_each_picture_s_words_or_what_is_wrong(hub_cache, home):
    """With a stand-in for osascript, which shows what it is told; and odd names."""
    names = ["a b;$(touch oops)'\".png", "none.png"]
    shutil.copy(SHAPES, home / names[0])
    environment = {**os.environ, "HOME": str(home), "HF_HUB_CACHE": str(hub_cache)}
    done = subprocess.run(
        [SCRIPT, *(str(home / name) for name in names)],
        env={**environment, "PYTHONPATH": str(ROOT)},
        cwd=home,
        capture_output=True,
        text=True,
    )
    words = generate(*load(), "Describe this image in detail.", SHAPES)
    missing = f"error: There is no image {home}/none.png."
    assert done.stdout == "|".join([names[0], words, names[1], missing, ""]), done.stderr
    assert not (home / "oops").exists()


def test_the_formula_has_one_place_for_the_archive():
    formula = (PACKAGING / "mlx-llava.rb").read_text("utf-8")
    for mark in ("@URL@", "@SHA256@"):
        assert formula.count(mark) == 1
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    for page in (formula, (PACKAGING / "README.md").read_text("utf-8"), TOOLS.read_text("utf-8")):
        for extras in re.findall(r"[.}]\[([a-z,]+)\]", page):
            assert all(f"\n{extra} = [" in pyproject for extra in extras.split(",")), extras
    if ruby := shutil.which("ruby"):
        subprocess.run([ruby, "-c", PACKAGING / "mlx-llava.rb"], check=True, capture_output=True)


def test_configurations_of_mcp_s_clients_start_the_command():
    servers = [
        server
        for block in blocks(TOOLS, "json")
        for entries in json.loads(block).values()
        for server in entries.values()
    ]
    assert len(servers) == 2
    for server in servers:
        assert Path(server["command"]).name == "mlx-llava"
        assert server["args"][0] == "mcp"
        assert read_command(server["args"]).image_root


def test_llm_answers_as_its_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    (block,) = blocks(TOOLS, "sh")
    said = []
    for line in re.sub(r"\\\n", " ", block).replace("\n  ", " ").splitlines():
        program, *arguments = shlex.split(line)
        result = CliRunner().invoke(llm.cli.cli, arguments)
        assert (program, result.exit_code) == ("llm", 0), result.output
        said.append(result.stdout)
    answer = generate(*load(), "What is in this picture?", SHAPES)
    assert said[:2] == [f"{answer}\n", "orange\n"]
    assert json.loads(said[3]) == {"colour": "red"}
