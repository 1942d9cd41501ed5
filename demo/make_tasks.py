"""Make two small tasks for the demo model from its held-out text: the true continuation among four, the last word.

    python -m demo.make_tasks [--out demo/tasks]

Writes items (`*.jsonl`) and the harness's task descriptions (`*.yaml`), the same on every run. Run them from the root:
`python eval.py --include_path demo/tasks --tasks demo_continuation demo_last_word`.
"""

import json
import random
import re
import sys
from pathlib import Path

from fast.cli import DEMO, Parser

HELDOUT = DEMO.parent / "heldout.txt"
N_ITEMS = 150
N_WORDS = 12  # in a continuation

CONTINUATION = """task: demo_continuation
dataset_path: json
dataset_kwargs: {data_files: {test: demo/tasks/demo_continuation.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{context}}"
doc_to_choice: "{{endings}}"
doc_to_target: "{{label}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1}
"""
LAST_WORD = """task: demo_last_word
dataset_path: json
dataset_kwargs: {data_files: {test: demo/tasks/demo_last_word.jsonl}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{context}}"
doc_to_target: "{{' ' ~ word}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1}
"""


def split_sentences(text: str) -> list[str]:
    return re.split(r'(?:(?<=[.!?])|(?<=[.!?]"))(?<!Mr\.)(?<!Mrs\.)\s+(?=[A-Z"])', text)


def make_continuations(sentences: list[str], draw: random.Random) -> list[dict]:
    """Sentences cut in the middle; the choices are the words that follow, and those of three other sentences."""
    long = [words for words in map(str.split, sentences) if 2 * N_WORDS <= len(words) <= 4 * N_WORDS]
    chosen, items = draw.sample(long, N_ITEMS), []
    endings = [" ".join(words[len(words) // 2 :][:N_WORDS]) for words in chosen]
    for i, words in enumerate(chosen):
        others = draw.sample([ending for ending in endings if ending != endings[i]], 3)
        label = draw.randrange(4)
        context = " ".join(words[: len(words) // 2])
        items.append({"context": context, "endings": [*others[:label], endings[i], *others[label:]], "label": label})
    return items


def make_last_words(sentences: list[str], draw: random.Random) -> list[dict]:
    """Sentences without their last word, if that has four letters or more."""
    items = []
    for sentence in sentences:
        context, _, word = sentence.rstrip(".").rpartition(" ")
        if word.isalpha() and len(word) >= 4 and 60 <= len(context) <= 160:
            items.append({"context": context, "word": word})
    return draw.sample(items, N_ITEMS)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEMO.parent / "tasks", help="where they go (default: demo/tasks)")
    out = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    sentences, draw = split_sentences(HELDOUT.read_text(encoding="utf-8")), random.Random(0)
    tasks = {
        "demo_continuation": (CONTINUATION, make_continuations(sentences, draw)),
        "demo_last_word": (LAST_WORD, make_last_words(sentences, draw)),
    }
    for name, (description, items) in tasks.items():
        (out / f"{name}.yaml").write_text(description, encoding="utf-8")
        lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{out / name}.yaml, .jsonl: {len(items)} items")
    return 0


if __name__ == "__main__":
    sys.exit(main())
