"""The card of the shipped model is its template, with scores."""

import re
import sys
from pathlib import Path

import pytest
import shipped_model_card
from translation_cases import quality_of

CARD = Path(__file__).parents[2] / "examples" / "checkpoints" / "zcode_m3_demo" / "README.md"


def test_the_card_has_the_text_of_the_template() -> None:
    template = re.escape(shipped_model_card.TEMPLATE.read_text(encoding="utf-8"))
    for name in ("rows", "other_rows"):
        template = template.replace(re.escape(f"{{{name}}}"), r"(\| .* \|\n)*\| .* \|")
    assert re.fullmatch(template, CARD.read_text(encoding="utf-8"))


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A direction, its way back, the next language, means; other texts as means alone."""
    quality_of({("fr", "en"): 60.0, ("en", "fr"): 50.0, ("en", "de"): 40.0, ("de", "en"): 30.0}).save(tmp_path / "test")
    quality_of({("en", "de"): 20.0, ("de", "en"): 10.0, ("en", "fr"): 22.0}, length_ratio=1.1).save(tmp_path / "short")
    quality_of({("fr", "de"): 55.0, ("de", "fr"): 57.0}).save(tmp_path / "direct")
    files = [str(tmp_path / name) for name in ("test", "short", "direct")]
    monkeypatch.setattr(sys, "argv", ["shipped_model_card.py", *files, "--output", str(tmp_path / "README.md")])
    shipped_model_card.main()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (
        """
| en-de | 10 | 40.0 | 20.0 | 1.00 | 3.0 |
| de-en | 10 | 30.0 | 15.0 | 1.00 | 3.0 |
| en-fr | 10 | 50.0 | 25.0 | 1.00 | 3.0 |
| fr-en | 10 | 60.0 | 30.0 | 1.00 | 3.0 |
| **English to X** | 20 | 45.0 | 22.5 | 1.00 | 3.0 |
| **X to English** | 20 | 45.0 | 22.5 | 1.00 | 3.0 |
"""
        in card
    )
    assert (
        """
| one or two words, English to X | 20 | 21.0 | 1.10 |
| one or two words, X to English | 10 | 10.0 | 1.10 |
| between two other languages, 2 directions | 20 | 56.0 | 1.00 |
"""
        in card
    )
    assert [*tmp_path.glob(".*")] == []
