"""The code of the README runs as it stands."""

import lzma
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_readme_has_its_two_blocks() -> None:
    assert len(BLOCKS) == 2
    num_lines = [sum(1 for line in block.splitlines() if line) for block in BLOCKS]
    assert num_lines[0] <= 10
    assert num_lines[1] <= 16


@pytest.mark.parametrize("block", BLOCKS, ids=["translate", "fine-tune"])
def test_block_runs(block: str, tmp_path: Path) -> None:
    for folder in ("checkpoints", "data"):
        shutil.copytree(ROOT / "examples" / folder, tmp_path / "examples" / folder)
    for path in (tmp_path / "examples" / "data").glob("*.train.tsv.xz"):  # short sentences, of all languages
        lines = lzma.decompress(path.read_bytes()).decode().splitlines()
        short = [line for line in lines[1:] if len(line) < 40]
        path.write_bytes(lzma.compress("\n".join([lines[0], *short, ""]).encode()))
    result = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
