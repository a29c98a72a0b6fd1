#!/bin/bash
# One launcher a node, requeued on preemption: sbatch train/launch/slurm.sh RECIPE --stage base
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@180
# USR1 comes 180 s before the time limit, SIGTERM on preemption. Either saves the state and ends with status 75.
# Saving a large model may take longer than the 30 s that the launcher leaves its processes:
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-150}

CONFIG=${CONFIG:-train/launch/ddp.yaml}
MAIN_IP=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export CONFIG MAIN_IP

srun --kill-on-bad-exit=1 bash -c 'exec python -m train.launch --config_file "$CONFIG" \
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
    --num_processes $((SLURM_NNODES * SLURM_GPUS_ON_NODE)) \
    --main_process_ip "$MAIN_IP" --main_process_port 29500 \
    -m train "$@"' train "$@"
status=$?
[ "$status" -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$status"
