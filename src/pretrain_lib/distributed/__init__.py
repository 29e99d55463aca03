"""Processes and devices, through Accelerate.

Begin with `engine`, which starts the Accelerator. `guards` rejects launches that do not match the
recipe, `launched` coordinates the ranks of a launch, `launch_file` reads the launcher's
configuration, `sharding` sets up FSDP2, `float8` trains blocks in float8.
"""
