"""Pictures of what was found, where matplotlib is installed. Nothing here touches its global state."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DPI = 110


def can_draw() -> bool:
    """Whether matplotlib is there: the extra ``eval`` has it."""
    return importlib.util.find_spec("matplotlib") is not None


def curves(record: Mapping[str, Any]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Curves of a record of perplexity: what they are by, of which source ("" is all), and their rows."""
    found = [("document", "", record["by_document_position"]), ("pack", "", record["by_pack_position"])]
    if len(record["by_source"]) > 1:
        found += [("document", name, row["by_document_position"]) for name, row in record["by_source"].items()]
    return found


def draw_perplexity(record: Mapping[str, Any], title: str) -> bytes:
    """Loss by position in the document (all, and each source) and in the pack, as PNG."""
    figure = _figure(8.0, 4.5)
    axis = figure.add_subplot()
    for by, source, rows in curves(record):
        name = Path(source).name if source else f"position in the {by}"
        middles = [(row["from"] * row["to"]) ** 0.5 for row in rows]
        style = {"linewidth": 2.0, "marker": "o"} if not source else {"linewidth": 1.0, "linestyle": "--"}
        if by == "pack":
            style |= {"color": "gray"}
        axis.plot(middles, [row["loss"] for row in rows], label=name, **style)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("position (tokens of context)")
    axis.set_ylabel("nats per token")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.legend()
    return _png(figure)


def draw_needle(record: Mapping[str, Any], title: str) -> bytes:
    """Share of answers found by length and depth, as PNG."""
    cells = record["cells"]
    lengths, depths = (list(dict.fromkeys(cell[name] for cell in cells)) for name in ("length", "depth"))
    found = {(cell["depth"], cell["length"]): cell["found"] for cell in cells}
    figure = _figure(2.5 + 0.9 * len(lengths), 2.0 + 0.45 * len(depths))
    axis = figure.add_subplot()
    image = axis.imshow(
        [[found[depth, length] for length in lengths] for depth in depths],
        vmin=0.0,
        vmax=1.0,
        cmap="RdYlGn",
        aspect="auto",
    )
    for row, depth in enumerate(depths):
        for column, length in enumerate(lengths):
            axis.text(
                column,
                row,
                f"{found[depth, length]:.0%}",
                ha="center",
                va="center",
                fontsize=8,
                color="black" if 0.2 < found[depth, length] < 0.9 else "white",
            )
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=30, ha="right")
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axis.set_xlabel("tokens of the pack")
    axis.set_ylabel("depth of the needle")
    axis.set_title(title, fontsize=10)
    figure.colorbar(image, label="answers found")
    return _png(figure)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    return content.getvalue()
