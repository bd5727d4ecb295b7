#!/usr/bin/env bash
# One search on Slurm nodes: `sbatch deploy/slurm.sh`. See deploy/README.md.
#SBATCH --job-name=evoprune
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --exclusive
#SBATCH --requeue
set -euo pipefail

RUN=${RUN:-$HOME/evoprune-runs/$SLURM_JOB_ID}
TOKEN=${TOKEN:-$HOME/.ray/auth_token} # made once by `ray get-auth-token --generate`, on the shared home
PORT=6379

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$TOKEN RAY_USAGE_STATS_ENABLED=0
# Each node keeps its own copy of model and statistics, on its own disk.
export EVOPRUNE_CACHE=${SLURM_TMPDIR:-/tmp}/evoprune-$USER

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# The first time this searches; after a requeue it goes on where it was.
if [ -e "$RUN/run.json" ]; then
    SEARCH=(evoprune resume "$RUN" --address auto --gpus-per-worker 1)
else
    SEARCH=(evoprune search metric Qwen/Qwen3-0.6B --sparsity 0.6 --evaluations 2000
        --address auto --gpus-per-worker 1 --run-dir "$RUN")
fi

# Starts Ray on every node and the command on the first. When the command ends, `ray stop` ends every Ray that the user
# has on these nodes, hence --exclusive.
srun --kill-on-bad-exit=1 ray symmetric-run --address "$HEAD:$PORT" --min-nodes "$SLURM_NNODES" -- "${SEARCH[@]}"
