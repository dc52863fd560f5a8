"""Glossaries on text: how often their terms are honoured, and what that does to chrF, by the way they are enforced.

    python examples/benchmarks/bench_glossary.py --model examples/checkpoints/zcode_m3_demo
"""

import argparse
import csv
import json
import lzma
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import regex
import sacrebleu
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from hf_moe_ted import load_model_and_tokenizer
from hf_moe_ted.translation.glossary import Glossary, count_phrase, split_words
from hf_moe_ted.translation.grid_search import Phrase, PhraseTokens, grid_search
from hf_moe_ted.translation.placeholders import lost_placeholders, placeholders

DATA = Path(__file__).parents[1] / "data"
SPACELESS = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}]+")


def pairs_of(path, lang):
    with lzma.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(row["english"], row["target"]) for row in rows if row["lang"] == lang]


def source_terms(text):
    """Words of 4 letters or more and pairs of them, and in scripts without spaces 2 to 4 characters."""
    words = split_words(text)
    found = {w for w in words if len(w) >= 4 and w.isalpha()}
    found |= {f"{a} {b}" for a, gap, b in zip(words, words[1:], words[2:]) if gap == " " and a.isalpha() and b.isalpha() and len(a) >= 4 and len(b) >= 4}
    for run in SPACELESS.findall(text):
        found |= {run[i:i + n] for n in (2, 3, 4, 5, 6) for i in range(len(run) - n + 1)}
    return found


def build_glossary(pairs, min_count=8, min_dice=0.7):
    """Terms whose translation is nearly always the same, by the Dice coefficient of standing in the same pairs."""
    sources, targets, both = Counter(), Counter(), defaultdict(Counter)
    for source, target in pairs:
        of_source, of_target = {t.lower() for t in source_terms(source)}, source_terms(target)
        sources.update(of_source); targets.update(of_target)
        for term in of_source:
            both[term].update(of_target)
    entries = {}
    for term, count in sources.items():
        if not min_count <= count <= 0.05 * len(pairs): continue
        best, together = max(both[term].items(), key=lambda x: (2 * x[1] / (count + targets[x[0]]), len(x[0])), default=("", 0))
        if together and 2 * together / (count + targets[best]) >= min_dice and best.lower() != term:
            entries[term] = best
    return Glossary(entries.items())


