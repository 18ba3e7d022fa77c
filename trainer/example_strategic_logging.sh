#!/usr/bin/env bash
# Trains on the bundled speech with strategic logging on, on two processes.
# For a real model: MODEL=bosonai/higgs-audio-v2-generation-3B-base and your own TRAIN (docs/data_format.md).
set -euo pipefail
cd "$(dirname "$0")/.."

WORK="${WORK:-runs/example}"
PYTHON="${PYTHON:-.venv/bin/python}"

if [[ -z "${MODEL:-}" ]]; then
    "$PYTHON" -m trainer.demo prepare "$WORK"
    MODEL="$WORK/model"
    CODEC="$WORK/audio_tokenizer"
    TRAIN="$WORK/train.json"
    EVAL="$WORK/eval.json"
fi

"$PYTHON" -m torch.distributed.run --nproc_per_node="${RANKS:-2}" trainer/train_v2_ddp.py \
    --model_path "$MODEL" \
    ${CODEC:+--audio_tokenizer_path "$CODEC"} \
    --train_data_file "$TRAIN" \
    ${EVAL:+--eval_data_file "$EVAL"} \
    --output_dir "$WORK/output" \
    --logging_dir "$WORK/logs" \
    --max_steps "${STEPS:-40}" \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 2 \
    --learning_rate 1e-3 \
    --logging_steps 10 \
    --eval_steps 20 \
    --save_steps 20 \
    --report_to tensorboard \
    --enable_strategic_logging \
    --strategic_logging_steps 10 \
    --strategic_logging_components inputs outputs shared_attention zero_shot
