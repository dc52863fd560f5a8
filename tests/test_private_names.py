"""docs/private_names.md lists private names of other packages that are used, and the installed versions have them."""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import hf_moe_ted

ROOT = Path(__file__).parents[1]
SOURCE = Path(hf_moe_ted.__file__).parent
LIST = (ROOT / "docs" / "private_names.md").read_text(encoding="utf-8")
PACKAGES = ("torch", "transformers", "accelerate", "peft")
LISTED = {name: bool(needs) for name, needs in re.findall(r"`([a-z]+\.[\w.]*\b_\w+(?:\.\w+)*)`( \(CUDA\))?", LIST)}
# Python's own, and those by which evaluate's modules are made
OF_OTHERS = {"_asdict", "_replace", "_Unpickler", "_info", "_compute"}
# Python, PyTorch and ABCs make these in each class
MADE_IN_CLASSES = {"_auto_class", "_abc_impl", "_backward_cls", "_is_protocol"}
BY_NAME = {"attrgetter", "getattr", "hasattr", "setattr", "delattr"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def names_in(source: str) -> tuple[dict[str, int], set[str]]:
    """Private names that a file uses, with a line of each, and those that it defines."""
    used: dict[str, int] = {}
    defined = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute):
            if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in ("self", "cls"):
                defined.add(node.attr)
            used[node.attr] = node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            used.update((part, node.lineno) for part in node.module.split("."))
            used.update((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Import):
            used.update((part, node.lineno) for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in BY_NAME:
            used.update((a.value, node.lineno) for a in node.args if isinstance(a, ast.Constant) and is_str(a.value))
    return {name: line for name, line in used.items() if is_private(name)}, {*filter(is_private, defined)}


def is_str(value: object) -> bool:
    return isinstance(value, str)


def unlisted(sources: dict[str, str], listed: set[str]) -> list[str]:
    """Where files use a private name that none of them defines and that is not listed."""
    names = {path: names_in(source) for path, source in sources.items()}
    known = listed | OF_OTHERS | set().union(*(defined for _, defined in names.values()))
    return [f"{path}:{used[name]} {name}" for path, (used, _) in names.items() for name in used if name not in known]


def overridden(module: ModuleType) -> Iterator[tuple[str, type, type]]:
    """Private names of the packages that classes of ours redefine: name, our class, the class that has it."""
    for ours in vars(module).values():
        if not inspect.isclass(ours) or ours.__module__ != module.__name__:
            continue
        for name in filter(is_private, vars(ours)):
            bases = [base for base in ours.__mro__ if name in vars(base) and base.__module__.split(".")[0] in PACKAGES]
            if bases and name not in MADE_IN_CLASSES:
                yield name, ours, bases[0]


def parts_of(listed: set[str]) -> set[str]:
    return {part for name in listed for part in name.split(".") if is_private(part)}


def look_up(name: str) -> Any:
    """
    Raises:
        AttributeError: the packages do not have it.
    """
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], 2):
        if not hasattr(found, part) and isinstance(found, ModuleType) and hasattr(found, "__path__"):
            try:
                importlib.import_module(".".join(parts[:number]))
            except ModuleNotFoundError as error:
                raise AttributeError(f"{'.'.join(parts[:number])} is gone") from error
        if number == len(parts) and not hasattr(found, part) and is_in_source(part, found):
            return None  # an attribute of instances
        found = getattr(found, part)
    return found


def is_in_source(name: str, owner: Any) -> bool:
    """Whether the file of a module, or those of a class and its bases, have a name."""
    classes = owner.__mro__ if inspect.isclass(owner) else []
    modules = [sys.modules[one.__module__] for one in classes] if classes else [owner]
    sources = [inspect.getsource(module) for module in modules if getattr(module, "__file__", None)]
    return any(re.search(rf"\b{name}\b", source) for source in sources)


def test_list_is_read() -> None:
    assert {name.split(".")[0] for name in LISTED} == {"torch", "transformers", "accelerate"}
    assert len(LISTED) > 100
    assert {"torch.ops.mkldnn._linear_pointwise", "torch.testing._internal.distributed.fake_pg.FakeStore"} <= {*LISTED}


def test_installed_packages_have_them() -> None:
    missing = []
    for name, needs_cuda in LISTED.items():
        if needs_cuda and torch.version.cuda is None:
            continue
        try:
            look_up(name)
        except AttributeError as error:
            missing.append(f"{name}: {error}")
    assert not missing, "private names are gone, see docs/private_names.md for what they are used:\n" + "\n".join(
        missing
    )


def test_those_that_are_used_are_listed() -> None:
    sources = {str(path.relative_to(SOURCE)): path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py"))}
    found = unlisted(sources, parts_of({*LISTED}))
    assert not found, "private names that docs/private_names.md does not list:\n" + "\n".join(found)


def test_those_that_are_overridden_are_listed() -> None:
    listed = parts_of({*LISTED})
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(hf_moe_ted.__path__, "hf_moe_ted.")]
    found = [
        f"{ours.__qualname__} overrides {base.__module__}.{base.__qualname__}.{name}"
        for module in modules
        for name, ours, base in overridden(module)
        if name not in listed
    ]
    assert not found, "private names that docs/private_names.md does not list:\n" + "\n".join(found)


def test_those_that_are_listed_are_used() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    words = {*re.findall(r"\b_\w+", source)}
    assert sorted(part for part in parts_of({*LISTED}) if part not in words and part not in DIRECTORIES) == []


# modules on the way to a name that is used
DIRECTORIES = {"_distributed_c10d", "_fully_shard", "_fsdp_state", "_fsdp_param"}


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._new_name()",
        "from torch import _new_name",
        "from torch._new_name import x",
        "import torch._new_name",
        "getattr(model, '_new_name', None)",
        "attrgetter('_new_name')",
        "model._new_name = 1",
    ],
)
def test_new_name_is_found(source: str) -> None:
    assert unlisted({"a.py": source}, {"_other"}) == [f"a.py:{source.count(chr(10)) + 1} _new_name"]
    assert unlisted({"a.py": source}, {"_new_name"}) == []
    assert unlisted({"a.py": source, "b.py": "def _new_name(): ..."}, set()) == []


@pytest.mark.parametrize(
    "name", ["torch._gone", "torch.nn.Module._gone", "torch._gone.name", "transformers.Trainer._gone"]
)
def test_missing_name_is_found(name: str) -> None:
    with pytest.raises(AttributeError, match="gone"):
        look_up(name)
