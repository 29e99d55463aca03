"""Write a report as one HTML page that needs nothing beside it."""

import json
from datetime import UTC, datetime
from html import escape
from importlib.resources import files

from pretrain_lib.report.blocks import Block, Charts, Note, Report, Samples, Section, Table

# Nothing is loaded from elsewhere, whatever a text of the run contains.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:"
)

ZOOM = '<p class="note">Drag over a chart to zoom in, double-click it to see all of it again.</p>'


def to_html(report: Report, charts: dict) -> str:
    """Return the page of a report; `charts` are the data of `chart_data`."""
    from plotly.offline import get_plotlyjs

    read = {name: files("pretrain_lib.report") / name for name in ("page.css", "page.js")}
    style, script = (path.read_text(encoding="utf-8") for path in read.values())
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    places = [f"section-{number}" for number in range(len(report.sections))]
    links = [
        f'<a href="#{place}">{escape(section.title)}</a>'
        for place, section in zip(places, report.sections, strict=True)
    ]
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{escape(report.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>",
        f"<header><div><h1>{escape(report.title)}</h1><p>{escape(report.line)}</p></div>",
        '<button id="theme" type="button">Light / dark</button></header>',
        f"<nav>{''.join(links)}</nav>\n<main>",
        _facts(report),
        *(_section(*pair) for pair in zip(places, report.sections, strict=True)),
        f"</main>\n<footer>Written by pretrain_lib, {now}.</footer>",
        f'<script id="report-data" type="application/json">{_json(charts)}</script>',
        f"<script>{get_plotlyjs()}</script>\n<script>\n{script}</script>\n</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _json(value: dict) -> str:
    """Return JSON that cannot end the script element that holds it."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _facts(report: Report) -> str:
    cards = [
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd><dd>{escape(remark)}</dd></div>"
        for label, value, remark in report.facts
    ]
    return f'<dl class="facts">{"".join(cards)}</dl>' if cards else ""


def _section(place: str, section: Section) -> str:
    blocks = "\n".join(_block(block) for block in section.blocks)
    return f'<section id="{place}">\n<h2>{escape(section.title)}</h2>\n{blocks}\n</section>'


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Samples):
        return _samples(block)
    if isinstance(block, Charts):
        return f'<div id="{block.group}"></div>{ZOOM * (block.group == "curves")}'
    if isinstance(block, Note):
        link = f'<a href="{escape(block.url)}">{escape(block.url)}</a>'
        return f'<p class="note">{escape(block.text)} {link}</p>'
    return f"<p>{escape(block)}</p>"


def _table(table: Table) -> str:
    def row(cells: tuple[str, ...], *, is_head: bool) -> str:
        written = []
        for place, cell in enumerate(cells):
            tag = "th" if is_head or place == 0 else "td"
            kind = ' class="number"' if place in table.numeric else ""
            written.append(f"<{tag}{kind}>{escape(cell)}</{tag}>")
        return f"<tr>{''.join(written)}</tr>"

    head = f"<thead>{row(table.header, is_head=True)}</thead>" if any(table.header) else ""
    body = "\n".join(row(cells, is_head=False) for cells in table.rows)
    return f'<div class="scroll"><table>{head}<tbody>\n{body}\n</tbody></table></div>'


def _samples(block: Samples) -> str:
    texts = "\n".join(
        f"<pre><b>{escape(sample.prompt)}</b>{escape(sample.text)}</pre>"
        for sample in block.samples
    )
    opened = " open" if block.is_open else ""
    return f"<details{opened}><summary>{escape(block.title)}</summary>\n{texts}\n</details>"
