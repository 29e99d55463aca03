"""A run, from the recipe's command line to its last checkpoint.

Read `run_recipe` (the command-line program around a recipe), `run` (its parts put together),
`loop` (the training loop), `step` (one optimizer step). Around them: `placement` and
`first_weights` place and initialize the model, `speed` compiles it, `resume` finds where to go on,
`evaluation` validates, samples and scores, `rollback` and `watch` handle spikes and signals,
`banner` prints the settings. `trainer_collator` feeds our windows to transformers' Trainer.
"""
