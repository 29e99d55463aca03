#!/usr/bin/env bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
# A run on the nodes of a Slurm job, one launcher on each, which starts as many processes as the node
# has GPUs. From the root of the checkout, its environment active:
#   RUN_DIR=/shared/runs/one sbatch --nodes 4 accelerate_configs/slurm.sh RECIPE FLAGS...
# CONFIG (accelerate_configs/ddp_multi_node.yaml) is the configuration, MAX_RESTARTS (3) how often all
# start again by themselves after one was lost. RUN_DIR must be on a disk that all nodes share; the
# spool of a stream must not (--data.path, on a disk of each node).
#
# Ten minutes before the time limit Slurm sends SIGTERM: the run saves, stops, and status.json says
# "resumable". The job is then requeued, if the run has got on since it was started.
set -uo pipefail

status() { # prints a field of status.json, nothing if there is none
    python -P -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' \
        "$RUN_DIR/status.json" "$1" 2>/dev/null
}

: "${RUN_DIR:?is the folder of the run, on a disk that all nodes share}"
# Of the ten minutes between SIGTERM and the time limit; what is slower is killed by the limit anyway.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-560}"
export CONFIG="${CONFIG:-accelerate_configs/ddp_multi_node.yaml}"
export PROCESSES=$((SLURM_GPUS_ON_NODE * SLURM_NNODES))
HEAD_NODE="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
# This script runs on the first node.
PORT="$(python -P -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
export HEAD_NODE PORT PET_RDZV_ID="$SLURM_JOB_ID"

before="$(status step)"
# One launcher may end before another that still saves: no node ends the others.
# shellcheck disable=SC2016 # the node's own variables
srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 --wait=0 \
    bash -c '
    export PET_LOCAL_ADDR="$SLURMD_NODENAME"
    exec accelerate_configs/with_restarts.sh --config_file "$CONFIG" \
        --num_machines "$SLURM_NNODES" --num_processes "$PROCESSES" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$HEAD_NODE" --main_process_port "$PORT" \
        --rdzv_conf "is_host=$((SLURM_NODEID == 0)),read_timeout=600" \
        --parallelism_config_dp_replicate_size "$SLURM_NNODES" \
        --parallelism_config_dp_shard_size "$SLURM_GPUS_ON_NODE" \
        "$@" --system.processes "$PROCESSES" --run.dir "$RUN_DIR"' launcher "$@"

state="$(status state)"
echo "$RUN_DIR: $state at step $(status step), was at ${before:-the start}"
[ "$state" = "done" ] && exit 0
[ "$state" = resumable ] && [ "$(status step)" != "$before" ] && scontrol requeue "$SLURM_JOB_ID"
exit 1
