"""Tensors that are spread over processes, and tensors in safetensors files.

`pieces` is the part of a parameter that a process holds under FSDP2, `files` reads and writes
safetensors files, `piece_files` reads pieces of tensors from them.
"""
