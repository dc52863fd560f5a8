"""Cards that this package writes pass the validation of huggingface_hub, and say what is true of their model."""

import json
import textwrap
from pathlib import Path

import pytest
from local_hub import LocalHub, card_errors, run_python
from translation_cases import quality_of

from hf_moe_ted import write_translation_card

ROOT = Path(__file__).parents[2]
REPOSITORIES = {("models", "tester/full"), ("datasets", "tester/text")}

CARD = """---
license: mit
library_name: transformers
pipeline_tag: translation
language: [en, de, zh]
model-index:
- name: full
  results:
  - task: {type: translation}
    dataset: {type: tester/text, name: text}
    metrics: [{type: bleu, value: 99.5}]
---

# Full

## Scores

BLEU 99.5.
"""

SCRIPT = """
    import json
    from huggingface_hub import HfApi, ModelCard, snapshot_download
    from hf_moe_ted import (
        DirectionQuality, TranslationQuality, ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer, prune_experts,
        quantize_experts, write_translation_card,
    )
    from hf_moe_ted.testing import tiny_config

    tokenizer = ZCodeM3Tokenizer(languages=["en", "de_DE", "zho_Hans"])
    model = ZCodeM3ForConditionalGeneration(tiny_config(num_experts=4, vocab_size=len(tokenizer)))
    for folder in ("full", "tuned"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    open("full/README.md", "w").write(CARD)
    api = HfApi()
    api.create_repo("tester/text", repo_type="dataset")
    api.create_repo("tester/full")
    api.upload_folder(repo_id="tester/full", folder_path="full")

    source = snapshot_download("tester/full")
    languages = ["de_DE", "zho_Hans"]
    prune_experts(source, None, keep=2, criterion="random", languages=languages, output_dir="pruned")
    quantize_experts(source, output_dir="int8")
    direction = DirectionQuality(
        num_sentences=20, bleu=31.26, bleu_tokenizer="13a", chrf=52.5, source_chrf=3.0, length_ratio=0.97,
        off_target=0.02, reference_off_target=0.0, num_cut=0, seconds=1.0, text_sha256="0" * 64,
    )
    quality = TranslationQuality(
        model="tuned", directions={("en", "zho_Hans"): direction, ("zho_Hans", "en"): direction}, batch_size=2,
        num_beams=4, max_new_tokens=9, device="cpu", dtype="float32", num_bytes=1, peak_memory_bytes=None,
    )
    for _ in range(2):
        write_translation_card("tuned", quality, base_model="tester/full")
    cards = {}
    for name in ("pruned", "int8", "tuned"):
        card = ModelCard.load(f"{name}/README.md")
        card.validate()
        api.create_repo(f"tester/{name}")
        api.upload_folder(repo_id=f"tester/{name}", folder_path=name)
        cards[name] = [card.data.to_dict(), card.text]
    card.data.language = ["zho_Hans"]
    try:
        card.validate()
    except ValueError as error:
        cards["wrong"] = str(error)
    print(json.dumps(cards))
"""


def test_cards(local_hub: LocalHub, tmp_path: Path) -> None:
    place = f"import os\nos.chdir({str(tmp_path)!r})\nCARD = {CARD!r}\n"
    cards = json.loads(run_python(place + textwrap.dedent(SCRIPT), local_hub.env()).splitlines()[-1])
    shared = {"library_name": "transformers", "pipeline_tag": "translation", "base_model": "tester/full"}

    data, text = cards["pruned"]
    assert data == shared | {"license": "mit", "language": ["de", "zh"]}
    assert "## Scores of the model from which this one was made\n" in text

    data, text = cards["int8"]
    assert data == shared | {"license": "mit", "language": ["en", "de", "zh"], "base_model_relation": "quantized"}

    data, text = cards["tuned"]
    assert data == shared | {"language": ["en", "zh"]}
    assert text.count("## Translation quality") == 1 and text.lstrip().startswith("# tuned")
    assert "| en-zho_Hans | 20 | 52.5 | 31.3 | 0.97 | 2.0% |" in text
    assert "| **all directions** | 40 | 52.5 |" in text
    assert "codes of ISO 639" in cards["wrong"]


def test_card_of_directions_without_bleu(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    pairs = {("en", "de"): 40.0, ("de", "en"): 60.0}
    text = write_translation_card(tmp_path, quality_of(pairs, bleu={("en", "de"): None})).read_text(encoding="utf-8")
    assert "| en-de | 10 | 40.0 |  | 1.00 | 0.0% |" in text and "| **all directions** | 20 | 50.0 | 30.0 |" in text
    assert "BLEU is empty where no reference has four tokens." in text and card_errors(text, REPOSITORIES) == []
    text = write_translation_card(tmp_path, quality_of(pairs)).read_text(encoding="utf-8")
    assert "BLEU is empty" not in text and "share of translations with 25 letters or more whose" in text


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ("language: zho_Hans", "language"),
        ("pipeline_tag: translating", "pipeline_tag"),
        ("license: free", "license"),
        ("base_model: tester/other", "tester/other"),
        ("datasets: [tester/other]", "tester/other"),
        ("model-index: [{name: a, results: [{task: {type: translation}}]}]", "model-index"),
    ],
)
def test_hub_refuses(metadata: str, error: str) -> None:
    (found,) = card_errors(f"---\n{metadata}\n---\n# Model\n", REPOSITORIES)
    assert error in found


def test_card_of_the_shipped_model() -> None:
    card = (ROOT / "examples/checkpoints/zcode_m3_demo/README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and card_errors(card, REPOSITORIES) == []
