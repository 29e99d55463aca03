"""Plots and reports of runs.

`pictures` lays out and saves a figure, `curves` draws its lines and marks, `baselines` selects
published scores for comparison, `runs` reads runs. `report` writes the report of runs: `content`
composes its `blocks`, `page` writes them as HTML, `markdown_page` as Markdown.
"""
