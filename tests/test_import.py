"""`import hf_moe_ted`: it is light, its names resolve, and transformers knows the models whatever is imported first."""

import ast
import importlib
import json
import os
from pathlib import Path

import pytest
from local_hub import SOURCE, run_python

import hf_moe_ted

# What fails at its first import, and what is tried meanwhile; the second import is that of all orders.
FAILS_ONCE = """
import sys
import hf_moe_ted

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(Finder)
            raise ImportError(name)

sys.meta_path.insert({place}, Finder)
try:
    from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer, pipeline
except ImportError:
    assert Finder not in sys.meta_path
else:
    raise AssertionError("the import did not fail")
"""

IN_THREADS = """
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
import transformers  # in one thread: it puts another module in its place at the end of its loading

# modules of transformers that import each other in a circle cannot be loaded from both ends at once, with or without us
modules = [
    "hf_moe_ted",
    "hf_moe_ted.models.configuration_zcode_m3",
    "transformers.models.auto.configuration_auto",
    "hf_moe_ted.models.language_codes",
]
together = threading.Barrier(len(modules))

def load(module):
    together.wait()
    import_module(module)

with ThreadPoolExecutor(len(modules)) as threads:
    list(threads.map(load, modules))
"""

# Statements that a process runs first. Then the Auto classes must work, where nothing else imports the package.
ORDERS = {
    "package first": ["import hf_moe_ted"],
    "transformers first": ["import transformers", "import hf_moe_ted"],
    "model module only": ["import hf_moe_ted.models.modeling_zcode_m3"],
    "tokenizer module only": ["import hf_moe_ted.models.tokenization_zcode_m3"],
    "then modeling_layers": ["import hf_moe_ted", "import transformers.modeling_layers"],
    "then modeling_auto": ["import hf_moe_ted", "import transformers.models.auto.modeling_auto"],
    "then tokenization_auto": ["import hf_moe_ted", "import transformers.models.auto.tokenization_auto"],
    "then the trainer": ["import hf_moe_ted", "import transformers.trainer"],
    "after modeling_layers": ["import transformers.modeling_layers", "import hf_moe_ted"],
    "after the Auto classes": ["from transformers import AutoModel, AutoTokenizer, pipeline", "import hf_moe_ted"],
    "after the trainer": ["from transformers import Seq2SeqTrainer", "from hf_moe_ted import ZCodeM3Tokenizer"],
    "in threads": [IN_THREADS],
    **{
        f"{module} fails once": [FAILS_ONCE.format(module=module, place=place)]
        for module, place in {
            "transformers.models.auto.modeling_auto": 0,
            "transformers.models.auto.configuration_auto": 1,  # behind the package's finder
            "hf_moe_ted.models.configuration_zcode_m3": 0,
            "hf_moe_ted.compression.quantized_experts": 0,
        }.items()
    },
}

# Each order runs in a fork of a process that has loaded torch and nothing of transformers, which saves much of a start.
RUN_ORDERS = """
    import json, multiprocessing, sys
    import torch

    def run(order):
        for statement in order:
            exec(statement, {{}})
        from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer, NllbMoeConfig, pipeline
        from transformers.quantizers.auto import AutoQuantizationConfig
        config = AutoConfig.from_pretrained({folder!r})
        tokenizer = AutoTokenizer.from_pretrained({folder!r})
        with torch.device("meta"):
            model = AutoModelForSeq2SeqLM.from_config(config)
            base_model = AutoModel.from_config(config)
            nllb_moe = AutoModel.from_config(NllbMoeConfig(d_model=32, vocab_size=300))
        quantization = AutoQuantizationConfig.from_dict({{"quant_method": "zcode_experts"}})
        translator = pipeline("zcode-m3-translation", model=model, tokenizer=tokenizer, device="meta")
        items = config, tokenizer, model, base_model, nllb_moe, quantization, translator
        return [type(item).__name__ for item in items]

    assert not any(name.split(".")[0] in ("transformers", "hf_moe_ted") for name in sys.modules)
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        print(json.dumps(pool.map(run, {orders}, chunksize=1)))
"""


