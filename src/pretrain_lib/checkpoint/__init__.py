"""Checkpoints: Hugging Face model folders that also hold what an exact resume needs.

Begin with `state`, which saves and loads checkpoints. `parts` distributes the tensors over the
processes, `folders` finds, verifies and prunes checkpoint folders, `writer` saves asynchronously
during training.
"""