class BonusProcessor(LogitsProcessor):
    def __init__(self, phrases, texts, num_beams, prompt_length, eos, bonus):
        self.spellings = [[s.tokens for p in of_row for _ in range(p.count) for s in [None]] if False else [[s.tokens for s in texts.spellings(p)] for p in of_row for _ in range(p.count)] for of_row in phrases]
        self.num_beams, self.start, self.eos, self.bonus = num_beams, prompt_length, eos, bonus

    def __call__(self, input_ids, scores):
        for index, tokens in enumerate(input_ids.tolist()):
            tokens = tokens[self.start:]
            missing = list(self.spellings[index // self.num_beams])
            position = 0
            while position < len(tokens):
                for phrase in missing:
                    hit = next((s for s in phrase if tuple(tokens[position:position + len(s)]) == s), None)
                    if hit:
                        missing.remove(phrase); position += len(hit) - 1
                        break
                position += 1
            if not missing or not tokens: continue
            if tokens[-1] == self.eos: continue
            scores[index, self.eos] = -torch.inf
            for phrase in missing:
                for s in phrase:
                    n = next((n for n in range(len(s) - 1, -1, -1) if n <= len(tokens) and tuple(tokens[len(tokens) - n:]) == s[:n]), 0)
                    scores[index, s[n]] += self.bonus
        return scores


class Bench:
    def __init__(self, model, tokenizer, num_beams, batch=32):
        self.model, self.tokenizer, self.num_beams, self.batch = model, tokenizer, num_beams, batch
        self.texts = PhraseTokens(tokenizer)

    def translate(self, sources, src, tgt, phrases=None, method="none", **options):
        order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
        out = [""] * len(sources)
        for start in range(0, len(order), self.batch):
            batch = order[start:start + self.batch]
            inputs = self.tokenizer([sources[i] for i in batch], padding=True, return_tensors="pt", src_lang=src, truncation=True, max_length=256)
            of_batch = [phrases[i] for i in batch] if phrases else None
            extra = {}
            num_beams = self.num_beams
            if method == "grid":
                extra = dict(custom_generate=grid_search, phrases=of_batch, texts=self.texts, **{"width": num_beams, **options})
                num_beams = 1
            if method == "bonus":
                extra = dict(logits_processor=LogitsProcessorList([BonusProcessor(of_batch, self.texts, num_beams, 2, self.tokenizer.eos_token_id, options["bonus"])]))
            with torch.inference_mode():
                ids = self.model.generate(**inputs, forced_bos_token_id=self.tokenizer.get_lang_id(tgt), num_beams=num_beams, max_new_tokens=min(250, 4 * inputs["input_ids"].shape[1] + 32), return_dict_in_generate=True, **extra).sequences
            for i, text in zip(batch, self.tokenizer.batch_decode(ids, skip_special_tokens=True)):
                out[i] = text
        return out


def markers(sources, occurrences, tag):
    """Sources with markers in place of terms."""
    marked, maps = [], []
    for source, of_source in zip(sources, occurrences):
        pieces, last, names, n = [], 0, {}, 1
        for o in of_source:
            while (name := tag.format(n)) in source or name in names: n += 1
            names[name] = o.target
            pieces += [source[last:o.start], name]; last = o.end
        marked.append("".join(pieces) + source[last:]); maps.append(names)
    return marked, maps


def swapped(texts, maps):
    out = []
    for text, names in zip(texts, maps):
        for name, target in names.items():
            text = text.replace(name, target)
        out.append(text)
    return out


def phrases_of(occurrences):
    found = Counter((o.target, o.is_any_case) for o in occurrences)
    return [Phrase(text, count, True, any_case) for (text, any_case), count in found.items()]


def honoured(phrases, text):
    return sum(min(p.count, count_phrase(p.text, text, may_be_capitalized=p.may_be_capitalized)) for p in phrases)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="examples/checkpoints/zcode_m3_demo")
    parser.add_argument("--directions", default="en-de,en-fr,en-ru,en-zh,en-ja,en-tr,de-en")
    parser.add_argument("--limit", type=int, default=10**6)
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--train", default=DATA / "chromium_l10n.train.tsv.xz")
    parser.add_argument("--test", default=DATA / "chromium_l10n.test.tsv.xz")
    parser.add_argument("--methods", default="bonus2;bonus5;grid;marker")
    args = parser.parse_args()
    model, tokenizer = load_model_and_tokenizer(args.model, "auto", None, "MODEL")
    bench = Bench(model, tokenizer, args.beams)
    for direction in args.directions.split(","):
        src, tgt = direction.split("-")
        other = tgt if src == "en" else src
        flip = (lambda p: p) if src == "en" else (lambda p: [(b, a) for a, b in p])
        glossary = build_glossary(flip(pairs_of(args.train, other)))
        test = flip(pairs_of(args.test, other))[:args.limit]
        occurrences = [glossary.terms_in(s) for s, _ in test]
        keep = [i for i, o in enumerate(occurrences) if o]
        pairs = [test[i] for i in keep]; occurrences = [occurrences[i] for i in keep]
        phrases = [phrases_of(o) for o in occurrences]
        sources, refs = [p[0] for p in pairs], [p[1] for p in pairs]
        consistent = [i for i, (p, r) in enumerate(zip(phrases, refs)) if honoured(p, r) == sum(x.count for x in p)]
        t = time.time(); base = bench.translate(sources, src, tgt); base_s = time.time() - t
        missing = [i for i, (p, b) in enumerate(zip(phrases, base)) if honoured(p, b) < sum(x.count for x in p)]
        total = sum(x.count for p in phrases for x in p)
        print(f"{direction}: {len(glossary.entries)} entries, {len(pairs)} sentences of {len(test)}, {total} terms; reference has {sum(honoured(p, r) for p, r in zip(phrases, refs))}; {len(consistent)} consistent; {len(missing)} missing", list(glossary.entries[:4]), flush=True)

        def report(name, texts, seconds):
            parts = []
            for label, idx in (("all", range(len(pairs))), ("cons", consistent), ("repaired", missing), ("rep&cons", [i for i in missing if i in set(consistent)])):
                idx = list(idx)
                if not idx: continue
                share = sum(honoured(phrases[i], texts[i]) for i in idx) / sum(x.count for i in idx for x in phrases[i])
                chrf = lambda ts: sacrebleu.corpus_chrf([ts[i] for i in idx], [[refs[i] for i in idx]]).score
                parts.append(f"{label} {len(idx)}: {share:.1%} {chrf(base):.2f} {chrf(texts) - chrf(base):+.2f}")
            print(f"   {name:10} {seconds:5.1f}s  " + " | ".join(parts), flush=True)

        report("none", base, base_s)
        for method in args.methods.split(";"):
            texts = list(base)
            t = time.time()
            if method == "marker":
                marked, maps = markers([sources[i] for i in missing], [occurrences[i] for i in missing], "${}")
                new = swapped(bench.translate(marked, src, tgt), maps)
            else:
                options = {"bonus": float(method[5:])} if method.startswith("bonus") else json.loads(method[4:] or "{}")
                new = bench.translate([sources[i] for i in missing], src, tgt, [phrases[i] for i in missing], method[:5].rstrip("{"), **options)
            for i, text in zip(missing, new): texts[i] = text
            report(method, texts, time.time() - t)


main()
