"""The pages of docs/: their code runs, their links lead somewhere, what is generated is current."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from filelock import FileLock

import mlx_llava
from mlx_llava.cli import COMMANDS
from mlx_llava.inputs.templates import TEMPLATES
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import draw_diagrams
from served import served

DOCS = ROOT / "docs"
PAGES = sorted(
    [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    + [ROOT / "weights" / "tiny-llava" / "README.md", ROOT / "packaging" / "README.md"]
)
#: Flags of other programs that the pages name.
FOREIGN = {
    *("--no-git", "--options", "--quiet", "--repository", "--schema", "--sdist", "--silent"),
    *(
        "--backend",
        "--env",
        "--from",
        "--hostfile",
        "--hosts",
        "--output-hostfile",
        "--over",
        "--to",
    ),
}


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What headings are called in links, as GitHub does it."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures, those of HTML too."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in links(page):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_template_is_listed():
    rows = re.findall(r"^\| (`.*) \|", (DOCS / "prompts.md").read_text(), re.MULTILINE)
    assert TEMPLATES.keys() <= set(re.findall(r"`([^`]*)`", " ".join(rows)))


def test_every_page_is_in_the_index():
    index = links(DOCS / "README.md")
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert pages - {"README.md"} <= {*index}
    assert {f"../notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")} <= {
        *index
    }


@pytest.mark.parametrize("page", ["how-it-works", "prompts"])
def test_python_blocks_run(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    names: dict = {}
    for block in blocks(DOCS / f"{page}.md", "python"):
        exec(block, names)
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", ["how-it-works", "prompts"])
def test_commands_run(page, tmp_path):
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    (command,) = blocks(DOCS / f"{page}.md", "sh")
    done = subprocess.run(
        ["sh", "-e", "-c", command.replace("python ", f"{sys.executable} ")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if "report.html" in command:
        assert (tmp_path / "report.html").stat().st_size > 50_000
    else:
        assert "A chat between a curious user" in done.stderr


def test_the_commands_about_captions_run(tmp_path, monkeypatch, capsys):
    examples = ROOT / "weights" / "tiny-llava" / "examples"
    shutil.copytree(examples, tmp_path / "photos" / "2024")
    shutil.copy(examples / "shapes.png", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    (commands,) = blocks(DOCS / "captions.md", "sh")
    before = {path: path.read_bytes() for path in Path("photos").rglob("*.*")}
    for command in map(shlex.split, commands.splitlines()):
        assert command[:3] == ["python", "-m", "mlx_llava.caption"]
        assert importlib.import_module("mlx_llava.caption").main(command[3:]) == 0
    assert "3 files have their old names again" in capsys.readouterr().err
    assert before.items() <= {path: path.read_bytes() for path in before}.items()


def test_the_servers_page_is_true(monkeypatch, capsys):
    """The server as the page starts it, on a free port, and all that the page asks of it."""
    page = DOCS / "server.md"
    start, _, curl, generate, as_ollama, asks_ollama = blocks(page, "sh")
    monkeypatch.chdir(ROOT)
    assert start.split() == "python -m mlx_llava.server".split() == as_ollama.split()[:3]
    with served(*as_ollama.split()[3:]) as server:
        names: dict = {}
        for block in blocks(page, "python"):
            code = block.replace("http://127.0.0.1:8080", server.url)
            exec(compile(code, str(page), "exec", dont_inherit=True), names)
        names["client"].close()
        answer = "A small black star, a large red triangle and a large orange square."
        said = (
            f"{answer}\n{answer}red\n" + '{"colour": "red"}\nred\nblack\n' + f"{answer}\n{answer}"
        )
        assert capsys.readouterr().out == said
        if shutil.which("curl"):
            said = shell(curl.replace("http://127.0.0.1:8080", server.url))
            assert f'"content":"{answer}"' in said
            said = shell(asks_ollama.replace("http://127.0.0.1:11434", server.url))
            assert '"response":"red"' in said
            assert '"content": "red"' in said
            assert said.rstrip().endswith("}")
    assert "POST /v1/chat/completions" in server.log
    assert json.loads(shell(generate.replace("python ", f"{sys.executable} "))) == {"colour": "red"}


def test_the_server_of_several_models_has_them(hub_cache):
    for name in ("llava-1.5-7b-hf", "llava-interleave-qwen-0.5b-hf"):
        snapshot = hub_cache / f"models--llava-hf--{name}" / "snapshots" / "abc"
        shutil.copytree(ROOT / "weights" / "tiny-llava", snapshot)
        (snapshot.parent.parent / "refs").mkdir()
        (snapshot.parent.parent / "refs" / "main").write_text("abc")
    _, start, *_ = blocks(DOCS / "server.md", "sh")
    environment = {**os.environ, "HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1"}
    with (
        served(*start.split()[3:], env=environment) as server,
        urllib.request.urlopen(f"{server.url}/v1/models") as models,
    ):
        assert [model["id"] for model in json.load(models)["data"]] == ["llava", "small"]


def shell(code: str) -> str:
    """What a shell prints."""
    return subprocess.run(
        ["sh", "-e", "-c", code], check=True, capture_output=True, text=True
    ).stdout


def test_no_page_has_code_that_nothing_runs():
    tried = {
        "how-fast.md",
        "captions.md",
        "how-it-works.md",
        "prompts.md",
        "server.md",
        "tools.md",
        "training.md",
    }
    for page in DOCS.glob("*.md"):
        if page.name not in tried:
            assert not blocks(page, "python") + blocks(page, "sh"), page


def test_every_flag_exists():
    known = set(FOREIGN)
    for name in COMMANDS:
        parser = importlib.import_module(f"mlx_llava.{name}").build_parser()
        known |= {flag for action in parser._actions for flag in action.option_strings}
    for script in (ROOT / "scripts").glob("*.py"):
        known |= {*re.findall(r'add(?:_argument)?\(\s*"(--[a-z-]+)"', script.read_text("utf-8"))}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if page.name == "coming-from.md":  # what stands there on the left is others'
            text = "\n".join(row.split("|")[2] for row in text.splitlines() if row.count("|") > 2)
        used = {*re.findall(r"(?<![-\w])--[a-z][a-z-]*", text)}
        assert used <= known, (page.name, used - known)


def test_diagrams_are_what_the_script_draws():
    for name, draw in draw_diagrams.DIAGRAMS.items():
        assert (DOCS / f"{name}.svg").read_text(encoding="utf-8") == str(draw()), name


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The documentation as a site, built once for all workers of pytest-xdist."""
    pytest.importorskip("mkdocs", reason="the site: pip install '.[docs]'")
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with FileLock(shared / "site.lock"):
        if not (shared / "site").exists():
            build_site(shared / "building").rename(shared / "site")
    return shared / "site"


