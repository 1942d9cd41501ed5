#!/usr/bin/env bash
# Llama-2-70B in bf16 on several GPUs (tensor parallelism), drafted by Llama-2-7B in int4.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
repo=${MODEL_REPO:-meta-llama/Llama-2-70b-chat-hf} draft=${DRAFT_REPO:-meta-llama/Llama-2-7b-chat-hf}
scripts/prepare.sh "$repo" "$draft"
python quantize.py --checkpoint_path "checkpoints/$draft/model.pth" --mode int4 --groupsize 32
torchrun --standalone --nproc_per_node "${N_GPUS:-8}" generate.py --compile --compile_prefill \
    --checkpoint_path "checkpoints/$repo/model.pth" \
    --draft_checkpoint_path "checkpoints/$draft/model_int4.g32.pth" --compare "$@"
