# What the launch files share: one process for each SLURM task, and a job that goes back in the queue.
# Set STEERSMAN_ENV to a virtual environment that every node sees.
set -uo pipefail
if [ -n "${STEERSMAN_ENV:-}" ]; then source "$STEERSMAN_ENV/bin/activate"; fi
export STEERSMAN_PROGRESS=0
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# run_and_requeue SUBCOMMAND FLAGS...: `steersman SUBCOMMAND` on every task. srun passes exit codes on, where torchrun
# would not: 75 means that the work was cut short and the same command resumes it.
run_and_requeue() {
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
    export MASTER_ADDR MASTER_PORT
    srun --kill-on-bad-exit=1 bash -c '
        export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
        exec python -m steersman "$@"' steersman "$@" &
    local step=$!
    local ending=0
    trap 'ending=1; scancel --signal=TERM "$SLURM_JOB_ID.0" || kill -TERM $step' USR1 TERM
    wait $step
    local code=$?
    while kill -0 $step 2>/dev/null; do wait $step; code=$?; done # a trapped signal ends `wait` early
    if [ $ending -eq 1 ] || [ $code -eq 75 ]; then
        echo "put back in the queue (exit code $code)"
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    exit $code
}
