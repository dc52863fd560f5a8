"""Sharing on the Hub: models, tokenizers and pipelines that are pushed and loaded, with the package and without it.

Without the package they come as remote code: a pipeline is saved with it, for models and tokenizers the classes are
registered with `register_for_auto_class` before they are saved. It is loaded with `trust_remote_code=True`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_hub import USER, LocalHub, run_python

CODE = {
    f"{name}.py"
    for name in (
        "attention",
        "attention_backends",
        "beam_cache",
        "beam_hypotheses",
        "beam_search",
        "captured_encoder",
        "captured_search",
        "configuration_zcode_m3",
        "decoding_step",
        "expert_computation",
        "execution_device",
        "experts",
        "family",
        "field_of_config",
        "forward_arguments",
        "generation",
        "graph_store",
        "language_codes",
        "language_detection",
        "layers",
        "losses",
        "modeling_zcode_m3",
        "moe_layer",
        "nllb_moe",
        "outputs",
        "parallel_plans",
        "pipeline_inputs",
        "pipeline_translation",
        "positions",
        "pretrained_model",
        "remote_code",
        "router",
        "router_losses",
        "search_memory",
        "segments",
        "structure",
        "tokenization_zcode_m3",
        "vocabulary",
    )
}
AUTO_MAP = {
    "AutoConfig": "configuration_zcode_m3.ZCodeM3Config",
    "AutoModelForSeq2SeqLM": "modeling_zcode_m3.ZCodeM3ForConditionalGeneration",
}

# A model, its tokenizer and its pipeline. Untied random weights: each sentence has its own translation.
MAKE = """
import json
import torch
from hf_moe_ted import (
    ZCodeM3Config, ZCodeM3ForConditionalGeneration, ZCodeM3Model, ZCodeM3Tokenizer, ZCodeM3TranslationPipeline,
)
from hf_moe_ted.testing import tiny_config

torch.set_num_threads(1)
torch.manual_seed(0)
tokenizer = ZCodeM3Tokenizer(languages=["en", "de"], src_lang="en", tgt_lang="de")
config = tiny_config(vocab_size=len(tokenizer), init_std=0.5, tie_word_embeddings=False)
model = ZCodeM3ForConditionalGeneration(config).eval()
translator = ZCodeM3TranslationPipeline(model=model, tokenizer=tokenizer)
"""

REGISTER = """
ZCodeM3Config.register_for_auto_class()
ZCodeM3Model.register_for_auto_class("AutoModel")
ZCodeM3ForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
ZCodeM3Tokenizer.register_for_auto_class()
"""

# What three sentences become, in ids and in text.
TRANSLATE = """
def translate(model, tokenizer, translator):
    sentences = ["Hello", "Good night", "one two three"]
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    options = {"forced_bos_token_id": tokenizer.get_lang_id("de"), "max_new_tokens": 6}
    texts = [translation["translation_text"] for translation in translator(sentences, max_new_tokens=6)]
    return {"ids": model.generate(**inputs, **options).tolist(), "texts": texts}
"""

# `import hf_moe_ted` raises an ImportError from here on.
HIDE_PACKAGE = "import sys; sys.modules['hf_moe_ted'] = None"

LOAD_REMOTE_CODE = """
import json
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

torch.set_num_threads(1)

