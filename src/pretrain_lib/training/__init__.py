"""Training, from the command line of a recipe to the last checkpoint.

Begin with `run_recipe` (the command-line program around a recipe), `run` (assembles the parts of a
run), `loop` (the training loop) and `step` (one optimizer step). `placement` and `first_weights`
place and initialize the model, `compilation` configures compilation and activation checkpointing,
`checkpoint_choice` selects the checkpoint and `resume` loads it, `evaluation` validates, samples
and scores, `rollback` handles loss spikes, `early_stop` signals and the time limit, `failures`
errors.

`banner` describes the run at its start, `console_lines` its steps, `summary` its end;
`measurements` has its time left and peak memory, `profiler` profiles steps. `micro_batches` counts
the targets of a step, `trainer_collator` feeds windows to transformers' Trainer.
"""
