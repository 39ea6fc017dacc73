"""Pieces of HTML: escaped text, cells, tables, pictures."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence

from trackbench.evaluation.statistics import Interval


def image(svg: str, description: str) -> str:
    """An SVG inside an ``<img>``: what it holds cannot touch the page."""
    content = base64.b64encode(svg.encode()).decode()
    return f'<img src="data:image/svg+xml;base64,{content}" alt="{text(description)}">'


def table(headers: Sequence[str], body: Sequence[str], *, text_columns: int) -> str:
    """A sortable table from header cells and rows (HTML); the first ``text_columns`` are on the left."""
    head = "".join(
        f'<th class="text">{name}</th>' if index < text_columns else f"<th>{name}</th>"
        for index, name in enumerate(headers)
    )
    return f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def cell(content: str, value: float | None = None, *, is_text: bool = False, best: bool = False) -> str:
    """A cell whose ``content`` is HTML already; ``value`` is what it is sorted by."""
    classes = " ".join(name for name, wanted in (("text", is_text), ("best", best)) if wanted)
    attributes = (f' class="{classes}"' if classes else "") + ("" if value is None else f' data-value="{value:g}"')
    return f"<td{attributes}>{content}</td>"


def number_cell(value: float, shown: str) -> str:
    """``shown``, or a dash where ``value`` is not finite."""
    return cell(shown, value) if math.isfinite(value) else cell("&ndash;", -1)


def shown_range(interval: Interval, sign: str = "") -> str:
    """The ends of an interval in percent."""
    return f"[{100 * interval.low:{sign}.1f}, {100 * interval.high:{sign}.1f}]"


def text(value: object) -> str:
    """Any value as text in which no character is markup."""
    return html.escape(str(value))


def short_number(value: float) -> str:
    """Three digits or all whole ones: 0.012, 3.46, 94381."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
