"""The tools for agents, called by MCP's own client over stdio, against `generate`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial

import anyio
import pytest
from anyio.from_thread import start_blocking_portal
from mcp import MCPError
from mcp.client.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client

from mlx_llava import generate
from mlx_llava.generation.sampling import Options
from mlx_llava.inputs.image import data_url
from mlx_llava.mcp import build_parser, main
from mlx_llava.server import start_engine
from mlx_llava.serving.mcp import TOOLS, Eyes, make_server
from mlx_llava.serving.settings import Settings
from tests.conftest import ROOT, SHAPES
from tests.inputs.test_image import png_header
from tests.servers import endless_schema, waits_until

QUESTION = "What colour is the square?"
#: What a client starts; PYTHONPATH, since clients hand over only a few variables.
ENVIRONMENT = {"PYTHONPATH": str(ROOT)}
COMMAND = [sys.executable, "-m", "mlx_llava.mcp"]
#: How clients of the protocol's earlier versions begin.
START = {
    "protocolVersion": "2025-06-18",
    "capabilities": {},
    "clientInfo": {"name": "test", "version": "1"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of pictures, and beside it what nobody may see."""
    place = tmp_path_factory.mktemp("agents")
    (root := place / "pictures").mkdir()
    (root / "2024").mkdir()
    for copy in ("shapes.png", "2024/été \u202f1.png", "a$(b);'c\".png"):
        shutil.copy(SHAPES, root / copy)
    for outside in (place / "secret.png", place / "pictures.png"):
        shutil.copy(SHAPES, outside)
    (root / "link.png").symlink_to(place / "secret.png")
    (root / "up").symlink_to(place)
    os.mkfifo(root / "pipe.png")
    (root / "huge.png").write_bytes(png_header(30_000, 30_000))
    (root / "text.png").write_text("no picture")
    return root


@pytest.fixture(scope="module")
def called(root):
    """Calls a tool of one process that has been started once; gives texts and whether it failed."""
    arguments = [*COMMAND[1:], "--image-root", str(root), "--max-body", "1"]
    parameters = StdioServerParameters(command=COMMAND[0], args=arguments, env=ENVIRONMENT)
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(Client(stdio_client(parameters))) as client,
    ):

        def call(tool: str, report=None, **arguments) -> tuple[str, bool]:
            calling = partial(client.call_tool, tool, arguments, progress_callback=report)
            result = portal.call(calling)
            (content,) = result.content
            return content.text, result.is_error

        call.client = client
        call.portal = portal
        yield call


def test_the_first_call_loads_the_model_and_tells_its_progress(called):
    told = []

    async def report(progress, total, message):
        told.append((progress, message))

    text, failed = called("look", report, image="shapes.png", question=QUESTION)
    assert (text, failed) == ("orange", False)
    steps, messages = zip(*told, strict=True)
    assert [*steps] == sorted({*steps})
    assert messages[:3] == ("loading the model", "reading the picture", "answering")


def test_answers_are_those_of_generate(called, tiny):
    for question in (QUESTION, "What is in this picture?"):
        said = called("look", image="2024/été \u202f1.png", question=question)
        assert said == (generate(*tiny, question, SHAPES), False)
    for name in ("describe", "read_text"):
        said = called(name, image=data_url(SHAPES.read_bytes()))
        assert said == (generate(*tiny, TOOLS[name].question, SHAPES), False)


def test_the_agent_is_told_what_there_is(called, root):
    tools = called.portal.call(called.client.list_tools).tools
    assert [tool.name for tool in tools] == ["look", "describe", "read_text"]
    assert [tool.input_schema["required"] for tool in tools] == [
        ["image", "question"],
        ["image"],
        ["image"],
    ]
    assert str(root) in called.client.instructions


@pytest.mark.parametrize("name", ["a$(b);'c\".png", "./2024/../shapes.png", "{root}/shapes.png"])
def test_odd_and_whole_paths(called, root, name):
    text, failed = called("describe", image=name.format(root=root))
    assert failed == (".." in name), text


