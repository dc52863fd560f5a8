"""Pictures of routing: what stands in them, that colours can be told apart and read, and that texts stay texts."""

from collections.abc import Callable
from html.parser import HTMLParser
from itertools import combinations
from typing import Any

import pytest
import torch

from hf_moe_ted import ZCodeM3ForConditionalGeneration, ZCodeM3Tokenizer, collect_expert_statistics
from hf_moe_ted.routing.routing_similarity import nearest_languages
from hf_moe_ted.routing.token_picture import (
    expert_colours,
    relative_luminance,
    similar_languages,
    similar_languages_picture,
    token_picture,
)
from hf_moe_ted.routing.token_routing import LayerTokenRouting, SideRouting, TokenRouting, token_routing

MakeModel = Callable[..., ZCodeM3ForConditionalGeneration]


class Boxes(HTMLParser):
    """The boxes of tokens in a page, and the names of all elements."""

    def __init__(self, page: str):
        super().__init__()
        self.names: set[str] = set()
        self.boxes: list[dict[str, str]] = []
        self.directions: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        fields = {name: value or "" for name, value in attrs}
        if fields.get("class") == "token":
            self.boxes.append({**fields, "text": ""})
        if "dir" in fields:
            self.directions.append(fields["dir"])

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.boxes:
            self.boxes[-1]["text"] += data


def side_of(tokens: tuple[str, ...], rows: list[tuple[list[int], list[int], list[float]]], **fields: Any) -> Any:
    columns = [torch.tensor(column) for column in zip(*rows, strict=True)]
    layer = LayerTokenRouting(1, 4, columns[0], columns[2], columns[1])
    return SideRouting(**{"side": "encoder", "language": "en", "tokens": tokens, "layers": (layer,), **fields})


EMPTY = SideRouting("decoder", "de", ("</s>",), ())


def test_experts_weights_and_what_was_full() -> None:
    rows = [([3, 1], [3, 1], [0.75, 0.25]), ([4, 2], [3, 2], [0.0, 1.0]), ([4, 4], [3, 0], [0.0, 0.0])]
    page = Boxes(token_picture(TokenRouting(side_of(("a", " b", ""), rows), EMPTY)))
    colours = expert_colours(4)
    assert [box["text"] for box in page.boxes[:2]] == ["a3+1", " b2"]
    assert page.boxes[2]["text"].startswith("·full")
    assert [box["title"] for box in page.boxes] == [
        "expert 3: 0.750, expert 1: 0.250",
        "expert 3: full, not computed, expert 2: 1.000",
        "expert 3: full, not computed, expert 0: full, not computed",
    ]
    styles = [box["style"] for box in page.boxes]
    assert f"background:{colours[3].background}" in styles[0] and f"-4px {colours[1].background}" in styles[0]
    assert f"background:{colours[2].background}" in styles[1] and "box-shadow" not in styles[1]
    assert "dashed" in styles[2] and "dashed" not in styles[0]
    assert "All layers of the decoder are dense" in page.text


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&lt;b&gt;", "</td>"])
def test_texts_stay_texts(text: str) -> None:
    rows = [([0], [0], [1.0])]
    page = Boxes(token_picture(TokenRouting(side_of((text,), rows, language=text), EMPTY)))
    assert page.names <= {"h4", "p", "table", "tbody", "tr", "th", "td", "span", "bdi", "sub"}
    assert page.boxes[0]["text"].startswith(f"{text}0")
    assert f"Source, in the encoder ({text})" in page.text


@pytest.mark.parametrize(("language", "direction"), [("ar", "rtl"), ("heb_Hebr", "rtl"), ("en", "ltr"), ("xx", "ltr")])
def test_direction_is_that_of_the_language(language: str, direction: str) -> None:
    side = side_of(("a",), [([0], [0], [1.0])], language=language)
    assert Boxes(token_picture(TokenRouting(side, EMPTY))).directions == [direction]


def test_picture_is_the_routing(make_model: MakeModel, tokenizer: ZCodeM3Tokenizer) -> None:
    model = make_model(num_experts_per_tok=2, normalize_router_weights="after_dropping", num_experts=[3, 6, 4])
    routing = token_routing(model, tokenizer, "close <b>\n", "schließen", "en", "de")
    boxes = Boxes(token_picture(routing)).boxes
    expected = [
        (token.replace("\n", "⏎") or "·", "+".join(map(str, ids)))
        for side in (routing.encoder, routing.decoder)
        for layer in side.layers
        for token, ids in zip(side.tokens, layer.expert_ids.tolist(), strict=True)
    ]
    assert [(box["data-experts"]) for box in boxes] == [ids for _, ids in expected]
    for box, (token, ids) in zip(boxes, expected, strict=True):
        assert box["text"].startswith(token + ids)


# --- colours


@pytest.mark.parametrize("num_experts", [1, 2, 8, 16, 128])
def test_ink_can_be_read(num_experts: int) -> None:
    for background, ink in expert_colours(num_experts):
        darker, lighter = sorted((relative_luminance(background), relative_luminance(ink)))
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5  # WCAG 2.2, AA


@pytest.mark.parametrize(("num_experts", "distance"), [(4, 40), (8, 20), (16, 9), (64, 5), (128, 2)])
def test_colours_can_be_told_apart(num_experts: int, distance: float) -> None:
    points = [lab(colour.background) for colour in expert_colours(num_experts)]
    assert min(torch.dist(a, b).item() for a, b in combinations(points, 2)) >= distance


def test_as_many_colours_as_experts() -> None:
    colours = expert_colours(128)
    assert len({colour.background for colour in colours}) == len(colours) == 128


def lab(colour: str) -> torch.Tensor:
    """CIE L*a*b*, in which a distance of 2 is just seen."""
    values = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = torch.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    matrix = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = matrix @ linear / torch.tensor([0.9505, 1.0, 1.089])
    f = torch.where(xyz > (6 / 29) ** 3, xyz ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# --- languages


def test_similar_languages(make_model: MakeModel, tokenizer: ZCodeM3Tokenizer, rows: list[dict[str, str]]) -> None:
    statistics = collect_expert_statistics(make_model(), tokenizer, rows)
    nearest = nearest_languages(statistics)
    for side in ("encoder", "decoder"):
        for language in ("en", "de", "fr"):
            found = similar_languages(statistics, side, language)
            assert found[0] == nearest[side][language]
            assert {other for other, _ in found} == {"en", "de", "fr"} - {language}
            assert found == sorted(found, key=lambda pair: -pair[1])
            assert similar_languages(statistics, side, language, limit=1) == found[:1]
    assert similar_languages(statistics, "encoder", "sw") == []
    picture = Boxes(similar_languages_picture(statistics, "en", "<b>"))
    assert "Languages routed like en, in the encoder" in picture.text and "b" not in picture.names
    assert f"{similar_languages(statistics, 'encoder', 'en')[0][1]:.2f}" in picture.text
    assert "no other language to compare" in picture.text  # for a language that it does not have


def test_similar_languages_of_a_dense_side(
    make_model: MakeModel, tokenizer: ZCodeM3Tokenizer, rows: list[dict[str, str]]
) -> None:
    statistics = collect_expert_statistics(make_model(decoder_sparse_step=0), tokenizer, rows)
    assert similar_languages(statistics, "decoder", "en") == []
    assert len(similar_languages(statistics, "encoder", "en")) == 2
