#!/bin/bash
# An example for Slurm: `sbatch tools/slurm.sh configs/imagenet/biformer_s.py data.root=/data/imagenet`.
# Five minutes before the time is up the run saves everything, and the job queues again to go on from there.
#SBATCH --job-name=saccade
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-8} / ${SLURM_GPUS_PER_NODE:-8}))
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else restarted processes look for the addresses of those before them

# --resume starts from the beginning where nothing is saved yet.
srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_PER_NODE:-8}" \
  --rdzv_backend=c10d --rdzv_endpoint="$head:${PORT:-29500}" --rdzv_id="$SLURM_JOB_ID" --max-restarts=3 \
  tools/train.py "$@" --resume &

# torchrun hands SIGTERM to its processes: they save, agree to stop, and end.
trap 'stopped=1; kill -TERM $!; wait $!' TERM
wait $!
code=$?
if [ "${stopped:-}" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
