"""Checkpoints: Hugging Face folders that also hold what an exact resume needs.

`state` is what is saved, `parts` who writes which tensors, `folders` how a folder is found and
verified, `writer` saves in the background while training goes on.
"""
