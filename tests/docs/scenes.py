"""What a page takes for granted: files, tiny models under the names that the pages use, and names of Python."""

import json
import lzma
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import M2M100Config, M2M100ForConditionalGeneration, NllbMoeForConditionalGeneration, NllbTokenizer

from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer
from hf_moe_ted.testing import TINY_SIZES, tiny_config

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
SHIPPED = Path("examples/checkpoints/zcode_m3_demo")
LANGUAGES = ("de", "es", "fr", "ru", "uk")
NUM_ROWS = {"train": 24, "validation": 4, "test": 3}  # of each language
WITH_SHIPPED_MODEL = ("README.md", "docs/index.md")  # its translations are what these pages show

_MODEL = """
from hf_moe_ted import load_model_and_tokenizer
model, tokenizer = load_model_and_tokenizer("MODEL")
"""
_ROWS = """
import json
rows = [json.loads(line) for line in open("pairs.jsonl")]
"""
PREAMBLES = {
    "docs/translation.md": _MODEL,
}


def make_scene(folder: Path) -> None:
    """Write all files but the shipped model, in seconds."""
    (folder / SHIPPED).parent.mkdir(parents=True)
    for path in (ROOT / "examples").iterdir():
        if path.name not in ("checkpoints", "data", "__pycache__"):
            (folder / "examples" / path.name).symlink_to(path)
    _write_data(folder)
    _write_texts(folder)
    _write_model(folder / SHIPPED)
    (folder / "MODEL").symlink_to(SHIPPED)
    shutil.copy(ROOT / SHIPPED / "config.json", folder)
    _write_nllb_moe(folder / "nllb-moe-54b")
    _write_dense(folder / "m2m100_418M")
    source = FIXTURES / "deepspeed" / "m2m_ep2_zero1_top2_fp32"
    shutil.copytree(source, folder / "runs" / "moe")
    base = torch.load(source / "expected.pt", weights_only=True)["base_config"]
    (folder / "base_config.json").write_text(json.dumps({**base, "model_type": "m2m_100"}))


def scene_of(page: str, template: Path, folder: Path) -> str:
    """Copy the scene for a page.

    Returns:
        The Python that makes the names that the page takes for granted.
    """
    shutil.copytree(template, folder, symlinks=True)
    if page in WITH_SHIPPED_MODEL:
        shutil.rmtree(folder / SHIPPED)
        (folder / SHIPPED).symlink_to(ROOT / SHIPPED)
    return PREAMBLES.get(page, "")


def _write_data(folder: Path) -> None:
    """The shipped text, short sentences of a few languages."""
    (folder / "examples" / "data").mkdir()
    for split, num_rows in NUM_ROWS.items():
        name = f"chromium_l10n.{split}.tsv.xz"
        head, *lines = lzma.decompress((ROOT / "examples" / "data" / name).read_bytes()).decode().splitlines()
        for language in LANGUAGES:
            of_language = [line for line in lines if line.startswith(f"{language}\t") and len(line) < 40]
            head = "\n".join([head, *of_language[:num_rows]])
        (folder / "examples" / "data" / name).write_bytes(lzma.compress(f"{head}\n".encode()))


def _write_texts(folder: Path) -> None:
    pairs = [("Close all tabs", "Alle Tabs schließen"), ("Save", "Speichern"), ("Open", "Öffnen"), ("Yes", "Ja")]
    rows = [{"source": en, "target": de, "src_lang": "en", "tgt_lang": "de"} for en, de in pairs]
    _write_rows(folder / "pairs.jsonl", 8 * rows)
    texts = [{"text": text, "lang": lang} for pair in pairs for text, lang in zip(pair, ("en", "de"), strict=True)]
    _write_rows(folder / "texts.jsonl", 4 * texts)
    for name in ("text.jsonl", "dev.jsonl"):
        _write_rows(folder / name, [{"translation": {"en": en, "de": de}} for en, de in pairs])
    for name in ("input.txt", "in.txt"):
        (folder / name).write_text("Close all tabs.\nOpen the bookmark bar.\n")
    (folder / "table.csv").write_text("id,text\n1,Save\n2,Open\n")
    (folder / "film.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nClose the door.\n")


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _randomized(model: torch.nn.Module) -> Any:
    """With weights, biases and norms that all matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if name.endswith("layer_norm.weight") else 0.0
            parameter.copy_(mean + 0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _write_model(folder: Path) -> None:
    """A tiny model with the tokenizer of the shipped one, in its place."""
    tokenizer = ZCodeM3Tokenizer.from_pretrained(ROOT / SHIPPED)
    config = tiny_config(vocab_size=len(tokenizer), max_position_embeddings=256, num_experts=8)
    _randomized(ZCodeM3ForConditionalGeneration(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_nllb_moe(folder: Path) -> None:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = NllbTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])
    model = NllbMoeForConditionalGeneration.from_pretrained(FIXTURES / "nllb_moe" / "tiny_a")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_dense(folder: Path) -> None:
    tokenizer = ZCodeM3Tokenizer.from_pretrained(ROOT / SHIPPED)
    config = M2M100Config(**{**TINY_SIZES, "vocab_size": len(tokenizer), "pad_token_id": 1})
    _randomized(M2M100ForConditionalGeneration(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
