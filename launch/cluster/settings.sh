# shellcheck shell=bash disable=SC2034
# What is trained, and where; the scripts beside this file read it. What the environment has already, wins.
: "${HOSTFILE:=launch/cluster/hostfile}"
: "${CONFIG:=configs/gaf_vrgd_zero2.json}"
: "${MODEL:=configs/models/llama-tiny.json}"
: "${DATA:=runs/quickstart/data}"
: "${RUN:=runs/cluster}"
: "${STEPS:=300}"
: "${CHECKPOINT_EVERY:=60}"
: "${GRACE_S:=30}" # what has been told to end is killed after so long
TRAINING=(
    launch/pretrain.py --deepspeed_config "$CONFIG" --model "$MODEL" --data "$DATA" --out "$RUN"
    --steps "$STEPS" --checkpoint-every "$CHECKPOINT_EVERY"
)

export DS_ENV_FILE=${DS_ENV_FILE:-$PWD/launch/cluster/.deepspeed_env}
# ssh would wait for hours for a host that has lost power.
export PDSH_SSH_ARGS_APPEND=${PDSH_SSH_ARGS_APPEND:--o ServerAliveInterval=15 -o ServerAliveCountMax=4}
