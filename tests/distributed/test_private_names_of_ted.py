"""Private names of torch, transformers and accelerate stand in one module per library."""

import ast
from collections.abc import Iterator
from pathlib import Path

import hf_moe_ted

FILES = sorted((Path(hf_moe_ted.__file__).parent / "distributed").glob("*.py"))
OWN_OBJECTS = ("self", "cls", "kept", "super()")  # `kept` is a KeptResults in one of its methods
OF_SUBCLASS = {"_is_expert_parallel"}


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
