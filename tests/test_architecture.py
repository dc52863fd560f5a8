"""Imports flow one way, between parts of the package and between modules, read off the source of every file.

The models know nothing of the rest of the package because their files are what travels to the Hub as remote code, and
scripts use the public names only.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hf_moe_ted

REPOSITORY = Path(__file__).parents[1]
PACKAGE = "hf_moe_ted"
SOURCE = f"src/{PACKAGE}/"
SCRIPTS = ("examples/", "convert/")
PUBLIC_NAMES = (*hf_moe_ted.__all__, "__version__", "metrics.metric_path", "cli.run")
PUBLIC = {f"{PACKAGE}.{name}" for name in PUBLIC_NAMES}


@dataclass(frozen=True)
class Rule:
    """What a part may import besides itself and the standard library.

    Attributes:
        parts: dotted names inside the package, with all below them.
        optional_parts: the same, but imported in a `try` only, as copied remote code does not have them.
        packages: other packages; `None` for any.
        forbidden: dotted names outside the package that `packages` would allow.
        public: whether the part uses the package from outside, by its public names.
        is_flat: whether files stand in no subfolder and import each other as `from .x import y`, which is all that
            transformers copies to a checkpoint.
    """

    parts: tuple[str, ...] = ()
    optional_parts: tuple[str, ...] = ()
    packages: tuple[str, ...] | None = None
    forbidden: tuple[str, ...] = ()
    public: bool = False
    is_flat: bool = False


# A part is a folder or a file of the package by its first name; examples/ and convert/ are the part "scripts".
RULES = {
    "models": Rule(
        optional_parts=("kernels", "cuda_graphs.recorder"),
        packages=("torch", "transformers", "tokenizers", "huggingface_hub", "sentencex", "py3langid"),
        forbidden=("torch.distributed",),
        is_flat=True,
    ),
    "kernels": Rule(packages=("torch", "triton")),
    "optim": Rule(optional_parts=("kernels",), packages=("torch",)),
    "files": Rule(packages=("yaml",)),
    "tensors": Rule(
        parts=("models", "files"),
        packages=("torch", "safetensors", "huggingface_hub", "transformers", "accelerate", "tqdm"),
    ),
    "conversion": Rule(parts=("models", "files", "tensors")),
    "evaluation": Rule(parts=("models", "files", "tensors")),
    "routing": Rule(parts=("models", "files", "evaluation")),
    "compression": Rule(parts=("models", "kernels", "files", "tensors", "evaluation", "routing")),
    "expert_memory": Rule(
        parts=("models", "kernels", "files", "tensors", "routing", "compression"),
        packages=("torch", "transformers", "accelerate", "tqdm"),
    ),
    "translation": Rule(parts=("models", "evaluation")),
    "serving": Rule(parts=("models", "files", "tensors", "evaluation", "routing", "translation")),
    "data": Rule(parts=("models.language_codes", "models.tokenization_zcode_m3", "models.vocabulary")),
    "cuda_graphs": Rule(parts=("optim",), packages=("torch", "transformers", "accelerate")),
    "training": Rule(
        parts=("models", "data", "cuda_graphs"), packages=("numpy", "torch", "transformers", "accelerate")
    ),
    "distributed": Rule(
        parts=("models", "kernels", "files", "tensors", "optim", "cuda_graphs"),
        packages=("numpy", "torch", "transformers", "accelerate", "safetensors", "tqdm", "peft"),
    ),
    "planning": Rule(
        parts=(
            *("models", "distributed", "files", "tensors.config_file"),
            *("routing.pictures", "expert_memory.residence_plan", "optim.tiled_adamw"),
        ),
        packages=("torch", "transformers"),
    ),
    "metrics": Rule(parts=("evaluation.metrics",), packages=()),
    "testing": Rule(parts=("models", "distributed")),
    "_auto_registration": Rule(parts=("models", "compression"), packages=("transformers",)),
    "__init__": Rule(
        parts=(
            *("_auto_registration", "models", "optim", "tensors", "conversion", "evaluation", "routing", "translation"),
            *("serving", "compression", "expert_memory", "data", "cuda_graphs", "training", "distributed", "planning"),
        ),
        packages=(),
    ),
    "__main__": Rule(public=True),
    "cli": Rule(public=True),
    "scripts": Rule(public=True),
}


@dataclass(frozen=True)
class Import:
    """One imported name: `from a.b import c` and `import a.b.c` both have the target `a.b.c`."""

    target: str
    line: int
    in_try: bool
    is_sibling: bool = False


def imports_of(source: str, package: str) -> Iterator[Import]:
    """All imports of a file of `package` (dotted), those in functions and for type checking, too.

    `torch.distributed.x` after `import torch` counts as an import of it.
    """
    tree = ast.parse(source)
    bodies_of_try = [node.body for node in ast.walk(tree) if isinstance(node, ast.Try)]
    in_try = {node for body in bodies_of_try for statement in body for node in ast.walk(statement)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, node in in_try)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            is_sibling = node.level == 1 and node.module is not None and "." not in node.module
            for alias in node.names:
                yield Import(f"{module}.{alias.name}", node.lineno, node in in_try, is_sibling)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield Import("torch.distributed", node.lineno, node in in_try)


def is_below(name: str, parents: tuple[str, ...]) -> bool:
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def forbidden_reason(part: str, rule: Rule, imported: Import) -> str | None:
    """Why `part` may not have an import, `None` if it may."""
    target = imported.target
    package = target.split(".")[0]
    if target.endswith(".*"):
        return "star import"
    if package != PACKAGE:
        is_known = package in sys.stdlib_module_names or rule.packages is None or package in rule.packages
        return "a package it may not use" if not is_known or is_below(target, rule.forbidden) else None

    inside = target.removeprefix(PACKAGE).removeprefix(".")
    if rule.public:
        return None if target in PUBLIC or is_below(inside, (part,)) else "not a public name"
    if is_below(inside, (part,)):
        return "not of the form `from .x import y`" if rule.is_flat and not imported.is_sibling else None
    if is_below(inside, rule.optional_parts):
        return None if imported.in_try else "optional, but not in a `try`"
    return None if is_below(inside, rule.parts) else "a part it may not use"


def violations(path: str, source: str) -> list[str]:
    """What is wrong with the imports of a file, one line each; `path` is relative to the repository."""
    if path.startswith(SCRIPTS):
        part, package = "scripts", ""
    else:
        names = path.removeprefix(SOURCE).removesuffix(".py").split("/")
        part, package = names[0], ".".join([PACKAGE, *names[:-1]])
        if part not in RULES:
            return [f"{path}: {part} is a new part of the package, give it a rule in {Path(__file__).name}"]
        if RULES[part].is_flat and len(names) > 2:
            return [f"{path}: {part} has no subfolders"]
    reasons = [(i, forbidden_reason(part, RULES[part], i)) for i in imports_of(source, package)]
    return [f"{path}:{i.line}: {part} imports {i.target}, {reason}" for i, reason in reasons if reason is not None]


def import_cycle(sources: Mapping[str, str]) -> list[str] | None:
    """Modules each of which imports the next, the first one again at the end; `None` without such a circle.

    That a module is imported after the `__init__` of the packages around it does not count.

    Args:
        sources: of files by their paths relative to the repository.
    """
    modules = {
        path.removeprefix("src/").removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
        for path in sources
    }
    imports = {}
    for module, path in modules.items():
        package = module if path.endswith("/__init__.py") else module.rpartition(".")[0]
        owners = {owner(imported.target, modules) for imported in imports_of(sources[path], package)}
        imports[module] = owners - {None, module}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return None


def owner(name: str, modules: Mapping[str, str]) -> str | None:
    """The module that `name` is, or is an attribute of; `None` if it is of another package."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def files_below(*folders: str) -> list[str]:
    """Python files relative to the repository."""
    paths = [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    return [path.relative_to(REPOSITORY).as_posix() for path in paths]


@pytest.mark.parametrize("path", files_below(SOURCE, *SCRIPTS))
def test_imports(path: str) -> None:
    assert violations(path, (REPOSITORY / path).read_text(encoding="utf-8")) == []


def test_all_files_are_read() -> None:
    files = files_below(SOURCE, *SCRIPTS)
    assert {f"{SOURCE}__init__.py", f"{SOURCE}models/modeling_zcode_m3.py", "examples/prepare_data.py"} <= {*files}


def test_no_star_imports_in_tests() -> None:
    stars = [
        f"{path}:{imported.line}"
        for path in files_below("tests")
        for imported in imports_of((REPOSITORY / path).read_text(encoding="utf-8"), "tests")
        if imported.target.endswith(".*")
    ]
    assert stars == []


def test_rules_have_no_cycle() -> None:
    parts = {part: {name.split(".")[0] for name in rule.parts + rule.optional_parts} for part, rule in RULES.items()}
    TopologicalSorter(parts).prepare()  # raises CycleError


def test_modules_have_no_cycle() -> None:
    cycle = import_cycle({path: (REPOSITORY / path).read_text(encoding="utf-8") for path in files_below(SOURCE)})
    assert cycle is None, f"modules import each other in a circle: {' -> '.join(cycle)}"


def test_rules_are_of_parts_that_exist() -> None:
    names = {name for part, rule in RULES.items() for name in (part, *rule.parts, *rule.optional_parts)} - {"scripts"}
    paths = {name: REPOSITORY / SOURCE / name.replace(".", "/") for name in names}
    files = {name: [path.with_suffix(".py"), *path.rglob("*.py")] for name, path in paths.items()}
    assert [name for name, of_name in files.items() if not any(file.is_file() for file in of_name)] == []


A, B = f"{SOURCE}a.py", f"{SOURCE}folder/b.py"
INIT = f"{SOURCE}folder/__init__.py"


@pytest.mark.parametrize(
    "sources",
    [
        {A: "import torch\nfrom .folder.b import f\nfrom .folder import b", B: "import a", INIT: ""},
        {A: "import hf_moe_ted.folder.b", B: "from ..c import f", f"{SOURCE}c.py": "from . import folder", INIT: ""},
        {A: "", B: "from .. import a", INIT: "from .b import f", f"{SOURCE}__init__.py": "from .a import f"},
    ],
)
def test_no_cycle(sources: dict[str, str]) -> None:
    assert import_cycle(sources) is None


@pytest.mark.parametrize(
    ("sources", "cycle"),
    [
        ({A: "from .folder.b import f", B: "from ..a import g"}, "a folder.b"),
        ({A: "from .folder import b", B: "import hf_moe_ted.a"}, "a folder.b"),
        ({A: "def f():\n    from .folder.b import f", B: "def g():\n    from .. import a"}, "a folder.b"),
        ({A: "from .folder.b import f", B: "if TYPE_CHECKING:\n    from hf_moe_ted.a import g"}, "a folder.b"),
        ({B: "from . import f", INIT: "from .b import f"}, "folder folder.b"),
        ({A: "from .folder import f", INIT: "from .b import f", B: "from ..a import g"}, "a folder folder.b"),
    ],
)
def test_cycle(sources: dict[str, str], cycle: str) -> None:
    found = import_cycle(sources)
    assert found is not None and found[0] == found[-1]
    start = found.index(f"{PACKAGE}.{cycle.split()[0]}")
    in_order = found[start:-1] + found[:start]
    assert in_order == [f"{PACKAGE}.{name}" for name in cycle.split()]


MODEL = f"{SOURCE}models/modeling_zcode_m3.py"
EXAMPLE = "examples/finetune.py"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (MODEL, "import torch.nn\nimport math\nfrom transformers.utils import logging\nfrom .router import Routing"),
        (MODEL, "from torch import nn\nfrom huggingface_hub.dataclasses import strict\nimport tokenizers"),
        (MODEL, "try:\n    import hf_moe_ted.kernels.grouped_ffn\nexcept ImportError:\n    pass"),
        (f"{SOURCE}kernels/ffn.py", "import triton.language as tl\nfrom .autotune import configs"),
        (f"{SOURCE}kernels/triton/ffn.py", "from ..autotune import configs\nfrom hf_moe_ted.kernels import autotune"),
        (f"{SOURCE}distributed/mesh.py", "import torch.distributed\nfrom ..models.experts import ZCodeM3Experts"),
        (
            f"{SOURCE}compression/prune.py",
            "import numpy\nfrom ..tensors.files import f\nfrom ..models import experts",
        ),
        (f"{SOURCE}data/collator.py", "from ..models.tokenization_zcode_m3 import ZCodeM3Tokenizer\nimport datasets"),
        (
            f"{SOURCE}evaluation/metrics/bleu/bleu.py",
            "import sacrebleu\nfrom hf_moe_ted.evaluation.metrics import translation_metric",
        ),
        (
            f"{SOURCE}cli/models.py",
            "import typer\nfrom .. import ZCodeM3Config\nfrom .options import Model",
        ),
        (EXAMPLE, "import evaluate\nfrom hf_moe_ted import ZCodeM3Config\nfrom hf_moe_ted.metrics import metric_path"),
        ("convert/nllb_moe.py", "from hf_moe_ted.cli import run"),
    ],
)
def test_allowed(path: str, source: str) -> None:
    assert violations(path, source) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        (MODEL, "import numpy as np", "models imports numpy, a package it may not use"),
        (MODEL, "def f():\n    import evaluate", ":2: models imports evaluate, a package it may not use"),
        (MODEL, "import torch.distributed as dist", "imports torch.distributed, a package it may not use"),
        (MODEL, "from torch import distributed", "imports torch.distributed, a package it may not use"),
        (MODEL, "from torch.distributed.tensor import DTensor", "a package it may not use"),
        (MODEL, "import torch\ntorch.distributed.get_rank()", "imports torch.distributed, a package it may not use"),
        (MODEL, "from ..distributed import mesh", "imports hf_moe_ted.distributed.mesh, a part it may not use"),
        (MODEL, "from hf_moe_ted.kernels import x", "imports hf_moe_ted.kernels.x, optional, but not in a `try`"),
        (MODEL, "try:\n    pass\nexcept E:\n    import hf_moe_ted.kernels", "optional, but not in a `try`"),
        (MODEL, "try:\n    from hf_moe_ted.data import x\nexcept E:\n    pass", "a part it may not use"),
        (MODEL, "import hf_moe_ted", "models imports hf_moe_ted, a part it may not use"),
        (MODEL, "from hf_moe_ted import ZCodeM3Config", "imports hf_moe_ted.ZCodeM3Config, a part it may not use"),
        (MODEL, "from . import router", "imports hf_moe_ted.models.router, not of the form `from .x import y`"),
        (MODEL, "from hf_moe_ted.models.router import Routing", "not of the form `from .x import y`"),
        (MODEL, "from ..models.router import Routing", "not of the form `from .x import y`"),
        (MODEL, "from .ops.experts import x", "imports hf_moe_ted.models.ops.experts.x, not of the form"),
        (f"{SOURCE}models/ops/experts.py", "", "models has no subfolders"),
        (f"{SOURCE}kernels/ffn.py", "import transformers", "kernels imports transformers, a package it may not use"),
        (f"{SOURCE}kernels/ffn.py", "from ..models.experts import E", "a part it may not use"),
        (f"{SOURCE}distributed/trainer.py", "from ..compression.prune import p", "a part it may not use"),
        (f"{SOURCE}distributed/trainer.py", "import deepspeed", "a package it may not use"),
        (f"{SOURCE}optim/tiled_adamw.py", "from ..models.experts import E", "a part it may not use"),
        (f"{SOURCE}optim/tiled_adamw.py", "import transformers", "a package it may not use"),
        (f"{SOURCE}conversion/upcycling.py", "from ..compression.prune import p", "a part it may not use"),
        (f"{SOURCE}conversion/upcycling.py", "from ..testing import tiny_config", "a part it may not use"),
        (f"{SOURCE}compression/prune.py", "from ..distributed.mesh import m", "a part it may not use"),
        (f"{SOURCE}files/json_file.py", "import torch", "files imports torch, a package it may not use"),
        (f"{SOURCE}evaluation/text_file.py", "from ..routing.expert_statistics import E", "a part it may not use"),
        (f"{SOURCE}routing/expert_statistics.py", "from ..compression.merge import m", "a part it may not use"),
        (f"{SOURCE}data/collator.py", "from ..models.modeling_zcode_m3 import Z", "a part it may not use"),
        (f"{SOURCE}data/collator.py", "from ..models.tokenization_zcode_m3_old import Z", "a part it may not use"),
        (f"{SOURCE}evaluation/metrics/chrf/chrf.py", "from hf_moe_ted.data import d", "a part it may not use"),
        (f"{SOURCE}evaluation/metrics/chrf/chrf.py", "from hf_moe_ted import metrics_of, cli", "a part it may not use"),
        (f"{SOURCE}cli/models.py", "from ..models.modeling_zcode_m3 import ZCodeM3Model", "not a public name"),
        (f"{SOURCE}cli/models.py", "from hf_moe_ted.models import experts", "models.experts, not a public name"),
        (f"{SOURCE}__init__.py", "import torch", "__init__ imports torch, a package it may not use"),
        (f"{SOURCE}_auto_registration.py", "from torch import nn", "imports torch.nn, a package it may not use"),
        (f"{SOURCE}viewer/plot.py", "", "viewer is a new part of the package, give it a rule in test_architecture.py"),
        (f"{SOURCE}helpers.py", "", "helpers is a new part of the package"),
        (f"{SOURCE}data/collator.py", "from torch import *", "data imports torch.*, star import"),
        (MODEL, "from .router import *", "models imports hf_moe_ted.models.router.*, star import"),
        (EXAMPLE, "from hf_moe_ted import *", "scripts imports hf_moe_ted.*, star import"),
        (EXAMPLE, "import hf_moe_ted", "scripts imports hf_moe_ted, not a public name"),
        (EXAMPLE, "import hf_moe_ted.metrics", "scripts imports hf_moe_ted.metrics, not a public name"),
        (EXAMPLE, "from hf_moe_ted.metrics import METRICS", "hf_moe_ted.metrics.METRICS, not a public name"),
        ("convert/nllb_moe.py", "from hf_moe_ted.conversion import nllb_moe", "not a public name"),
        ("convert/nllb_moe.py", "from hf_moe_ted.cli.convert import nllb_moe", "not a public name"),
        ("convert/nllb_moe.py", "from hf_moe_ted import ZCodeM3Router", "hf_moe_ted.ZCodeM3Router, not a public name"),
    ],
)
def test_rejected(path: str, source: str, message: str) -> None:
    found = violations(path, source)
    assert found
    assert all(message in violation for violation in found)
