"""A smoke test of an installed package, by its public names alone: `python smoke.py FOLDER`, without pytest.

FOLDER is examples/checkpoints/zcode_m3_demo. Run outside of the source tree, so that nothing of it is imported.
"""

import subprocess
import sys
from importlib.metadata import files, version
from pathlib import Path

import hf_moe_ted
from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer, ZCodeM3TranslationPipeline
from hf_moe_ted.metrics import METRICS, metric_path


def main(folder: str) -> None:
    place = Path(hf_moe_ted.__file__).resolve()
    if Path.cwd().resolve() in place.parents:
        raise AssertionError(f"{place} is imported, not what was installed")
    assert hf_moe_ted.__version__ == version("hf-moe-ted")
    names = {str(file) for file in files("hf-moe-ted") or ()}
    for wanted in ("hf_moe_ted/py.typed", "hf_moe_ted/conversion/rules/"):
        assert any(name.startswith(wanted) for name in names), f"the wheel lacks {wanted}"
    for name in hf_moe_ted.__all__:
        try:
            getattr(hf_moe_ted, name)
        except ValueError as error:  # what needs an extra says which
            assert "pip install 'hf-moe-ted[" in str(error), error
    for metric in METRICS:
        assert Path(metric_path(metric), f"{metric}.py").is_file(), f"the wheel lacks the metric {metric}"

    model, tokenizer = (cls.from_pretrained(folder) for cls in (ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer))
    translator = ZCodeM3TranslationPipeline(model=model, tokenizer=tokenizer, src_lang="en", tgt_lang="de")
    translation = translator("Close all tabs", num_beams=4)[0]["translation_text"]
    assert translation.strip() == "Alle Tabs schließen", translation

    shown = run_command("--version")
    assert version("hf-moe-ted") in shown, shown
    Path("input.txt").write_text("Close all tabs\n", encoding="utf-8")
    run_command("translate", folder, "input.txt", "output.txt", "--src", "en", "--tgt", "de", "--device", "cpu")
    assert Path("output.txt").read_text(encoding="utf-8").strip() == "Alle Tabs schließen"
    print(f"hf-moe-ted {shown.strip()} in {place.parent}: all well")


def run_command(*arguments: str) -> str:
    """What the installed command prints."""
    command = [str(Path(sys.executable).with_name("hf-moe-ted")), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


if __name__ == "__main__":
    main(sys.argv[1])
