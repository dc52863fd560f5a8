"""The metrics against sacrebleu itself, on bad input, and without network access."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import evaluate
import pytest
import sacrebleu

from hf_moe_ted.metrics import METRICS, metric_path

PREDICTIONS = [
    "Um den Vorgang fortzusetzen, starten Sie den Browser neu .",
    "لم يتم حفظ كلمة المرور",
    "ブラウザを再起動してください。",
    "请重启浏览器以继续。",
    "โปรดรีสตาร์ทเบราว์เซอร์",
    "Закройте вкладку, чтобы Продолжить (2 из 3)",
]
REFERENCES = [
    "Starten Sie den Browser neu, um den Vorgang fortzusetzen.",
    "لم يتم حفظ كلمة مرورك",
    "続行するにはブラウザを再起動してください。",
    "请重新启动浏览器以继续操作。",
    "โปรดรีสตาร์ทเบราว์เซอร์เพื่อดำเนินการต่อ",
    "Чтобы продолжить, закройте вкладку (2 из 3).",
]
SECOND_REFERENCES = [
    "Browser neu starten.",
    "كلمة المرور لم تُحفظ",
    "再起動してください",
    "重启浏览器",
    "รีสตาร์ท",
    "Закройте вкладку",
]
# what a metric cannot do without
REQUIRED = {"off_target": {"language": "de"}}


@pytest.fixture
def load(tmp_path):
    return lambda name: evaluate.load(metric_path(name), cache_dir=str(tmp_path))


@pytest.mark.parametrize("tokenize", ["13a", "intl", "char", "zh", "none"])
@pytest.mark.parametrize("lowercase", [False, True])
def test_bleu_equals_sacrebleu(load, tokenize, lowercase):
    result = load("sacrebleu").compute(
        predictions=PREDICTIONS, references=REFERENCES, tokenize=tokenize, lowercase=lowercase
    )
    expected = sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES], tokenize=tokenize, lowercase=lowercase)
    assert set(result) == {"score", "counts", "totals", "precisions", "bp", "sys_len", "ref_len"}
    assert result == {name: getattr(expected, name) for name in result}
    assert result["score"] > 0


@pytest.mark.parametrize("smoothing", [{"smooth_method": "floor", "smooth_value": 0.5}, {"smooth_method": "add-k"}])
def test_bleu_smoothing(load, smoothing):
    result = load("sacrebleu").compute(predictions=PREDICTIONS[:1], references=["Browser neu"], **smoothing)
    assert result["score"] == sacrebleu.corpus_bleu(PREDICTIONS[:1], [["Browser neu"]], **smoothing).score


def test_bleu_of_one_sentence(load):
    options = {"predictions": ["Neuer Tab"], "references": ["Neuer Tab"]}
    assert load("sacrebleu").compute(**options)["score"] == 0
    assert load("sacrebleu").compute(**options, use_effective_order=True)["score"] == pytest.approx(100)


@pytest.mark.parametrize("word_order", [0, 2])
def test_chrf_equals_sacrebleu(load, word_order):
    result = load("chrf").compute(predictions=PREDICTIONS, references=REFERENCES, word_order=word_order)
    expected = sacrebleu.corpus_chrf(PREDICTIONS, [REFERENCES], word_order=word_order)
    assert result == {"score": expected.score, "char_order": 6, "word_order": word_order, "beta": 2}


@pytest.mark.parametrize("name", METRICS)
def test_flat_and_nested_references_agree(load, name):
    options = REQUIRED.get(name, {})
    nested = load(name).compute(predictions=PREDICTIONS, references=[[text] for text in REFERENCES], **options)
    assert nested == load(name).compute(predictions=PREDICTIONS, references=REFERENCES, **options)


@pytest.mark.parametrize("name, reference_metric", [("sacrebleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())])
def test_several_references(load, name, reference_metric):
    references = [list(pair) for pair in zip(REFERENCES, SECOND_REFERENCES, strict=True)]
    result = load(name).compute(predictions=PREDICTIONS, references=references)
    assert result["score"] == reference_metric.corpus_score(PREDICTIONS, [REFERENCES, SECOND_REFERENCES]).score

    references[0] = references[0][:1]
    result = load(name).compute(predictions=PREDICTIONS, references=references)
    padded = [None, *SECOND_REFERENCES[1:]]
    assert result["score"] == reference_metric.corpus_score(PREDICTIONS, [REFERENCES, padded]).score


def test_length_ratio(load):
    result = load("length_ratio").compute(predictions=["ab", "abcdef"], references=["abcd", "abcde"])
    assert result == {
        "mean_ratio": pytest.approx((0.5 + 1.2) / 2),
        "corpus_ratio": pytest.approx(8 / 9),
        "share_above_threshold": 0.5,
    }
    metric = load("length_ratio")
    assert metric.compute(predictions=["11"], references=["1"], threshold=2)["share_above_threshold"] == 0
    assert metric.compute(predictions=["你好吗"], references=[["你", "你好"]])["mean_ratio"] == 1.5
    assert metric.compute(predictions=["123"], references=[["1234", "12"]])["mean_ratio"] == 1.5


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a", "b"], ["a"], r"predictions \(2\) must equal the number of references \(1\)"),
        ([], [], "empty"),
        (["a"], None, "required"),
        (["a", "b"], [["a"], []], r"Reference 1 \(\[\]\) must be"),
        (["a"], [""], r"Reference 0 \(''\) must be"),
        (["a", None], ["a", "b"], r"Prediction 1 \(None\) must be a string"),
        (["a"], [1], r"Reference 0 \(1\) must be"),
    ],
)
def test_bad_input(load, name, predictions, references, message):
    metric, options = load(name), REQUIRED.get(name, {})
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references, **options)
    # An error leaves nothing behind in the metric.
    good = {"predictions": ["a b c d"], "references": ["a b c d"], **options}
    assert metric.compute(**good) == load(name).compute(**good)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sacrebleu", {"tokenize": "flores200"}),
        ("sacrebleu", {"smooth_method": "linear"}),
        ("chrf", {"char_order": 0}),
        ("chrf", {"word_order": -1}),
        ("length_ratio", {"threshold": 0}),
    ],
)
def test_bad_options(load, name, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        load(name).compute(predictions=["a"], references=["a"], **options)


def test_add_checks_its_input(load):
    with pytest.raises(ValueError, match=r"Reference 0 \(None\)"):
        load("chrf").add(prediction="a")


def test_batches(load):
    metric = load("chrf")
    metric.add(prediction=PREDICTIONS[0], reference=REFERENCES[0])
    metric.add_batch(predictions=PREDICTIONS[1:], references=REFERENCES[1:])
    assert metric.compute() == load("chrf").compute(predictions=PREDICTIONS, references=REFERENCES)


def test_unknown_metric():
    with pytest.raises(ValueError, match=f"'comet'.*{', '.join(METRICS)}"):
        metric_path("comet")


def run_offline(script: str, home: Path) -> str:
    """Run `script` where any connection fails and nothing is cached; return what it prints."""
    block_network = """
        import socket

        def refuse(*args, **kwargs):
            raise AssertionError("network access")

        socket.socket.connect = socket.getaddrinfo = refuse
    """
    source = Path(__file__).parents[2] / "src"
    environment = os.environ | {
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")])),
    }
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(block_network) + textwrap.dedent(script)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_metrics_load_offline(tmp_path):
    script = """
        import json
        import evaluate
        from hf_moe_ted.metrics import METRICS, metric_path

        texts = {name: ["ein neuer Tab in diesem Fenster hier"] for name in ("predictions", "references")}
        names = [name for name in METRICS if name != "off_target"]  # needs an option, which `combine` gives to none
        combined = evaluate.combine([evaluate.load(metric_path(name)) for name in names])
        off_target = evaluate.load(metric_path("off_target"))
        print(json.dumps(combined.compute(**texts) | off_target.compute(**texts, language="de")))
    """
    result = json.loads(run_offline(script, tmp_path).splitlines()[-1])
    assert result["sacrebleu_score"] == pytest.approx(100)
    assert result["chrf_score"] == pytest.approx(100)
    assert result["corpus_ratio"] == 1
    assert result["detected_languages"] == {"de": 1}


def test_import_is_lazy(tmp_path):
    script = """
        import sys
        from hf_moe_ted.metrics import metric_path

        metric_path("chrf")
        print(sorted({"evaluate", "datasets", "sacrebleu"} & set(sys.modules)))
    """
    assert run_offline(script, tmp_path).strip() == "[]"
