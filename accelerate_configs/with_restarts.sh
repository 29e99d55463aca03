#!/usr/bin/env bash
# Starts all processes again when one is lost, each time from the newest checkpoint:
#   accelerate_configs/with_restarts.sh --config_file accelerate_configs/ddp_8gpu.yaml RECIPE FLAGS...
# None of this can be said in a YAML file. MAX_RESTARTS (3) is how often. Without the first setting
# about half of the restarts hang or fail, since old entries of the rendezvous are met again.
set -euo pipefail
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Two jobs on one machine must not meet. On several machines the id must be given, the same on all;
# the endpoint is there made of --main_process_ip and --main_process_port.
export PET_RDZV_ENDPOINT="${PET_RDZV_ENDPOINT:-localhost:0}"
export PET_RDZV_ID="${PET_RDZV_ID:-$(hostname)-$$-$(date +%s)}"
# Seconds from SIGTERM to SIGKILL: the last step, and its checkpoint, must fit.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
exec accelerate launch --rdzv_backend c10d --max_restarts "${MAX_RESTARTS:-3}" "$@"
