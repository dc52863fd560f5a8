"""Pictures of a GPU's memory use, with a bar per layout or way; matplotlib is imported when one is drawn."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ..files.output import check_output_file, write_file
from ..routing.pictures import as_png, has_matplotlib, new_figure
from .memory import Memory
from .serving_memory import ServingMemory

GIB = 2**30
MAX_BARS = 20
TITLE = "hf-moe-ted plan"  # in the metadata of the file


def memory_terms(memory: Memory | ServingMemory) -> dict[str, int]:
    """Bytes of a GPU by term at its peak; the terms add up to the peak.

    Args:
        memory: memory of a rank that trains, or of a GPU that translates.
    """
    terms = {name: value for name, value in asdict(memory).items() if name != "host" and value}
    if isinstance(memory, Memory):
        at_step = ("weights", "gradients", "optimizer", "optimizer_tiles")
        at_loss = [name for name in terms if name not in ("gradients", "optimizer_tiles")]
        kept = at_step if memory.at_step > memory.at_loss else at_loss
        terms = {name: value for name, value in terms.items() if name in kept}
    return terms


def draw_memory(bars: Mapping[str, Memory | ServingMemory], limit: float, title: str = "") -> bytes:
    """A PNG with a bar of stacked terms in GiB for each memory, and a line at the usable memory.

    Args:
        bars: memories by name, at most `MAX_BARS`, drawn from top to bottom.
        limit: usable bytes of a GPU.
        title: title above the bars.

    Raises:
        ValueError: there are no bars, or too many.
    """
    if not 0 < len(bars) <= MAX_BARS:
        raise ValueError(f"a picture has 1 to {MAX_BARS} bars, not {len(bars)}")
    terms = {name: memory_terms(memory) for name, memory in bars.items()}
    figure = new_figure(9, 1.5 + 0.35 * len(bars))
    axis = figure.subplots()
    starts = dict.fromkeys(terms, 0.0)
    for kind in dict.fromkeys(kind for of_bar in terms.values() for kind in of_bar):
        widths = [of_bar.get(kind, 0) / GIB for of_bar in terms.values()]
        axis.barh(range(len(terms)), widths, left=[*starts.values()], label=kind.replace("_", " "))
        starts = {name: start + width for (name, start), width in zip(starts.items(), widths, strict=True)}
    axis.axvline(limit / GIB, color="black", linewidth=1, linestyle="--", label="usable")
    axis.set_yticks(range(len(terms)), [*map(_line, terms)], fontsize=8, parse_math=False)
    axis.set(xlabel="GiB of a GPU", ylim=(len(terms) - 0.5, -0.5))
    axis.set_title(title, fontsize=9, parse_math=False)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return as_png(figure, dpi=120, title=TITLE)


def _line(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:59]}…"


def write_memory_picture(
    path: str | Path, bars: Mapping[str, Memory | ServingMemory], limit: float, title: str = ""
) -> None:
    """Draw the memories and write a PNG file, which appears once it is complete. An earlier picture is replaced.

    Args:
        path: path of the file; its name ends with .png.
        bars, limit, title: as in [`draw_memory`].

    Raises:
        ValueError: matplotlib is not installed, the name does not end with .png, or another file exists there.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"picture ({path}) must end with .png")
    if not has_matplotlib():
        raise ValueError(f"picture ({path}) needs matplotlib: pip install 'hf-moe-ted[viz]'")
    check_output_file(path, overwrite=True, marker=TITLE.encode())
    write_file(path, draw_memory(bars, limit, title))


__all__ = ["MAX_BARS", "draw_memory", "memory_terms", "write_memory_picture"]
