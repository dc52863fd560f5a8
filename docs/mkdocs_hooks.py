"""What the site has besides the pages of docs/: lists of the records, and the files outside it that pages link to.

A link of a page that leads out of docs/ works in the repository. On the site it leads to a copy of the file, under
`repository/`.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = Path(__file__).parent
RECORDS = {"benchmarks": "Measurements", "experiments": "Experiments", "upstream": "Bugs of other packages"}
COPIES = "repository"
_LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Files, config: Any) -> Files:
    """Add a list of each kind of records, and the files outside docs/ that are linked to."""
    records = []
    for folder, title in RECORDS.items():
        pages = sorted((DOCS / folder).glob("*.md"))
        lines = [f"- [{_title_of(page)}]({page.name})" for page in pages if page.name != "README.md"]
        text = "\n".join([f"# {title}", "", *reversed(lines), ""])
        files.append(File.generated(config, f"{folder}/index.md", content=text))
        records.append({title: [f"{folder}/index.md", *(f"{folder}/{page.name}" for page in reversed(pages))]})
    config["nav"] = [*config["nav"], {"Records": records}]
    unread = [file.src_uri for file in files.documentation_pages()]
    while unread:
        uri = unread.pop()
        text = files.get_file_from_path(uri).content_string
        for link in _LINK.finditer(text):
            found = _target_of(uri, link["target"])
            if found.startswith(f"{COPIES}/") and files.get_file_from_path(found) is None:
                path = ROOT / found.removeprefix(f"{COPIES}/")
                if path.is_file():  # another one stays as it is, and is a warning
                    files.append(File.generated(config, found, abs_src_path=str(path)))
                    unread += [found] if path.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to the copies, and to the lists of records."""
    uri = page.file.src_uri

    def on_site(link: re.Match[str]) -> str:
        found = _target_of(uri, link["target"])
        if files.get_file_from_path(f"{found}/index.md"):
            found = f"{found}/index.md"
        return posixpath.relpath(found, posixpath.dirname(uri) or ".") + (link["anchor"] or "")

    return _LINK.sub(on_site, markdown)


def _title_of(page: Path) -> str:
    return page.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")


def _target_of(uri: str, target: str) -> str:
    """The place on the site that a link of the page `uri` means, which it has from its place in the repository."""
    in_repository = uri.removeprefix(f"{COPIES}/") if uri.startswith(f"{COPIES}/") else f"docs/{uri}"
    found = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), target))
    return found.removeprefix("docs/") if found.startswith("docs/") else f"{COPIES}/{found}"
