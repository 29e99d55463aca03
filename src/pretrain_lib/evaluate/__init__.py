"""Validation loss and lm-eval scores.

`validation` computes the loss on held-out text. `harness` runs lm-eval on a folder or a live model:
`tasks` finds its tasks, `live_model` is the model as lm-eval sees it, `scoring`, `prefix_trees` and
`per_token` compute its log-likelihoods, `team` shares the requests among processes, `results` and
`references` report them beside published figures. `local_tasks` makes tasks from held-out text.
"""
