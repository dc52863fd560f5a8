import json
from pathlib import Path

import pytest
import torch

from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer
from hf_moe_ted.testing import tiny_config


@pytest.fixture
def model_and_text(tmp_path: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    folder, text = tmp_path / "full", tmp_path / "text.jsonl"
    ZCodeM3ForConditionalGeneration(tiny_config(vocab_size=272)).save_pretrained(folder)
    ZCodeM3Tokenizer(languages=["en", "de"]).save_pretrained(folder)
    rows = [{"translation": {"en": "save", "de": "speichern"}}, {"translation": {"en": "yes, close", "de": "ja"}}]
    text.write_text("\n".join(map(json.dumps, rows)))
    return folder, text
