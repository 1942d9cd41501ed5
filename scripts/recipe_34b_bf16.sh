#!/usr/bin/env bash
# CodeLlama-34B in bf16, drafted by CodeLlama-7B in int4.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
repo=${MODEL_REPO:-codellama/CodeLlama-34b-Python-hf} draft=${DRAFT_REPO:-codellama/CodeLlama-7b-Python-hf}
scripts/prepare.sh "$repo" "$draft"
python quantize.py --checkpoint_path "checkpoints/$draft/model.pth" --mode int4 --groupsize 32
python generate.py --compile --checkpoint_path "checkpoints/$repo/model.pth" \
    --draft_checkpoint_path "checkpoints/$draft/model_int4.g32.pth" --compare \
    --prompt "def quicksort(arr):" --max_new_tokens 200 --temperature 0 "$@"
