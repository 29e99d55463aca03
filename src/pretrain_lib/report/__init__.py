"""Plots and reports of runs.

Begin with `report`, which writes the report of runs: `content` composes its `blocks` from `facts`,
`changes` of settings and `score_tables`, `page` writes them as HTML with the `charts`,
`markdown_page` as Markdown. `runs` reads runs. `pictures` lays out and saves a figure, `curves`
draws its lines and marks, `baselines` selects published scores for comparison, `tuned` draws a
search for learning rates.
"""
