#!/usr/bin/env bash
# Pretrains a GPT with Megatron-DeepSpeed's pretrain_gpt.py and ds_gradmix, on TP x PP x DP accelerators.
# Edit the values above the line, or set environment variables of these names; docs/megatron.md explains them.
set -euo pipefail

: "${MEGATRON:=}"         # the Megatron-DeepSpeed repository
: "${DATA:=}"             # preprocessed data without the extensions: DATA.bin and DATA.idx
: "${TOKENIZER:=}"        # the SentencePiece model of the data
: "${SAVE:=runs/megatron/gpt}" # checkpoints, on a file system that all nodes share; the same command resumes
: "${CONFIG:=$(dirname "$0")/../../configs/megatron/gaf_zero1.json}" # copied with other batch sizes and steps_per_print

: "${GPUS:=}"             # ranks on this node; if empty, TP x PP x DP, or 8
: "${HOSTFILE:=}"         # for several nodes, DeepSpeed's hostfile, whose slots replace GPUS
: "${PORT:=29500}"
: "${TP:=1}"              # tensor parallel ranks
: "${PP:=1}"              # pipeline stages; 0 trains without DeepSpeed's pipeline, as ZeRO-2 requires
: "${DP:=}"               # data-parallel replicas; if empty, as many as the ranks allow

: "${LAYERS:=24}"
: "${HIDDEN:=2048}"
: "${HEADS:=16}"
: "${SEQUENCE:=2048}"     # tokens
: "${MICRO_BATCH:=4}"     # sequences per rank and forward pass
: "${GLOBAL_BATCH:=256}"  # sequences per optimizer step, over all workers and micro-batches
: "${STEPS:=100000}"
: "${LR:=3e-4}"
: "${MIN_LR:=3e-5}"
: "${LOG_EVERY:=10}"      # steps between the log lines of Megatron and of ds_gradmix
: "${SAVE_EVERY:=1000}"
: "${EVAL_EVERY:=1000}"
: "${EXTRA:=}"            # more options of pretrain_gpt.py, for example "--use-flash-attn-v2"
: "${DRY_RUN:=}"          # if not empty, the command is printed and not run

# ------------------------------------------------------------------------------------------ nothing to set below

die() {
    echo "pretrain_gpt.sh: error: $1" >&2
    exit 2
}

for name in MEGATRON DATA TOKENIZER; do
    [ -n "${!name}" ] || die "$name is not set: edit the top of $0, or set it in the environment"
done
for name in TP LAYERS HIDDEN HEADS SEQUENCE MICRO_BATCH GLOBAL_BATCH STEPS LOG_EVERY SAVE_EVERY EVAL_EVERY; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || die "$name is \"${!name}\": it must be a whole number, 1 or more"
done
[[ $PP =~ ^(0|[1-9][0-9]*)$ ]] || die "PP is \"$PP\": it must be a whole number, 0 or more"
for name in GPUS DP; do
    [[ ${!name} =~ ^([1-9][0-9]*)?$ ]] || die "$name is \"${!name}\": it must be a whole number, 1 or more, or empty"
done
for file in "$MEGATRON/pretrain_gpt.py" "$DATA.bin" "$DATA.idx" "$TOKENIZER" "$CONFIG" ${HOSTFILE:+"$HOSTFILE"}; do
    [ -f "$file" ] || die "$file does not exist"
done

stages=$((PP > 1 ? PP : 1))
ranks=${GPUS:-$((DP ? TP * stages * DP : 8))}
nodes=(--num_accelerators "$ranks")
if [ -n "$HOSTFILE" ]; then
    ranks=$(sed -nE 's/^[^#[:space:]]+[[:space:]]+slots=([0-9]+).*/\1/p' "$HOSTFILE" | awk '{n += $1} END {print n + 0}')
    [ "$ranks" -gt 0 ] || die "$HOSTFILE has no line like \"node1 slots=8\""
    nodes=(--hostfile "$HOSTFILE")
fi
workers=$((ranks / (TP * stages)))
((workers > 0 && ranks == workers * TP * stages)) ||
    die "$ranks ranks cannot be divided into replicas of TP x PP = $TP x $stages"
[ "$workers" -eq "${DP:-$workers}" ] || die "$ranks ranks are $workers replicas of TP x PP = $TP x $stages; DP is $DP"
[ $((GLOBAL_BATCH % (MICRO_BATCH * workers))) -eq 0 ] ||
    die "GLOBAL_BATCH is $GLOBAL_BATCH: it must be a multiple of MICRO_BATCH x workers = $MICRO_BATCH x $workers"

# Megatron reads batch sizes, precision and ZeRO stage from its options, and DeepSpeed from its config: set both.
written=/dev/null
[ -n "$DRY_RUN" ] || { mkdir -p "$SAVE" && written=$SAVE/ds_config.json; }
agreed=$(python3 - "$CONFIG" "$written" "$GLOBAL_BATCH" "$MICRO_BATCH" "$LOG_EVERY" <<'PYTHON'
import json, sys

source, target = sys.argv[1:3]
try:
    config = json.load(open(source))
except ValueError as error:
    sys.exit(f"{source}: {error}")
config.pop("gradient_accumulation_steps", None)
for key, value in zip(("train_batch_size", "train_micro_batch_size_per_gpu", "steps_per_print"), sys.argv[3:]):
    config[key] = int(value)
json.dump(config, open(target, "w"), indent=2)
dtypes = [f"--{dtype}" for dtype in ("bf16", "fp16") if config.get(dtype, {}).get("enabled")]
print("--zero-stage", config.get("zero_optimization", {}).get("stage", 0), *dtypes)
PYTHON
) || die "$CONFIG could not be read"
[[ $PP -eq 0 || $agreed != "--zero-stage "[23]* ]] ||
    die "$CONFIG has ZeRO stage ${agreed:13:1}, and DeepSpeed's pipeline takes 0 and 1 only: set PP to 0, or the stage to 1"

options=(
    --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$stages"
    --num-layers "$LAYERS" --hidden-size "$HIDDEN" --num-attention-heads "$HEADS"
    --seq-length "$SEQUENCE" --max-position-embeddings "$SEQUENCE"
    --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH" --train-iters "$STEPS"
    --lr "$LR" --min-lr "$MIN_LR" --lr-decay-style cosine --lr-warmup-fraction 0.01
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95
    --data-path "$DATA" --data-impl mmap --split "949,50,1"
    --tokenizer-type GPTSentencePieceTokenizer --tokenizer-model "$TOKENIZER"
    --log-interval "$LOG_EVERY" --save-interval "$SAVE_EVERY" --eval-interval "$EVAL_EVERY" --eval-iters 10
    --save "$SAVE" --load "$SAVE"
    --no-gradient-accumulation-fusion # Apex's kernel adds to buffers that DeepSpeed does not have
    --deepspeed --deepspeed_config "$SAVE/ds_config.json"
)
[ "$PP" -gt 0 ] || options+=(--no-pipeline-parallel)
[ "${DS_ACCELERATOR:-}" != cpu ] || options+=(--no-masked-softmax-fusion) # a CUDA kernel
read -r -a more <<<"$agreed $EXTRA"

command=(
    deepspeed "${nodes[@]}" --master_port "$PORT"
    --module ds_gradmix "$MEGATRON/pretrain_gpt.py" "${options[@]}" "${more[@]}"
)
if [ -n "$DRY_RUN" ]; then
    printf '%q ' "${command[@]}"
    echo
else
    exec "${command[@]}"
fi
