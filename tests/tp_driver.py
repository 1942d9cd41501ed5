"""The program that `test_tp.py` runs under torchrun: all cases in one launch, since starting processes takes longest.

    torchrun --standalone --nproc_per_node=2 tests/tp_driver.py CASES.json DIRECTORY

Every rank writes DIRECTORY/RANK.json: for each case the result of `generate`.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fast.checkpoint import load_model
from fast.compiling import set_compile_flags
from fast.decoding import build_steps, stream
from fast.drafting import SPARE
from fast.head_files import load_head
from fast.metrics import parameter_bytes
from fast.sampling import Sampling
from fast.speculative import build_speculative_steps, drafter_for, speculate
from tp import Ranks


def generate(case: dict, ranks: Ranks) -> dict:
    """The tokens of each row and the bytes of the rank's weights; with a draft also the number of speculative steps."""
    sampling, rows = Sampling(case["temperature"], top_k=None), len(case["prompts"])
    model = load_model(case["path"], dtype=torch.float32, ranks=ranks)
    model.setup_caches(rows, 64, spare=SPARE)
    if "head" in case:
        draft = load_head(case["head"], model, dtype=torch.float32, ranks=ranks)
    elif "draft" in case:
        draft = load_model(case["draft"], dtype=torch.float32, ranks=ranks, replicate=case["replicate"])
    else:
        draft = None
    drafter = None
    if draft is not None:
        draft.setup_caches(rows, 64, spare=SPARE)
        drafter = drafter_for(draft, model, sampling, case["k"])
    steps = build_steps(model, sampling, case["compile"], run=drafter and drafter.run)
    torch.manual_seed(0)
    if drafter is None:
        tokens = list(zip(*stream(steps, case["prompts"], case["n"]), strict=True))
        return {"tokens": tokens, "bytes": parameter_bytes(model)}
    agree = partial(ranks.agree, device="cpu")
    steps = build_speculative_steps(steps, drafter, sampling, case["k"], agree=agree)
    found = list(speculate(steps, case["prompts"], case["n"]))
    tokens = [[i for step in found for i in step.ids[row]][: case["n"]] for row in range(rows)]
    return {"tokens": tokens, "bytes": parameter_bytes(model), "steps": len(found)}


def main() -> None:
    ranks = Ranks.from_torchrun()
    cases, results = json.loads(Path(sys.argv[1]).read_text()), []
    with torch.no_grad(), ranks.joined("cpu"):
        for case in cases:
            if case["compile"]:
                set_compile_flags("cpu")
            results.append(generate(case, ranks))
    (Path(sys.argv[2]) / f"{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
