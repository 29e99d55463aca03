"""Checkpoints: Hugging Face model folders that also hold what an exact resume needs.

Begin with `state`, which saves and loads checkpoints. `contents` checks what they say in JSON,
`parts` distributes the tensors over the processes, `folders` finds, verifies and prunes checkpoint
folders, `writer` saves asynchronously during training.
"""
