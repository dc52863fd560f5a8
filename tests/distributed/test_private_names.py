"""Private names of torch, transformers and accelerate stand in one module per library, and are still there."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.parallelism_config import ParallelismConfig
from torch.distributed.checkpoint import FileSystemReader
from transformers import Trainer
from transformers.distributed import DistributedConfig

import hf_moe_ted
from hf_moe_ted import TedConfig, TedPlugin
from hf_moe_ted.distributed import private_accelerate, private_torch, private_transformers
from hf_moe_ted.distributed.counts import CountsOnceMixin
from hf_moe_ted.distributed.state_metadata import SafeReader
from hf_moe_ted.distributed.trainer import TedTrainerMixin

FILES = sorted((Path(hf_moe_ted.__file__).parent / "distributed").glob("*.py"))
OWN_OBJECTS = ("self", "cls", "kept", "super()")  # `kept` is a KeptResults in one of its methods
OF_SUBCLASS = {"_is_expert_parallel"}  # in the docstring of private_transformers


def private_names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{path.name}:{node.lineno} {a.name}" for a in node.names if is_private(a.name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and is_foreign(node):
            yield f"{path.name}:{node.lineno} {ast.unparse(node)}"


def is_foreign(node: ast.Attribute) -> bool:
    return ast.unparse(node.value) not in OWN_OBJECTS and node.attr not in OF_SUBCLASS


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_private_names_are_in_one_module_per_library() -> None:
    found = [name for path in FILES if not path.name.startswith("private_") for name in private_names(path)]
    assert {name.split()[1] for name in found} == {"pickle._Unpickler"}, found  # Python's own


@pytest.mark.parametrize(
    ("ours", "theirs", "module"),
    [
        (TedTrainerMixin, Trainer, private_transformers),
        (CountsOnceMixin, Trainer, private_transformers),
        (TedConfig, DistributedConfig, private_transformers),
        (TedPlugin, ParallelismConfig, private_accelerate),
        (SafeReader, FileSystemReader, private_torch),
    ],
)
def test_private_methods_that_are_overridden_are_listed_and_exist(ours: type, theirs: type, module: Any) -> None:
    private = {name for name, value in vars(ours).items() if is_private(name) and inspect.isfunction(value)}
    listed = {*re.findall(r"\b_[a-z]\w+", module.__doc__)}
    assert private & listed == {name for name in private if hasattr(theirs, name)} != set()
