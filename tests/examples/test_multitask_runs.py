"""Translations at the end of an experiment's runs."""

from pathlib import Path

import pytest
from multitask_data import Row
from multitask_runs import eval_capacity, translate
from tiny_sizes import SIZES

from hf_moe_ted import ZCodeM3Config, ZCodeM3ForConditionalGeneration, load_model_and_tokenizer

DEMO = Path(__file__).parents[2] / "examples" / "checkpoints" / "zcode_m3_demo"
TEXTS = [
    "You can use all websites and apps that are open in this window until you close it or until your computer restarts",
    "This extension can read and change your data on all websites that you visit with this device",
    "Your administrator has turned off the settings for printing in this browser and for all other users",
    "If you delete your browsing history, all tabs that are open on your other devices will be closed, too",
]


def test_translations_have_no_capacity() -> None:
    model, tokenizer = load_model_and_tokenizer(DEMO)
    rows: list[Row] = [{"source": text, "target": "", "src_lang": "en", "tgt_lang": "de"} for text in TEXTS]
    expected = translate(model, tokenizer, rows, max_length=64)
    model.config.eval_capacity_factor, model.config.min_capacity = 0.01, 0
    assert translate(model, tokenizer, rows, max_length=64) == expected
    assert model.config.eval_capacity_factor == 0.01
    inputs = tokenizer(TEXTS, src_lang="en", padding=True, return_tensors="pt")
    output = model.generate(**inputs, num_beams=1, max_length=64, forced_bos_token_id=tokenizer.get_lang_id("de"))
    assert tokenizer.batch_decode(output, skip_special_tokens=True) != expected  # the capacity matters here


def test_a_capacity_is_given_back_after_an_error() -> None:
    model = ZCodeM3ForConditionalGeneration(ZCodeM3Config(**SIZES, eval_capacity_factor=2.0))
    with pytest.raises(RuntimeError, match="stop"), eval_capacity(model, None):
        assert model.model.encoder.layers[1].ffn.router.eval_capacity_factor is None
        raise RuntimeError("stop")
    assert model.config.eval_capacity_factor == 2.0
