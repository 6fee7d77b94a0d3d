"""The one way in which reports become tables: as text that fits a terminal, as HTML for notebooks light and dark."""

from __future__ import annotations

import html
import shutil
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import zip_longest

Row = Sequence[str]

_NARROWEST = 24  # characters down to which a column of sentences is wrapped
# Colors are the page's own, and a gray that shows on white and on black: a notebook may be either.
_STYLE = (
    "<style>.hf-adanorm{max-height:32em;overflow:auto;margin:.5em 0}"
    ".hf-adanorm table{border-collapse:collapse;color:inherit;background:transparent;font-size:90%}"
    ".hf-adanorm th,.hf-adanorm td{text-align:left;vertical-align:top;padding:.25em .8em;color:inherit;"
    "border-bottom:1px solid rgba(128,128,128,.35)}"
    ".hf-adanorm th{cursor:pointer;white-space:nowrap;border-bottom-width:2px}"
    ".hf-adanorm tbody tr:nth-child(even){background:rgba(128,128,128,.12)}</style>"
)
# A click on a heading sorts by that column, and back: by numbers where the cells start with one.
SORT = (
    "const b=this.closest('table').tBodies[0],i=this.cellIndex,s=this.dataset.s=-(this.dataset.s||-1);"
    "[...b.rows].sort((p,q)=>{const x=p.cells[i].innerText,y=q.cells[i].innerText,d=parseFloat(x)-parseFloat(y);"
    "return s*(isNaN(d)?x.localeCompare(y):d)}).forEach(r=>b.append(r))"
)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun.

    >>> counted(1, "step"), counted(1200, "norm")
    ('1 step', '1,200 norms')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def number_template(name: str) -> str:
    """Return the name of a module with `*` for each number.

    >>> number_template("encoder.layer.3.norm")
    'encoder.layer.*.norm'
    """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


class Printed(ABC):
    """A report that prints as a table, and shows as one in a notebook."""

    @abstractmethod
    def _parts(self) -> tuple[str, Row, Sequence[Row], Sequence[str]]:
        """Return a summary, the header and the rows of the table, and sentences that follow it."""

    def __str__(self) -> str:
        summary, header, rows, notes = self._parts()
        return "\n".join(filter(None, [summary, text_table(header, rows) if rows else "", *notes]))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        summary, header, rows, notes = self._parts()
        return html_table(header, rows, " ".join([summary, *notes]))


def text_table(header: Row, rows: Sequence[Row], width: int | None = None) -> str:
    """Return a table in `width` characters (None: those of the terminal, 120 without one).

    Columns of sentences are wrapped to fit. Columns that still do not fit follow below, after a copy of the first one.

    >>> print(text_table(("norm", "status"), [("a.b", "swapped"), ("c", "skipped")]))
    norm  status
    ----  -------
    a.b   swapped
    c     skipped
    """
    room = width or shutil.get_terminal_size((120, 24)).columns
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for i in sorted(range(len(widths)), key=widths.__getitem__, reverse=True):
        over = sum(widths) + 2 * (len(widths) - 1) - room
        least = max(_NARROWEST, *(len(word) for line in lines for word in line[i].split()))
        widths[i] = max(min(widths[i], least), widths[i] - max(over, 0))
    blocks = [[0]]
    for i in range(1, len(widths)):
        if len(blocks[-1]) > 1 and sum(widths[j] + 2 for j in blocks[-1]) + widths[i] > room:
            blocks.append([0])
        blocks[-1].append(i)
    return "\n\n".join(_block(lines, {i: widths[i] for i in block}) for block in blocks)


def _block(lines: Sequence[Row], widths: dict[int, int]) -> str:
    out = []
    for line in lines:
        cells = (textwrap.wrap(line[i], w, break_long_words=False, break_on_hyphens=False) for i, w in widths.items())
        parts = zip_longest(*cells, fillvalue="")
        out += ["  ".join(map(str.ljust, part, widths.values())).rstrip() for part in parts]
        if line is lines[0]:
            out.append("  ".join("-" * w for w in widths.values()))
    return "\n".join(out)


def html_table(header: Row, rows: Sequence[Row], summary: str = "") -> str:
    """Return a table for a notebook below a summary. A click on a heading sorts it, and a long one scrolls."""
    head = "".join(f'<th onclick="{SORT}">{html.escape(name)}</th>' for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if rows else ""
    return f'{_STYLE}<p>{html.escape(summary)}</p><div class="hf-adanorm">{table}</div>'
