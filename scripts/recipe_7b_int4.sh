#!/usr/bin/env bash
# Llama-2-7B in int4, drafted by prompt lookup: no second model to load.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
repo=${MODEL_REPO:-meta-llama/Llama-2-7b-chat-hf}
scripts/prepare.sh "$repo"
python quantize.py --checkpoint_path "checkpoints/$repo/model.pth" --mode int4 --groupsize 32
python generate.py --compile --checkpoint_path "checkpoints/$repo/model_int4.g32.pth" --prompt_lookup --compare "$@"
