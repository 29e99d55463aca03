"""Write a report as Markdown, for where HTML is not shown."""

from pretrain_lib.report.blocks import Block, Charts, Note, Report, Samples, Table
from pretrain_lib.run_folder.markdown import escaped, fenced


def to_markdown(report: Report, *, picture: str | None) -> str:
    """Return a report as Markdown; `picture` is the name of the file with its curves, if any."""
    parts = [f"# {escaped(report.title)}", escaped(report.line)]
    for section in report.sections:
        blocks = [_block(block, picture) for block in section.blocks]
        parts += [f"## {escaped(section.title)}", *(block for block in blocks if block)]
    return "\n\n".join(parts) + "\n"


def _block(block: Block, picture: str | None) -> str:
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Samples):
        texts = [fenced(sample.prompt + sample.text) for sample in block.samples]
        return "\n\n".join([f"**{escaped(block.title)}**", *texts])
    if isinstance(block, Charts):
        return f"![Curves]({picture})" if picture and block.group == "curves" else ""
    if isinstance(block, Note):
        return f"{escaped(block.text)} <{block.url}>"
    return escaped(block)


def _table(table: Table) -> str:
    aligned = ["--:" if place in table.numeric else "---" for place in range(len(table.header))]
    rows = [[escaped(cell) for cell in cells] for cells in (table.header, *table.rows)]
    rows.insert(1, aligned)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