def python(script: str, timeout_s: float = 120) -> str:
    """What `script` prints in a fresh process that finds the package."""
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    return run_python(script, {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}, timeout_s)


def test_loads_nothing_heavy() -> None:
    script = """
        import json, sys
        import hf_moe_ted
        before = sorted(sys.modules)
        hf_moe_ted.ZCodeM3Model
        print(json.dumps([before, sorted(sys.modules)]))
    """
    heavy = {"torch", "torch.distributed", "transformers.models.auto", "hf_moe_ted.models.modeling_zcode_m3"}
    before, after = (set(names) for names in json.loads(python(script)))
    assert "hf_moe_ted" in before
    assert before & (heavy | {"triton"}) == set()
    assert heavy <= after


def test_takes_little_longer_than_transformers() -> None:
    def seconds(module: str) -> float:
        script = f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
        return min(float(python(script)) for _ in range(3))

    assert seconds("hf_moe_ted") < seconds("transformers") + 0.3


def test_source_tree_that_is_not_installed() -> None:
    script = """
        import importlib.metadata
        found = importlib.metadata.version
        def version(name):
            if name == "hf-moe-ted":
                raise importlib.metadata.PackageNotFoundError(name)
            return found(name)
        importlib.metadata.version = version
        import hf_moe_ted
        print(hf_moe_ted.__version__, hf_moe_ted.TedConfig.__name__)
    """
    assert python(script).split() == ["0+unknown", "TedConfig"]


@pytest.mark.parametrize("name", hf_moe_ted.__all__)
def test_public_name(name: str) -> None:
    value = getattr(hf_moe_ted, name)
    assert value.__name__ == name
    assert value.__module__.startswith("hf_moe_ted.")
    assert name in importlib.import_module(value.__module__).__all__


def test_public_names_are_listed_once() -> None:
    assert len(set(hf_moe_ted.__all__)) == len(hf_moe_ted.__all__)
    assert {"ZCodeM3Config", "ZCodeM3ForConditionalGeneration", "ZCodeM3Tokenizer"} <= {*hf_moe_ted.__all__}


def test_type_checkers_see_the_public_names() -> None:
    tree = ast.parse(Path(hf_moe_ted.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.asname: node.module
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == hf_moe_ted._MODULE_OF_NAME


def test_dir() -> None:
    assert {*hf_moe_ted.__all__, "__version__", "__doc__"} <= {*dir(hf_moe_ted)}
    assert dir(hf_moe_ted) == sorted(set(dir(hf_moe_ted)))


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'hf_moe_ted' has no attribute 'ZCodeM4Model'"):
        _ = hf_moe_ted.ZCodeM4Model
    with pytest.raises(ImportError, match="cannot import name 'ZCodeM4Model'"):
        from hf_moe_ted import ZCodeM4Model  # noqa: F401


@pytest.fixture(scope="module")
def types_by_order(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str] | str]:
    """What the Auto classes give after each order, or the traceback of what they raise."""
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    hf_moe_ted.ZCodeM3Config(d_model=32, vocab_size=300).save_pretrained(folder)
    hf_moe_ted.ZCodeM3Tokenizer(languages=["en", "de"]).save_pretrained(folder)
    output = python(RUN_ORDERS.format(folder=str(folder), orders=list(ORDERS.values())), timeout_s=600)
    return dict(zip(ORDERS, json.loads(output), strict=True))


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_whatever_is_imported_first(types_by_order: dict[str, list[str] | str], order: str) -> None:
    assert types_by_order[order] == [
        "ZCodeM3Config",
        "ZCodeM3Tokenizer",
        "ZCodeM3ForConditionalGeneration",
        "ZCodeM3Model",
        "ZCodeM3Model",
        "ExpertQuantizationConfig",
        "ZCodeM3TranslationPipeline",
    ]
