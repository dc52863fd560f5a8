"""The functions without `evaluate`: the same numbers, the same errors, and nothing loaded early."""

import subprocess
import sys

import evaluate
import pytest

from hf_moe_ted.evaluation import corpus_metrics
from hf_moe_ted.metrics import metric_path

PREDICTIONS = ("Alle Tabs schließen", "Einstellung öffnen .", "42 %", "The settings are in this menu")
REFERENCES = (
    ["Schließen Sie alle Tabs", "Alle Tabs schließen"],
    ["Einstellungen öffnen"],
    "42 %",
    "Die Einstellungen sind in diesem Menü",
)
OPTIONS = {
    "sacrebleu": {"tokenize": "char", "smooth_method": "floor"},
    "chrf": {"word_order": 2},
    "length_ratio": {"threshold": 0.5},
    "off_target": {"language": "de", "candidates": ["de", "en"]},
}
FUNCTIONS = {
    "sacrebleu": corpus_metrics.bleu,
    "chrf": corpus_metrics.chrf,
    "length_ratio": corpus_metrics.length_ratio,
    "off_target": corpus_metrics.off_target,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_the_module_of_evaluate(name, tmp_path):
    options, metric = OPTIONS[name], evaluate.load(metric_path(name), cache_dir=str(tmp_path))
    nested = [[texts] if isinstance(texts, str) else texts for texts in REFERENCES]
    expected = metric.compute(predictions=PREDICTIONS, references=nested, **options)
    assert FUNCTIONS[name](PREDICTIONS, REFERENCES, **options) == expected


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a"], None, "Both predictions and references are required"),
        ([], [], "are empty"),
        (["a", "b"], ["a"], r"predictions \(2\) must equal the number of references \(1\)"),
        ([None], ["a"], r"Prediction 0 \(None\) must be a string"),
        (["a"], [["a", ""]], r"Reference 0 \(\['a', ''\]\) must be one or several strings"),
        (["a"], [1], r"Reference 0 \(1\) must be"),
    ],
)
def test_bad_input(name, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[name](predictions, references, **OPTIONS[name])


def test_scores_load_nothing_early():
    code = """
import sys, hf_moe_ted.evaluation.translation_scores
print(sorted({"evaluate", "datasets", "sacrebleu", "py3langid"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.strip() == b"[]"
