"""Model cards: nothing of them is lost, and the section is there once."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_moe_ted.compression.report.model_card import derived_card, display_name, hub_id, with_section

CARD = """\
---
license: mit
language:
- en
- de
base_model: org/dense
---

# A model

It translates.

```bash
# no title
```
"""


@pytest.mark.parametrize(
    ("source", "identity"),
    [
        ("org/model", "org/model"),
        ("/cache/hub/models--facebook--nllb-moe-54b/snapshots/0a1b2c", "facebook/nllb-moe-54b"),
        ("/home/me/runs/model", None),
        ("model", None),
        ("tests/compression", None),  # a folder that is there
    ],
)
def test_hub_id(source: str, identity: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    assert hub_id(source) == identity
    assert display_name(source) == (identity or Path(source).name)


def test_derived_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    card = derived_card([str(tmp_path)])
    assert str(card).replace("\n\n\n", "\n\n") == CARD

    merged = derived_card([str(tmp_path), "org/a", "org/b"], relation="merge")
    assert merged.data.to_dict() == {
        "license": "mit",
        "language": ["en", "de"],
        "base_model": ["org/a", "org/b"],
        "base_model_relation": "merge",
    }
    new = derived_card(["org/a"], relation="quantized")
    assert new.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "translation",
        "base_model": "org/a",
        "base_model_relation": "quantized",
    }
    assert new.text.strip() == "# Made of org/a"


def test_section(tmp_path: Path) -> None:
    first = with_section(CARD, "## Pruned\n\nhalf \\1")
    rest = first.partition("# A model\n")[2]
    assert ModelCard(first).data.to_dict() == ModelCard(CARD).data.to_dict()
    assert rest.lstrip().startswith("<!-- compression report of hf_moe_ted: begin -->\n## Pruned\n\nhalf \\1\n<!--")
    assert rest.endswith(CARD.partition("# A model\n")[2].lstrip())
    second = with_section(first, "## Pruned\n\nquarter")
    assert second == with_section(CARD, "## Pruned\n\nquarter")
    assert with_section("It translates.\n", "x").endswith("end -->\n\nIt translates.\n")
    assert with_section("", "x").startswith("<!-- compression report")


@pytest.mark.parametrize(
    "pictures",
    ["![a](compression_report/a.png)\n\n*A.*\n", "![A.](compression_report/a.png)\n\n![B](compression_report/b)\n"],
)
def test_sections_of_sources_stay_as_text(pictures: str, tmp_path: Path) -> None:
    section = f"## Pruned\n\nSee. The whole report: [report.md](report.md).\n\n{pictures}\n*End.*"
    (tmp_path / "README.md").write_text(with_section(CARD, section))
    twice = with_section(str(derived_card([str(tmp_path)])), "## Quantized")
    assert twice.count("hf_moe_ted: begin") == 1
    assert (
        twice.index("## Quantized") < twice.index("## Pruned\n\nSee.") < twice.index("*End.*") < twice.index("It trans")
    )
    assert "compression_report/" not in twice and "report.md" not in twice and "*A.*" not in twice


@pytest.mark.parametrize("metadata", ["license: [", "- a list"])
def test_metadata_that_cannot_be_read(metadata: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n# A model\n")
    with pytest.raises(
        ValueError, match=r"(?s)the metadata of .*README.md cannot be read: .*; correct or remove the file"
    ):
        derived_card([str(tmp_path)])