REFUSED = {
    "above": ("../secret.png", "not in the image root"),
    "above, later": ("2024/../../secret.png", "not in the image root"),
    "whole path": ("{root}/../secret.png", "not in the image root"),
    "of a longer name": ("{root}.png", "not in the image root"),
    "of the system": ("/etc/hostname", "not in the image root"),
    "URL of a file": ("file:///etc/hostname", "not in the image root"),
    "quoted URL": ("file://{root}/%2e%2e/secret.png", "not in the image root"),
    "NUL": ("shapes.png\0.jpg", "not in the image root"),
    "home": ("~/shapes.png", "no such file"),
    "link": ("link.png", "no such file"),
    "link of a folder": ("up/secret.png", "no such file"),
    "pipe": ("pipe.png", "no such file"),
    "folder": ("2024", "no such file"),
    "the root": (".", "not in the image root"),
    "nothing": ("", "not in the image root"),
    "long name": ("x" * 5000, "no such file"),
    "other URL": ("ftp://127.0.0.1/x.png", "must be a data: or an http(s) URL"),
    "elsewhere": ("http://127.0.0.1/x.png", "not allowed here"),
    "many pixels": ("huge.png", "900,000,000 pixels"),
    "no picture": ("text.png", "not an image"),
    "no base64": ("data:image/png;base64,!!!", "not valid base64"),
    "long": ("data:image/png;base64," + "A" * 1_100_000, "the limit is 1,000,000"),
}