def build_site(target: Path) -> Path:
    """Builds with all warnings as errors."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(target)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return target


def test_every_page_is_in_the_site(site):
    built = {str(path.relative_to(site).with_suffix("")) for path in site.rglob("*.html")}
    pages = {str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md")}
    notebooks = {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {"index", *notebooks, *pages} - {"README"} <= built
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    assert all(f" {page}." in navigation for page in {*notebooks, *pages} - {"README"})


def test_the_api_is_described_with_its_options(site):
    page = (site / "api.html").read_text(encoding="utf-8")
    for name in mlx_llava.__all__:
        assert f'id="mlx_llava.{name}"' in page or name == "__version__"
    text = re.sub("<[^>]*>", "", page)
    assert "texts that end the answer, beside the template" in text.lower()  # of Options
    assert "the checkpoint is broken, not supported, or larger than memory" in text.lower()


def test_no_link_of_the_site_leads_nowhere(site):
    """Also those that mkdocs does not see: in HTML, and to what stands outside docs/."""
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        body = (
            html[html.index("<article") : html.rindex("</article>")] if "<article" in html else ""
        )
        for target in re.findall(r'(?:href|src)="([^"#?]+)', body):
            if not target.startswith(("http", "data:", "mailto:", "javascript:")):
                assert (page.parent / target).exists(), (page, target)
