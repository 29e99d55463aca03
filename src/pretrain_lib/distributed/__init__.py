"""Processes and devices, through Accelerate.

`engine` starts the Accelerator, `guards` refuse launches that would not do what was asked,
`launched` covers rank 0 and the other processes of a launch, `launch_file` reads the launcher's
configuration, `sharding` sets up FSDP2.
"""