@pytest.mark.parametrize(("image", "why"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_picture_of_the_folder_is_refused_in_one_line(called, root, image, why):
    text, failed = called("look", image=image.format(root=root), question=QUESTION)
    assert failed
    assert why in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "arguments",
    [{}, {"image": "shapes.png"}, {"image": ["shapes.png"], "question": QUESTION}]
    + [{"image": "shapes.png", "question": None}]
    + [{"image": "shapes.png", "question": QUESTION, "model": other} for other in ("/etc", 3)],
)
def test_other_arguments_are_refused(called, arguments):
    text, failed = called("look", **arguments)
    assert failed
    assert text.startswith("It takes image and question, as text; found {")


def test_a_question_longer_than_the_context_is_refused(called):
    questions = {"x" * 3_000_000: "3,000,000 characters", "a b " * 1000: "2044 tokens"}
    for question, length in questions.items():
        text, failed = called("look", image="shapes.png", question=question)
        assert failed
        assert length in text


def test_an_unknown_tool_is_an_error_of_the_protocol(called):
    with pytest.raises(
        MCPError, match=r"There is no tool 'rm'; known: look, describe, read_text\."
    ):
        called("rm", image="shapes.png")


def started(command: list[str]) -> subprocess.Popen:
    """A process without a client."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, **pipes)


def test_nothing_but_the_protocol_is_on_stdout(root):
    """Whatever is printed, whatever comes, and however it ends."""
    noisy = (
        "import os, sys, mlx_llava.mcp as mcp\n"
        "load = mcp.start_engine\n"
        "mcp.start_engine = lambda args: (print('noise'), os.write(1, b'noise'), load(args))[2]\n"
        "sys.exit(mcp.main(sys.argv[1:]))"
    )
    call = {"name": "look", "arguments": {"image": "shapes.png", "question": QUESTION}}
    broken = [b"{", b"\xff\xfe", b"", b"[]", b"null", b'{"jsonrpc": "2.0", "id": 9}']
    broken += [
        b'{"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "\\ud800"}}'
    ]
    broken += [b'{"jsonrpc": "2.0", "id": 8, "method": "tools/call", "params": [1]}', b"[" * 99_999]
    lines = [_request("initialize", 1, START), *broken, _request("tools/call", 2, call)]
    with started([sys.executable, "-c", noisy, "--image-root", str(root)]) as process:
        process.stdin.write(b"\n".join(lines) + b"\n")
        process.stdin.flush()
        answers = {}
        while 2 not in answers:
            answer = json.loads(process.stdout.readline())
            answers[answer.get("id")] = answer
        process.stdin.close()
        assert process.stdout.read() == b""
    assert process.returncode == 0
    (content,) = answers[2]["result"]["content"]
    assert content["text"] == "orange"


def test_control_c_ends_it():
    command = [*COMMAND, "--model", "/none"]  # which it does not look at before it is asked
    with started(command) as process:
        process.stdin.write(_request("initialize", 1, START) + b"\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["result"]["serverInfo"]["name"] == "mlx_llava"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == -signal.SIGINT


def test_a_client_that_is_gone_ends_it_without_a_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        COMMAND,
        input=_request("initialize", 1, START) + b"\n",
        stdout=writing,
        stderr=subprocess.PIPE,
        env={**os.environ, **ENVIRONMENT},
        check=True,
    )
    os.close(writing)
    assert b"Traceback" not in ended.stderr


def _request(method: str, number: int, params) -> bytes:
    request = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
    return json.dumps(request).encode()


@pytest.fixture(scope="module")
def engine():
    args = build_parser().parse_args([])
    engine = start_engine(args)
    yield engine
    engine.close()


def looking(load, options: Options, **settings):
    """A client in this process of tools that load their model so."""
    eyes = Eyes(load, Settings(image_root=str(SHAPES.parent), **settings), options)
    return Client(make_server(eyes, ""))


CALL = {"image": SHAPES.name, "question": QUESTION}


def test_a_call_that_is_cancelled_stops_the_model(engine):
    async def cancel() -> None:
        endless = Options(json_schema=endless_schema(), max_tokens=100_000)
        async with looking(lambda: engine, endless) as client:
            with anyio.CancelScope() as scope:

                async def report(progress, total, message) -> None:
                    if message == "answering":
                        assert engine.running == 1
                        scope.cancel()

                await client.call_tool("look", CALL, progress_callback=report)
            assert scope.cancelled_caught
            assert await anyio.to_thread.run_sync(
                waits_until, lambda: not engine.running and not engine.taken
            )
            # And who asks next is answered.
            assert (await client.call_tool("look", {"image": "../", "question": ""})).is_error

    anyio.run(cancel)


def test_calls_that_come_while_the_model_loads_wait_for_it(engine):
    loads = []

    async def ask() -> None:
        async with looking(lambda: loads.append(1) or engine, Options()) as client:
            said = []

            async def call() -> None:
                said.append((await client.call_tool("look", CALL)).content[0].text)

            async with anyio.create_task_group() as calls:
                for _ in range(3):
                    calls.start_soon(call)
            assert said == ["orange"] * 3

    anyio.run(ask)
    assert loads == [1]


def test_who_goes_while_the_model_loads_does_not_stop_that(engine):
    loads, may_end = [], threading.Event()

    def load():
        loads.append(1)
        may_end.wait(60)
        return engine

    async def ask() -> None:
        async with looking(load, Options()) as client:
            with anyio.CancelScope() as scope:

                async def report(progress, total, message) -> None:
                    scope.cancel()

                await client.call_tool("look", CALL, progress_callback=report)
            assert scope.cancelled_caught
            may_end.set()
            assert (await client.call_tool("look", CALL)).content[0].text == "orange"

    anyio.run(ask)
    assert loads == [1]


def test_a_model_that_cannot_be_loaded_is_tried_again(engine):
    outcomes = [FileNotFoundError("There is no folder nope."), ValueError("a\nb"), engine]

    def load():
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def ask() -> None:
        async with looking(load, Options()) as client:
            results = [await client.call_tool("look", CALL) for _ in range(3)]
        said = [(result.content[0].text, result.is_error) for result in results]
        assert said == [("There is no folder nope.", True), ("a b", True), ("orange", False)]

    anyio.run(ask)


def test_an_answer_that_takes_too_long_is_refused(engine):
    async def ask() -> None:
        endless = Options(json_schema=endless_schema(), max_tokens=100_000)
        async with looking(lambda: engine, endless, timeout=0.05) as client:
            result = await client.call_tool("look", CALL)
        assert result.content[0].text == "The answer took more than 0.05 s."

    anyio.run(ask)


def test_a_model_that_is_not_kept_alive_is_loaded_again(engine):
    async def ask() -> None:
        async with looking(lambda: engine, Options(), keep_alive="0") as client:
            for _ in range(2):
                assert (await client.call_tool("look", CALL)).content[0].text == "orange"
                gone = waits_until, lambda: not engine.is_loaded
                assert await anyio.to_thread.run_sync(*gone)

    anyio.run(ask)


def test_wrong_options_end_the_command_in_one_line(capsys, tmp_path):
    assert main(["--image-root", str(tmp_path / "none")]) == 2
    assert (
        capsys.readouterr().err == f"error: --image-root is {tmp_path}/none, which is no folder.\n"
    )
