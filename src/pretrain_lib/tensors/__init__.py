"""Sharded tensors, and tensors in safetensors files.

Begin with `pieces`, the local shard of a parameter under FSDP2. `files` writes and hashes
safetensors files, `piece_files` stores shards in them and reads them back.
"""
