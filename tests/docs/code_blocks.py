"""The code blocks of Markdown pages, and what a comment before a block says about running it.

A comment directly before a block, which no reader of the page sees, has one or more of these, with `;` between them:

    <!-- code: with max_steps=2, expert_parallel_size=1 -->   other values for keywords or options in a test
    <!-- code: two ranks -->                                   on two processes over gloo
    <!-- code: needs a GPU -->                                 only where there is a CUDA device
    <!-- code: stays running -->                               a server: until the page ends
    <!-- code: file terms.tsv -->                              no code; a file that later blocks read
    <!-- code: output -->                                      no code; what the block before it prints
    <!-- code: not run, REASON -->                             and why it is not

A block of Python or of a shell without one of them runs as it stands.
"""

import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

PYTHON = frozenset({"python"})
SHELL = frozenset({"bash", "sh"})
DATA = frozenset({"", "json", "text", "yaml"})  # is shown, and never runs

_BLOCK = re.compile(
    r"(?:<!-- code:(?P<marks>(?:(?!-->).)*)-->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
_FENCE = re.compile(r"^ *```", re.MULTILINE)


@dataclass(frozen=True)
class CodeBlock:
    """One block of a page.

    Attributes:
        page: where it is, as a test names it.
        line: number of its first line of code.
        language: what stands behind the fence.
        code: its text, without the indentation of a list.
        replacements: keyword or option to the value that it has in a test.
        reason: why it does not run; "" if it does.
        file: name of the file that it is; "" if it is none.
        is_output, needs_gpu, on_two_ranks, stays_running: as its comment says.
    """

    page: str
    line: int
    language: str
    code: str
    replacements: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    file: str = ""
    is_output: bool = False
    needs_gpu: bool = False
    on_two_ranks: bool = False
    stays_running: bool = False

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether it is code that must run, at least on a GPU."""
        return self.language in PYTHON | SHELL and not (self.reason or self.file or self.is_output)

    @property
    def test_code(self) -> str:
        """The code with the values of a test.

        Raises:
            ValueError: a keyword of `replacements` is not in the block.
        """
        code = self.code
        for name, value in self.replacements.items():
            option = name.replace("_", "[_-]")
            pattern = rf"(--{option} |\b{name}=)(?:\[[^]]*\]|[\w.+-]+)"
            code, count = re.subn(pattern, lambda found, to=value: found[1] + to, code)
            if not count:
                raise ValueError(f"{self.place}: the comment before the block sets {name}, which is not in the block")
        return code


def blocks_of(text: str, page: str) -> list[CodeBlock]:
    """The blocks of a page's text, in order.

    Raises:
        ValueError: a fence that nothing closes, or a comment that says what is unknown here.
    """
    blocks = []
    num_fences = 0
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        code = textwrap.dedent(match["code"])
        num_fences += 2 + len(_FENCE.findall(match["code"]))
        block = CodeBlock(page, line, match["language"], code, **_marks(match["marks"] or "", f"{page}:{line}"))
        if block.language not in PYTHON | SHELL | DATA:
            raise ValueError(f"{block.place}: a block in {block.language!r}, which is neither code nor data here")
        blocks.append(block)
    if num_fences != len(_FENCE.findall(text)):
        raise ValueError(f"{page}: {len(_FENCE.findall(text))} fences, but those of the blocks are {num_fences}")
    return blocks


def pages_of(root: Path) -> dict[str, list[CodeBlock]]:
    """README and docs with their blocks, by their path from the root of the repository."""
    paths = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    names = [path.relative_to(root).as_posix() for path in paths]
    return {name: blocks_of(path.read_text(encoding="utf-8"), name) for name, path in zip(names, paths, strict=True)}


def _marks(comment: str, place: str) -> dict[str, object]:
    marks: dict[str, object] = {}
    comment = " ".join(comment.split())
    if comment.startswith("not run, "):
        return {"reason": comment.removeprefix("not run, ")}
    for words in filter(None, (part.strip() for part in comment.split(";"))):
        kind, _, rest = words.partition(" ")
        if kind == "with" and rest:
            pairs = re.findall(r"(\w+)=(\[[^]]*\]|[^,]+)", rest)
            marks["replacements"] = {name: value.strip() for name, value in pairs}
        elif kind == "file" and rest:
            marks["file"] = rest
        elif words in ("output", "needs a GPU", "two ranks", "stays running"):
            name = {"output": "is_output", "needs a GPU": "needs_gpu", "two ranks": "on_two_ranks"}
            marks[name.get(words, "stays_running")] = True
        else:
            raise ValueError(f"{place}: the comment before the block says {words!r}, which means nothing here")
    return marks
