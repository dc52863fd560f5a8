"""Every block of code in README and docs runs as it stands, or says why it does not."""

import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from code_blocks import CodeBlock, blocks_of, pages_of
from page_runner import BlockError, Run, run_page, run_page_on_ranks
from scenes import ROOT, make_scene, scene_of

from hf_moe_ted.testing import run_distributed_test

PAGES = pages_of(ROOT)
WITH_CODE = [page for page, blocks in PAGES.items() if any(block.runs for block in blocks)]
TIMEOUT_S = 500.0  # of a page; on a quiet machine most take some seconds
HAS_GPU = torch.cuda.is_available()
PRELOADED = [
    *("torch", "datasets", "sacrebleu", "matplotlib.figure", "accelerate", "evaluate", "safetensors.torch"),
    *(
        "hf_moe_ted.distributed.trainer",
        "hf_moe_ted.cli",
        "hf_moe_ted.serving.server",
        "hf_moe_ted.training.multitask_trainer",
    ),
    *("transformers.models.auto.tokenization_auto", "transformers.pipelines", "transformers.trainer_seq2seq"),
    *("hf_moe_ted.models.pipeline_translation", "hf_moe_ted.compression.report.report_folder", "gradio"),
    *("hf_moe_ted.models.modeling_zcode_m3", "transformers.models.m2m_100.modeling_m2m_100"),
]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages") / "template"
    make_scene(folder)
    return folder


def in_a_process(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in a new process, whose files, settings and threads are its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        if not receiver.poll(TIMEOUT_S):
            raise BlockError(f"the blocks did not end within {TIMEOUT_S:.0f} s")
        result, error = receiver.recv()
    except EOFError:
        raise BlockError(f"the process died, exit code {process.exitcode}") from None
    finally:
        process.join(timeout=5.0)
        process.kill()
    if error:
        raise BlockError(error)
    return result


def _send_result(sender: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        sender.send((function(*args), ""))
    except Exception:  # the other process says it
        sender.send((None, traceback.format_exc()))


def runs_of(blocks: Sequence[CodeBlock], folder: Path, preamble: str) -> list[Run]:
    """Run the blocks of a page."""
    runs: list[Run] = []
    if any(block.runs and not block.on_two_ranks for block in blocks):
        runs += in_a_process(run_page, blocks, folder, preamble)
    if any(block.runs and block.on_two_ranks for block in blocks):
        runs += run_distributed_test(run_page_on_ranks, 2, blocks, folder, preamble, timeout_s=TIMEOUT_S)[0]
    return runs


@pytest.mark.parametrize("page", WITH_CODE)
def test_blocks_of_page_run(page: str, template: Path, tmp_path: Path) -> None:
    preamble = scene_of(page, template, tmp_path / "page")
    runs = runs_of(PAGES[page], tmp_path / "page", preamble)
    expected = [block.place for block in PAGES[page] if block.runs and not (block.needs_gpu and not HAS_GPU)]
    assert sorted(run.place for run in runs) == sorted(expected)


@pytest.mark.parametrize("page", PAGES)
def test_reasons_say_something(page: str) -> None:
    for block in PAGES[page]:
        assert not block.reason or len(block.reason.split()) >= 3, block.place
        assert block.language or not block.runs, block.place


def page_with(*lines: str) -> list[CodeBlock]:
    return blocks_of("\n".join(lines) + "\n", "page.md")


def test_a_block_without_a_reason_runs(tmp_path: Path) -> None:
    blocks = page_with(
        "```python",
        "x = 1",
        "```",
        "<!-- code: with steps=2 -->",
        "```python",
        "print(x + sum(dict(steps=100).values()))",
        "```",
        "<!-- code: output -->",
        "```",
        "3",
        "```",
        "<!-- code: not run, it deletes all files -->",
        "```bash",
        "exit 3",
        "```",
        "<!-- code: file names.txt -->",
        "```",
        "a",
        "```",
        "```bash",
        "A=names.txt",
        "```",
        "```bash",
        "cat $A | grep a > copy.txt  # a pipe",
        "```",
    )
    runs = in_a_process(run_page, blocks, tmp_path, "")
    assert [run.place for run in runs] == ["page.md:2", "page.md:6", "page.md:21", "page.md:24"]
    assert (tmp_path / "copy.txt").read_text() == "a\n"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("```python", "x = 1", "y = x / 0", "```"), 'page.md", line 3'),
        (("```bash", "hf-moe-ted prune no_such_model", "```"), "page.md:2: exit status"),
        (("```bash", "pip install 'hf-moe-ted[no_such]'", "```"), "no extra 'no_such'"),
        (("```bash", "false | cat", "```"), "exit status 1"),
        (("```python", "print(1)", "```", "<!-- code: output -->", "```", "2", "```"), "printed\n1"),
    ],
)
def test_a_block_that_fails_is_named(lines: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(BlockError) as error:
        in_a_process(run_page, page_with(*lines), tmp_path, "")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("<!-- code: not run -->", "```python", "```"), "'not run', which means nothing"),
        (("<!-- code: skip -->", "```python", "```"), "'skip', which means nothing"),
        (("```pyhton", "```"), "a block in 'pyhton'"),
        (("```python", "x"), "1 fences"),
    ],
)
def test_a_mark_that_means_nothing_is_an_error(lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match="page") as error:
        page_with(*lines)
    assert message in str(error.value)


def test_a_value_of_a_test_must_be_in_the_block() -> None:
    [block] = page_with("<!-- code: with steps=2 -->", "```bash", "run --max-steps 100", "```")
    with pytest.raises(ValueError, match="sets steps"):
        _ = block.test_code
    [block] = page_with("<!-- code: with max_steps=2; needs a GPU -->", "```bash", "run --max-steps 100 -x", "```")
    assert block.test_code == "run --max-steps 2 -x\n"
