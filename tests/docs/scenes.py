"""What a page takes for granted: files, tiny models under the names that the pages use, and names of Python."""

import itertools
import json
import lzma
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    NllbMoeForConditionalGeneration,
    NllbTokenizer,
)

from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer
from hf_moe_ted.testing import tiny_config

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
SHIPPED = Path("examples/checkpoints/zcode_m3_demo")
NUM_ROWS = {"train": 8, "validation": 2, "test": 1}  # of each language
WITH_SHIPPED_MODEL = ("README.md", "docs/index.md")  # its translations are what these pages show

PREAMBLES = {
    "docs/translation.md": """
import torch
from hf_moe_ted import ZCodeM3TranslationPipeline, load_model_and_tokenizer
model, tokenizer = load_model_and_tokenizer("MODEL", device="cuda" if torch.cuda.is_available() else "cpu")
translator = ZCodeM3TranslationPipeline(model=model, tokenizer=tokenizer, src_lang="en", tgt_lang="de")
inputs = tokenizer("Close all tabs", src_lang="en", return_tensors="pt").to(model.device)
""",
    "docs/ted.md": """
import os
os.environ["ACCELERATE_USE_CPU"] = "true"
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, TrainingArguments
from hf_moe_ted import StepSnapshot, TedTrainer, ZCodeM3Tokenizer, bounded_expert_load
folder = "MODEL"
tokenizer = ZCodeM3Tokenizer.from_pretrained(folder, src_lang="en", tgt_lang="de")
collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
dataset = 16 * [tokenizer("Close all tabs", text_target="Alle Tabs schließen")]
loader = DataLoader(dataset, batch_size=4, collate_fn=collator)
texts = 8 * [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}]
""",
}


def make_scene(folder: Path) -> None:
    """Write all files but the shipped model, in seconds."""
    (folder / SHIPPED).parent.mkdir(parents=True)
    for path in (ROOT / "examples").iterdir():
        if path.name not in ("checkpoints", "data", "__pycache__"):
            (folder / "examples" / path.name).symlink_to(path)
    (folder / "docs").mkdir()
    (folder / "docs" / "experiments").symlink_to(ROOT / "docs" / "experiments")
    _write_data(folder)
    _write_texts(folder)
    _write_model(folder / SHIPPED)
    (folder / "MODEL").symlink_to(SHIPPED)
    config = json.loads((ROOT / SHIPPED / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    _write_nllb_moe(folder / "nllb-moe-54b")
    _write_mixtral(folder / "mixtral")
    source = FIXTURES / "deepspeed" / "m2m_ep2_zero1_top2_fp32"
    shutil.copytree(source, folder / "runs" / "moe")
    config = M2M100Config(**torch.load(source / "expected.pt", weights_only=True)["base_config"])
    M2M100ForConditionalGeneration(config).save_pretrained(folder / "m2m100_418M")
    for name in ("european", "asian"):
        shutil.copytree(folder / SHIPPED, folder / "runs" / name)


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
    """The shipped text, some short sentences of each language."""
    (folder / "examples" / "data" / "short").mkdir(parents=True)
    for text, (split, num_rows) in itertools.product(("chromium_l10n", "short/chromium_l10n_short"), NUM_ROWS.items()):
        name = f"{text}.{split}.tsv.xz"
        head, *lines = lzma.decompress((ROOT / "examples" / "data" / name).read_bytes()).decode().splitlines()
        short = [line for line in lines if len(line) < 40]
        for language in sorted({line.split("\t")[0] for line in short}):
            of_language = [line for line in short if line.startswith(f"{language}\t")]
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


def _randomized(model: Any) -> Any:
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
    config = tiny_config(vocab_size=len(tokenizer), max_position_embeddings=256, num_experts=8, num_experts_per_tok=1)
    model = _randomized(ZCodeM3ForConditionalGeneration(config))
    with torch.no_grad():  # most translations end soon
        end = model.get_input_embeddings().weight[config.eos_token_id]
        model.model.decoder.layer_norm.bias.add_(7 * end / end.norm())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_nllb_moe(folder: Path) -> None:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = NllbTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])
    model = NllbMoeForConditionalGeneration.from_pretrained(FIXTURES / "nllb_moe" / "tiny_a")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_mixtral(folder: Path) -> None:
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
