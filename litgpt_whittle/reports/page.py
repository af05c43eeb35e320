"""Build a self-contained HTML page of text, tables and pictures, without other files or network access."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

_STYLE = """
body { max-width: 68rem; margin: 2rem auto; padding: 0 1.5rem; background: #fff; color: #222;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.6rem; margin-bottom: 0; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 0.25rem; padding-top: 0.75rem; border-top: 1px solid #e3e6eb; }
p { margin: 0.25rem 0 0.75rem; color: #555; max-width: 46rem; }
img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0 0.3rem 1.4rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
th { color: #777; font-weight: 500; border-bottom: 1px solid #ccc; }
td { border-bottom: 1px solid #eee; }
pre { padding: 1rem; overflow-x: auto; background: #f6f7f9; font-size: 0.85rem; }
"""


@dataclass(frozen=True)
class Section:
    """A section of a page."""

    title: str
    text: str
    content: str
    """HTML, such as `table`, `picture` and `code` return"""


def page(title: str, sections: Sequence[Section]) -> str:
    """Return the HTML of a page."""
    parts = [f"<h2>{escape(part.title)}</h2>\n<p>{escape(part.text)}</p>\n{part.content}\n" for part in sections]
    head = '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
    head += f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n"
    body = f"<h1>{escape(title)}</h1>\n{''.join(parts)}"
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}</head>\n<body>\n{body}</body>\n</html>\n'


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return the HTML of a table; the first row holds the headings."""
    head, *body = rows
    lines = [_line(head, "th"), *(_line(row, "td") for row in body)]
    return f'<div class="wide"><table>\n{"".join(lines)}</table></div>'


def picture(path: Path, description: str) -> str:
    """Return the HTML of a PNG file, embedded in the page."""
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{content}">'


def code(text: str) -> str:
    """Return the HTML of preformatted text."""
    return f"<pre>{escape(text)}</pre>"


def _line(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"
