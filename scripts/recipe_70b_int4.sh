#!/usr/bin/env bash
# Llama-2-70B in int4 on one GPU, drafted by Llama-2-7B in int4.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
repo=${MODEL_REPO:-meta-llama/Llama-2-70b-chat-hf} draft=${DRAFT_REPO:-meta-llama/Llama-2-7b-chat-hf}
scripts/prepare.sh "$repo" "$draft"
for each in "$repo" "$draft"; do
    python quantize.py --checkpoint_path "checkpoints/$each/model.pth" --mode int4 --groupsize 32
done
python generate.py --compile --checkpoint_path "checkpoints/$repo/model_int4.g32.pth" \
    --draft_checkpoint_path "checkpoints/$draft/model_int4.g32.pth" --compare "$@"
