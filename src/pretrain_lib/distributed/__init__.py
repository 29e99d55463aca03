"""Processes and devices, through Accelerate.

`engine` starts the Accelerator, `guards` rejects launches that do not match the recipe, `launched`
coordinates the ranks of a launch, `launch_file` reads the launcher's configuration, `sharding` sets
up FSDP2.
"""