def load(name):
    model = AutoModelForSeq2SeqLM.from_pretrained(name, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    translator = pipeline("translation", model=name, trust_remote_code=True)
    objects = [model, model.config, tokenizer, translator, translator.model, translator.tokenizer]
    return {
        "classes": [type(item).__name__ for item in objects],
        "modules": [type(item).__module__.split(".")[0] for item in objects],
        **translate(model, tokenizer, translator),
    }

def what_is_asked(auto_class, name):
    try:
        return type(auto_class.from_pretrained(name, trust_remote_code=False)).__name__
    except ValueError as error:
        return "trust_remote_code=True" in str(error)
"""


def output_of(env: dict[str, str], *parts: str) -> Any:
    """The JSON that a script, made of parts, prints at its end in a process of its own."""
    return json.loads(run_python("\n".join(parts), env).splitlines()[-1])


def assert_distinct_translations(result: dict[str, Any]) -> None:
    """Each sentence has its own translation, so that equal ids mean equal weights and equal inputs."""
    assert len({tuple(ids) for ids in result["ids"]}) == 3
    assert len({ids[1] for ids in result["ids"]}) == 1
    assert len(set(result["texts"])) == 3


def test_push_and_load_with_the_package(local_hub: LocalHub) -> None:
    pushed = output_of(
        local_hub.env(),
        MAKE,
        TRANSLATE,
        """
other = ZCodeM3ForConditionalGeneration(config).eval()
other_translator = ZCodeM3TranslationPipeline(model=other, tokenizer=tokenizer)
model.push_to_hub("tester/parts", max_shard_size="100KB", commit_message="the model")
tokenizer.push_to_hub("tester/parts")
other.push_to_hub("tester/parts", revision="other", max_shard_size="100KB")
other_translator.push_to_hub("tester/whole", private=True)
print(json.dumps([translate(model, tokenizer, translator), translate(other, tokenizer, other_translator)]))
""",
    )
    for result in pushed:
        assert_distinct_translations(result)
    assert pushed[0]["ids"] != pushed[1]["ids"]
    files = local_hub.files(f"{USER}/parts")
    assert {"config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"} <= files.keys()
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 2 and all(files[name].lfs_oid is not None for name in shards)
    # models and tokenizers come without code if nobody asks for it, pipelines with it
    assert not any(name.endswith(".py") for name in files)
    assert "auto_map" not in json.loads(files["config.json"].data)
    assert {name for name in local_hub.files(f"{USER}/whole") if name.endswith(".py")} == CODE

    loaded = output_of(
        local_hub.env(),
        TRANSLATE,
        """
import json
import hf_moe_ted
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, pipeline

torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained("tester/parts")
model = AutoModelForSeq2SeqLM.from_pretrained("tester/parts")
other = hf_moe_ted.ZCodeM3ForConditionalGeneration.from_pretrained("tester/parts", revision="other")
translators = [
    pipeline("zcode-m3-translation", model="tester/parts"),
    pipeline("zcode-m3-translation", model="tester/whole"),
    pipeline("translation", model="tester/whole", trust_remote_code=True),
]
print(json.dumps({
    "classes": [type(item).__module__ for item in (model, tokenizer, *(item.model for item in translators))],
    "results": [translate(item, tokenizer, translator) for item, translator in zip([model, other, other], translators)],
}))
""",
    )
    modules = ["modeling_zcode_m3", "tokenization_zcode_m3", *["modeling_zcode_m3"] * 3]
    assert loaded["classes"] == [f"hf_moe_ted.models.{module}" for module in modules]
    assert loaded["results"] == [pushed[0], pushed[1], pushed[1]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalHub, Path, dict[str, Any]]]:
    """A Hub and a folder with the same registered model, tokenizer and pipeline, and their translations."""
    folder = tmp_path_factory.mktemp("shared")
    with LocalHub(home=folder / "pusher") as hub:
        result = output_of(
            hub.env(),
            MAKE,
            REGISTER,
            TRANSLATE,
            f"""
translator.save_pretrained({str(folder / "saved")!r})
translator.push_to_hub("tester/remote")
model.model.push_to_hub("tester/base")
print(json.dumps(translate(model, tokenizer, translator)))
""",
        )
        yield hub, folder, result


def test_files_of_remote_code(shared: tuple[LocalHub, Path, dict[str, Any]]) -> None:
    hub, folder, result = shared
    assert_distinct_translations(result)
    files = hub.files(f"{USER}/remote")
    assert {name for name in files if name.endswith(".py")} == CODE
    assert {path.name for path in (folder / "saved").glob("*.py")} == CODE
    assert json.loads(files["config.json"].data)["auto_map"] == AUTO_MAP
    tokenizer_config = json.loads(files["tokenizer_config.json"].data)
    assert tokenizer_config["auto_map"] == {"AutoTokenizer": ["tokenization_zcode_m3.ZCodeM3Tokenizer", None]}
    base_config = json.loads(hub.files(f"{USER}/base")["config.json"].data)
    assert base_config["auto_map"] == {**AUTO_MAP, "AutoModel": "modeling_zcode_m3.ZCodeM3Model"}


def test_remote_code_without_the_package(shared: tuple[LocalHub, Path, dict[str, Any]], tmp_path: Path) -> None:
    hub, folder, expected = shared
    script = f"""
asked = [what_is_asked(*item) for item in ((AutoModelForSeq2SeqLM, "tester/remote"), (AutoTokenizer, "tester/remote"))]
loaded = [load("tester/remote"), load({str(folder / "saved")!r})]
own_modules = [name for name in sys.modules if name.startswith("hf_moe_ted")]
print(json.dumps({{"asked": asked, "loaded": loaded, "own_modules": own_modules}}))
"""
    env = {**hub.env(), "HF_HOME": str(tmp_path)}
    result = output_of(env, HIDE_PACKAGE, TRANSLATE, LOAD_REMOTE_CODE, script)
    assert result["asked"] == [True, True]
    assert result["own_modules"] == ["hf_moe_ted"]  # the None that hides it
    for loaded in result["loaded"]:
        assert loaded.pop("classes") == [
            "ZCodeM3ForConditionalGeneration",
            "ZCodeM3Config",
            "ZCodeM3Tokenizer",
            "ZCodeM3TranslationPipeline",
            "ZCodeM3ForConditionalGeneration",
            "ZCodeM3Tokenizer",
        ]
        assert set(loaded.pop("modules")) == {"transformers_modules"}
        assert loaded == expected


def test_package_goes_before_remote_code(shared: tuple[LocalHub, Path, dict[str, Any]], tmp_path: Path) -> None:
    """With the package its own classes are loaded, and no trust is asked for."""
    hub, _, _ = shared
    script = """
import json
import hf_moe_ted
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

loaded = [
    AutoTokenizer.from_pretrained("tester/remote"),
    AutoTokenizer.from_pretrained("tester/remote", trust_remote_code=False),
    AutoModelForSeq2SeqLM.from_pretrained("tester/remote"),
    AutoModelForSeq2SeqLM.from_pretrained("tester/remote", trust_remote_code=False),
    AutoModelForSeq2SeqLM.from_pretrained("tester/remote", trust_remote_code=True),
    AutoModel.from_pretrained("tester/base"),
]
print(json.dumps([type(item).__module__ for item in loaded]))
"""
    loaded = output_of({**hub.env(), "HF_HOME": str(tmp_path)}, script)
    modules = ["tokenization_zcode_m3"] * 2 + ["modeling_zcode_m3"] * 4
    assert loaded == [f"hf_moe_ted.models.{module}" for module in modules]
