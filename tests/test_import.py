"""`import hf_moe_ted`: it is light, its names resolve, and transformers knows the models whatever is imported first."""

import importlib
import json
import os
from pathlib import Path

import pytest
from local_hub import SOURCE, run_python

import hf_moe_ted

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
}

# Each order runs in a fork of a process that has loaded torch and nothing of transformers, which saves much of a start.
RUN_ORDERS = """
    import json, multiprocessing, sys
    import torch

    def run(order):
        for statement in order:
            exec(statement, {{}})
        from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer, pipeline
        config = AutoConfig.from_pretrained({folder!r})
        tokenizer = AutoTokenizer.from_pretrained({folder!r})
        with torch.device("meta"):
            model = AutoModelForSeq2SeqLM.from_config(config)
            base_model = AutoModel.from_config(config)
        translator = pipeline("zcode-m3-translation", model=model, tokenizer=tokenizer, device="meta")
        return [type(item).__name__ for item in (config, tokenizer, model, base_model, translator)]

    assert not any(name.split(".")[0] in ("transformers", "hf_moe_ted") for name in sys.modules)
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        print(json.dumps(pool.map(run, {orders}, chunksize=1)))
"""


def python(script: str) -> str:
    """What `script` prints in a fresh process that finds the package."""
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    return run_python(script, {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"})


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
    output = python(RUN_ORDERS.format(folder=str(folder), orders=list(ORDERS.values())))
    return dict(zip(ORDERS, json.loads(output), strict=True))


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_whatever_is_imported_first(types_by_order: dict[str, list[str] | str], order: str) -> None:
    assert types_by_order[order] == [
        "ZCodeM3Config",
        "ZCodeM3Tokenizer",
        "ZCodeM3ForConditionalGeneration",
        "ZCodeM3Model",
        "ZCodeM3TranslationPipeline",
    ]
