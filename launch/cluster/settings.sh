# shellcheck shell=bash disable=SC2034
# What is trained, and where, for the scripts in this folder. Environment variables take precedence.
: "${HOSTFILE:=launch/cluster/hostfile}"
: "${CONFIG:=configs/guard_zero2.json}"
: "${MODEL:=configs/models/llama-tiny.json}"
: "${DATA:=runs/quickstart/data}"
: "${RUN:=runs/cluster}"
: "${STEPS:=300}"
: "${CHECKPOINT_EVERY:=60}"
: "${FAULTS:=}"    # of a drill, with spaces between them
: "${GRACE_S:=30}" # seconds from the request to stop until ranks are killed
TRAINING=(
    launch/pretrain.py --deepspeed_config "$CONFIG" --model "$MODEL" --data "$DATA" --out "$RUN"
    --steps "$STEPS" --checkpoint-every "$CHECKPOINT_EVERY"
)
for fault in $FAULTS; do TRAINING+=(--fault "$fault"); done

export DS_ENV_FILE=${DS_ENV_FILE:-$PWD/launch/cluster/.deepspeed_env}
# Without this, ssh would wait hours for a host that has lost power.
export PDSH_SSH_ARGS_APPEND=${PDSH_SSH_ARGS_APPEND:--o ServerAliveInterval=15 -o ServerAliveCountMax=4}
