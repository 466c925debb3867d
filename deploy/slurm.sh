#!/usr/bin/env bash
# All stages on the nodes of one Slurm allocation:
#
#     sbatch --nodes 4 deploy/slurm.sh root=/shared/runs/bair cluster.use_gpu=true
#
# Submit it from this checkout, on a file system that all nodes mount, with clipmill installed in .venv. What follows
# the script's name goes to every stage. A node that fails, a preemption or the end of the time limit costs no result:
# the job is queued again and goes on where it stopped.
#SBATCH --job-name=clipmill
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --time=24:00:00
# Ten minutes before the end, this script is told to stop: enough for a last checkpoint.
#SBATCH --signal=B:TERM@600
set -uo pipefail

PATH=$PWD/.venv/bin:$PATH
port=6379
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Jobs that share a node's /tmp must not share Ray's files.
export RAY_TMPDIR=${SLURM_TMPDIR:-/tmp}/clipmill-ray-$SLURM_JOB_ID

srun --nodes 1 --ntasks 1 --nodelist "$head" \
    RAY_health_check_period_ms=2000 RAY_health_check_timeout_ms=5000 RAY_health_check_failure_threshold=3 ray start --head --port "$port" --dashboard-host 0.0.0.0 --temp-dir "$RAY_TMPDIR" --block &
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    # The head's raylet must be there first; a worker tries until it is.
    srun --nodes $((SLURM_JOB_NUM_NODES - 1)) --ntasks $((SLURM_JOB_NUM_NODES - 1)) --exclude "$head" \
        bash -c "until ray start --address '$head:$port' --block; do sleep 5; done" &
fi

until ray health-check --address "$head:$port" 2> /dev/null; do sleep 1; done
clipmill submit --address "http://$head:8265" "$@" &
submitter=$!

# Before the end of the allocation the running stage is stopped in order, through the storage of its run.
root=
for argument in "$@"; do
    case $argument in root=*) root=${argument#root=} ;; esac
done
is_ending=
trap 'is_ending=1; clipmill stop "$root"' TERM

status=
while kill -0 "$submitter" 2> /dev/null; do
    wait "$submitter"
    status=$?
done
if [ -n "$is_ending" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
