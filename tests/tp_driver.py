"""What `test_tp.py` runs under torchrun: several models in one launch, for starting processes takes longer than these.

    torchrun --standalone --nproc_per_node=2 tests/tp_driver.py CASES.json DIRECTORY

Every rank writes DIRECTORY/RANK.json: for each case its tokens and the bytes of its weights.
"""

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import load_model
from decoding import build_steps, set_compile_flags, stream
from metrics import parameter_bytes
from sampling import Sampling
from tp import Ranks


def main() -> None:
    ranks = Ranks.from_torchrun()
    cases, results = json.loads(Path(sys.argv[1]).read_text()), []
    with torch.no_grad(), ranks.joined("cpu"):
        for case in cases:
            if case["compile"]:
                set_compile_flags("cpu")
            model = load_model(case["path"], dtype=torch.float32, ranks=ranks)
            model.setup_caches(len(case["prompts"]), 64)
            steps = build_steps(model, Sampling(case["temperature"], top_k=None), case["compile"])
            torch.manual_seed(0)
            tokens = list(zip(*stream(steps, case["prompts"], case["n"]), strict=True))
            results.append({"tokens": tokens, "bytes": parameter_bytes(model)})
    (Path(sys.argv[2]) / f"{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
