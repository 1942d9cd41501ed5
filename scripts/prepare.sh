#!/usr/bin/env bash
# Download models from the Hugging Face hub and convert each to checkpoints/REPO/model.pth.
#
#     scripts/prepare.sh meta-llama/Llama-3.2-1B Qwen/Qwen3-8B
#
# Run again, it resumes what was interrupted. Gated models need HF_TOKEN. PYTHON chooses the interpreter.
set -euo pipefail

if [[ $# -eq 0 ]]; then
    echo "usage: scripts/prepare.sh REPO [REPO ...]" >&2
    exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for repo in "$@"; do
    "${PYTHON:-python}" scripts/download.py "$repo" --checkpoint_dir checkpoints
    "${PYTHON:-python}" scripts/convert_hf_checkpoint.py --checkpoint_dir "checkpoints/$repo"
done
