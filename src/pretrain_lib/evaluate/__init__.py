"""Validation loss and lm-eval scores.

Begin with `validation`, the loss on held-out sets, and `harness`, which runs lm-eval on a folder or
a live model. `tasks` finds the tasks, `live_model` implements lm-eval's model interface, `scoring`
and `prefix_trees` compute log-likelihoods, `item_faults` names items that cannot be scored.
`per_token` adds an accuracy, `error_bars` those of perplexities, `all_ranks` distributes requests
over processes. `results` and `references` report scores with published ones, `scored` reads them
back. `suites` lists the tasks of each recipe, `local_tasks` makes tasks from held-out text.
"""
