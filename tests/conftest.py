import gc
import os

import pytest
import torch
from skips import pytest_sessionfinish, pytest_terminal_summary

__all__ = ["pytest_sessionfinish", "pytest_terminal_summary"]  # hooks

# The tests' tensors are tiny: a second thread costs more than it gives, and far more on a machine that is busy.
# This is a default: the tests' results must not depend on it. The processes that tests start inherit it.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

# Triton kernels run in its interpreter where there is no GPU; it is chosen when they are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish() -> None:
    """What is imported is no garbage: each training looks for some several times, half a second each in all of it."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # for the end of the interpreter, which deletes modules


@pytest.fixture
def nllb_tokenizer():
    """A tokenizer of NLLB with its 202 languages and letters for tokens."""
    from transformers import NllbTokenizer

    tokens = ["<s>", "<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    return NllbTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])


@pytest.fixture(autouse=True)
def seed() -> None:
    """Random numbers of a test do not depend on the tests that ran before it."""
    torch.manual_seed(0)
