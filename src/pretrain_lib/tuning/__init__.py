"""Find the learning rates of a recipe by short runs of a smaller model (`pretrain tune`).

Begin with `search`, which chooses the rates to try from the losses of those tried before. `proxy`
describes the smaller model and its runs as settings; `scaling` carries rates from one width to
another; `record` reads what came of the runs, and writes it down.
"""
