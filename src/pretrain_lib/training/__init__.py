"""Training, from the command line of a recipe to the last checkpoint.

Start with `run_recipe` (the command-line program around a recipe), `run` (assembles the parts of a
run), `loop` (the training loop) and `step` (one optimizer step). `placement` and `first_weights`
place and initialize the model, `speed` configures compilation and activation checkpointing,
`resume` selects and loads the checkpoint, `evaluation` validates, samples and scores, `rollback`
handles loss spikes, `watch` signals and the time limit, `banner` describes the run at its start.
`trainer_collator` feeds windows to transformers' Trainer.
"""
