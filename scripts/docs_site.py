"""Hooks of mkdocs: brings what stands outside docs/ into the site, and leads links there.

A page of docs/ links to notebooks, packaging and code as they lie in the repository, so that it
reads well there too. What is no page of the site becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
#: Files of the repository -> where they stand in the site.
PLACES = {
    "README.md": "index.md",
    "docs/README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "packaging/README.md": "packaging.md",
    "weights/tiny-llava/README.md": "embedded-model.md",
    **{
        str(path.relative_to(ROOT)): str(path.relative_to(ROOT))
        for pattern in ("notebooks/*.ipynb", "weights/tiny-llava/**/*.png")
        for path in sorted(ROOT.glob(pattern))
    },
}
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
_PICTURE = re.compile(r'(?<=\]\()([^)\s]+)(?=\))|(?<=src=")([^"]+)(?=")')


@event_priority(100)  # type: ignore[untyped-decorator]  # before plugins that take pages of their kind
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files of `PLACES`."""
    site, directories = config.site_dir, config.use_directory_urls
    for source, place in PLACES.items():
        if source == "docs/README.md":  # what the navigation is here
            continue
        files.append(
            File(source, str(ROOT), site, directories)
            if source == place  # the plugin for notebooks takes no file that was generated
            else File.generated(config, place, abs_src_path=str(ROOT / source))
        )
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: object) -> str:
    """Leads the links and pictures of a page of Markdown; a link to no page becomes text."""
    if not page.file.src_uri.endswith(".md"):
        return markdown

    def link(match: re.Match[str]) -> str:
        target = _lead(match[2], page, files)
        return f"[{match[1]}]({target})" if target else match[1]

    def picture(match: re.Match[str]) -> str:
        return _lead(match[0], page, files) or match[0]

    return _PICTURE.sub(picture, _LINK.sub(link, markdown))


def on_page_content(html: str, page: Page, files: Files, **_: object) -> str:
    """Leads the links of a notebook, which its plugin leaves alone."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def link(match: re.Match[str]) -> str:
        target = _lead(match[1], page, files)
        return f'href="{re.sub("[.](md|ipynb)", ".html", target)}"' if target else ""

    return re.sub(r'href="([^"#]+)"', link, html)


def _lead(target: str, page: Page, files: Files) -> str | None:
    """Where something is, seen from a page, that its source calls `target`; None if nowhere."""
    path, mark, anchor = target.partition("#")
    if not path or path.startswith("data:") or "://" in path:
        return target
    source = Path(str(page.file.abs_src_path)).relative_to(ROOT)
    inside = posixpath.normpath(f"{source.parent.as_posix()}/{path}")
    place = PLACES.get(inside) or posixpath.relpath(inside, "docs")
    if files.get_file_from_path(place) is None:
        return None
    return posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or ".") + mark + anchor
