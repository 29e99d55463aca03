"""Validation loss and lm-eval scores.

`validation` computes the loss on held-out sets. `harness` runs lm-eval on a folder or a live model:
`tasks` finds the tasks, `live_model` implements lm-eval's model interface, `scoring` and
`prefix_trees` compute log-likelihoods, `per_token` adds an accuracy, `all_ranks` distributes
requests over processes, `results` and `references` report scores with published ones. `suites`
lists the tasks of each recipe, `local_tasks` makes tasks from held-out text.
"""
