"""eval.py: tasks against the harness's own HFLM on the same model and data, the files it writes, and its flags.

    python -m pytest tests/test_eval.py

Worth knowing: `datasets` loads a folder in the working directory in place of the hub's dataset of the same name, so the
harness's real tasks run offline on made-up items. Indexing all its tasks takes seconds: these tests index only a few.
"""

import json
import os
import random
import shutil
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # both are read when datasets is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import lm_eval.tasks
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import eval as eval_cli
from fast import harness
from fast.checkpoint import load_model
from fast.cli import DEMO
from fast.harness import FastLM, parse_generation
from fast.sampling import Sampling
from fast.tokenizer import load_tokenizer
from quantize import task_documents

TEMPLATE = """{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}\
{% if add_generation_prompt %}<assistant>{% endif %}"""
OWN_TASK = """
task: next_words
dataset_path: json
dataset_kwargs: {{data_files: {{train: {file}, test: {file}}}}}
output_type: generate_until
training_split: train
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: [".", " the "], max_gen_toks: 24}}
metric_list: [{{metric: exact_match}}]
"""


def write_dataset(name: str, config: str, splits: dict[str, list[dict]]) -> None:
    folder = Path(name)
    folder.mkdir(parents=True)
    lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        lines += [f"  - split: {split}", f"    path: {split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def write_datasets() -> None:
    """Write made-up items in the format of each task's real ones, from sentences of the held-out text."""
    draw, text = random.Random(0), (DEMO.parent / "heldout.txt").read_text(encoding="utf-8")
    sentences = [s.strip() + "." for s in text.replace("\n", " ").split(". ") if 40 < len(s) < 160]

    def hellaswag() -> dict:
        first, second, *endings = draw.sample(sentences, 6)
        return {"activity_label": "Reading", "ctx_a": first, "ctx_b": second[:20], "endings": endings, "label": "2"}

    def winogrande() -> dict:
        words = draw.choice(sentences).split()
        words[len(words) // 2] = "_"
        return {"sentence": " ".join(words), "option1": "module", "option2": "the list", "answer": draw.choice("12")}

    def gsm8k() -> dict:
        return {"question": draw.choice(sentences), "answer": f"{draw.choice(sentences)}\n#### {draw.randrange(9)}"}

    pages = [{"page": " ".join(draw.sample(sentences, n))} for n in (1, 30)]  # the second needs several windows
    write_dataset("Rowan/hellaswag", "default", {k: [hellaswag() for _ in range(12)] for k in ("train", "validation")})
    items = {k: [winogrande() for _ in range(9)] for k in ("train", "validation")}
    write_dataset("allenai/winogrande", "winogrande_xl", items)
    splits = dict.fromkeys(("train", "validation", "test"), pages)
    write_dataset("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", splits)
    write_dataset("openai/gsm8k", "main", {k: [gsm8k() for _ in range(6)] for k in ("train", "test")})
    Path("own").mkdir()
    rows = [{"text": s[: len(s) // 2].rsplit(" ", 1)[0], "target": "?"} for s in sentences[:9]]
    Path("own/items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("own/next_words.yaml").write_text(OWN_TASK.format(file=Path("own/items.jsonl").absolute()))


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    """The harness's task manager, in a folder with the data and `model/`, the demo's draft with a chat template."""
    folder = tmp_path_factory.mktemp("eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        theirs = Path(lm_eval.tasks.__file__).parent
        paths = [str(theirs / name) for name in ("hellaswag", "winogrande", "wikitext", "gsm8k")]
        manager_class = lm_eval.tasks.TaskManager

        def only_these(include_path=None, **_):
            return manager_class(include_path=include_path, include_defaults=False)

        patch.setattr(lm_eval.tasks, "TaskManager", only_these)
        patch.setattr(harness, "TaskManager", only_these)
        patch.chdir(folder)
        write_datasets()
        shutil.copytree(DEMO.parent / "draft", "model")
        Path("model/chat_template.jinja").write_text(TEMPLATE)
        yield only_these(include_path=[*paths, "own"])


@pytest.fixture(scope="module")
def both(manager):
    """HFLM and our adapter on the same weights."""
    theirs = HFLM(pretrained="model", device="cpu", dtype="float32", batch_size=1)
    ours = FastLM(load_model("model", dtype=torch.float32), load_tokenizer("model"), "model", batch_size=8)
    return theirs, ours


def answers(lm, manager, tasks: list[str], **settings) -> tuple[dict, dict]:
    """For each task, the harness's metrics, and every request's prompt with the model's answer."""
    results = simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, **settings)
    samples = {
        name: [(s["doc_id"], s["filter"], s["arguments"], s["resps"]) for s in rows]
        for name, rows in results["samples"].items()
    }
    return {name: strip(metrics) for name, metrics in results["results"].items()}, samples


def strip(metrics: dict) -> dict:
    return {key: value for key, value in metrics.items() if isinstance(value, float) and "stderr" not in key}


def assert_same_answers(both, manager, tasks: list[str], **settings) -> dict:
    (their_metrics, their_samples), (our_metrics, our_samples) = (
        answers(lm, manager, tasks, **settings) for lm in both
    )
    for name, rows in their_samples.items():
        for (*item, prompts, expected), (*our_item, our_prompts, found) in zip(rows, our_samples[name], strict=True):
            assert (our_item, our_prompts) == (item, prompts)
            for (theirs,), (ours,) in zip(expected, found, strict=True):
                if isinstance(theirs, tuple):
                    assert ours[0] == pytest.approx(theirs[0], abs=1e-3)
                    assert ours[1] == theirs[1]
                elif isinstance(theirs, float):
                    assert ours == pytest.approx(theirs, abs=1e-3)
                else:
                    assert ours == theirs
        assert our_metrics[name] == pytest.approx(their_metrics[name], rel=1e-4)
    return our_samples


@pytest.mark.parametrize(
    ("tasks", "settings"),
    [
        (["hellaswag", "winogrande", "wikitext"], {}),
        (["gsm8k"], {"limit": 3}),  # five examples: too long for the model, so cut on the left
        (["hellaswag"], {"num_fewshot": 11, "limit": 3}),  # too long too
        (["next_words", "hellaswag"], {"num_fewshot": 2, "limit": 3, "apply_chat_template": True}),
        (["next_words"], {"num_fewshot": 2, "apply_chat_template": True, "fewshot_as_multiturn": False}),
        (["next_words"], {}),
    ],
    ids=["zero-shot", "gsm8k", "few-shot", "chat", "one-turn-chat", "stop-strings"],
)
def test_answers_are_those_of_hflm(manager, both, tasks, settings):
    samples = assert_same_answers(both, manager, tasks, **settings)
    if tasks == ["next_words"] and not settings:
        texts = [resps[0][0] for *_, resps in samples["next_words"]]
        assert len(set(texts)) > 1
        assert not any("." in text or " the " in text for text in texts)
    if "gsm8k" in tasks:
        lengths = [len(both[1].tok_encode(arguments[0][0])) for _, _, arguments, _ in samples["gsm8k"]]
        assert min(lengths) > both[1].max_length - harness.MAX_NEW_TOKENS
    if settings.get("num_fewshot") == 11:
        assert max(len(both[1].tok_encode(a[0][0])) for _, _, a, _ in samples["hellaswag"]) > both[1].max_length


def test_the_command_line_prints_the_table_and_writes_the_harness_files(manager, capsys):
    argv = ["--checkpoint_path", "model", "--dtype", "float32", "--tasks", "next_words", "--include_path", "own"]
    argv += ["--limit", "2", "--num_fewshot", "1", "--apply_chat_template", "--batch_size", "2", "--seed", "3"]
    argv += ["--output_path", "results", "--log_samples", "--perplexity", "own/items.jsonl"]
    assert eval_cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "own/items.jsonl: perplexity" in out
    assert "|next_words|" in out.replace(" ", "")
    (results_path,) = Path("results/model").glob("results_*.json")
    (samples_path,) = Path("results/model").glob("samples_next_words_*.jsonl")
    results = json.loads(results_path.read_text())
    assert results["n-shot"] == {"next_words": 1}
    assert results["config"]["fewshot_seed"] == 3
    assert results["config"]["model_dtype"] == "float32"
    assert results["chat_template"] == TEMPLATE.rstrip("\n")
    samples = [json.loads(line) for line in samples_path.read_text().splitlines()]
    assert [sample["doc_id"] for sample in samples] == [0, 1]
    assert samples[0]["arguments"]["gen_args_0"]["arg_0"].endswith("<assistant>")


def test_the_harness_runs_the_registered_model_itself(manager, capsys, monkeypatch):
    argv = [
        "lm-eval",
        "--model",
        "fast",
        "--model_args",
        "checkpoint_path=model,dtype=float32",
        "--tasks",
        "next_words",
    ]
    monkeypatch.setattr(sys, "argv", [*argv, "--include_path", "own", "--limit", "2", "--batch_size", "auto"])
    harness.cli_evaluate()
    assert "|next_words|" in capsys.readouterr().out.replace(" ", "")


def test_without_the_harness_the_error_names_the_package(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "fast.harness")
    monkeypatch.delattr("fast.harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert eval_cli.main(["--tasks", "hellaswag"]) == 2
    assert "pip install 'lm_eval>=0.4.9,<0.5'" in capsys.readouterr().err


def test_without_a_generation_prompt_the_last_message_stays_open(both):
    history = [{"role": "user", "content": "Name it."}, {"role": "assistant", "content": "It is"}]
    for lm in both:
        assert lm.apply_chat_template(history, add_generation_prompt=False).endswith("<assistant>It is")


# What `until` holds in the harness's published tasks, by kind: words, special tokens, both, lines, nothing.
@pytest.mark.parametrize(
    "until",
    [" the", "</s>", ["<|im_end|>", "Q:"], ["</s>was<s>"], ["was</s>"], ["\n\n", "</s>"], ["."], []],
)
def test_a_text_ends_where_hflm_ends_it(both, monkeypatch, until):
    """The same tokens, whatever a model would say, through HFLM's stopping and cutting and through ours."""
    theirs, ours = both
    encode = partial(ours.text.encode, bos=False)
    ids = [*encode("She was not\n\nthe"), 1, *encode("was"), 2, *encode("was"), 1]
    ids += [*encode(" of Q: the end. </s> <|im_end|>"), 0]  # the last names are spelt in letters

    def generate(input_ids, max_length, stopping_criteria, **_):
        for token in ids:
            input_ids = torch.cat((input_ids, torch.tensor([[token]])), 1)
            if token == 2 or stopping_criteria(input_ids, None):
                break
        return input_ids

    monkeypatch.setattr(theirs.model, "generate", generate)
    monkeypatch.setattr(harness, "stream", lambda *_: ([token] for token in ids))
    monkeypatch.setattr(ours.text, "stop_ids", frozenset({2}))
    for n_first in range(len(ids)):  # from every token on
        ids = ids[min(1, n_first) :]
        request = Instance("generate_until", {}, ("The list", {"until": until, "max_gen_toks": len(ids)}), 0)
        assert ours.generate_until([request], True) == theirs.generate_until([request], True)


def test_bos_is_not_added_twice(both):
    theirs, ours = both
    for text in ("<s>The list", "The list", ""):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
    assert ours.tok_encode("The list", add_special_tokens=False) == theirs.tok_encode("The list", False)


def test_settings_of_a_generation():
    assert parse_generation({"until": "\n"}) == (Sampling(temperature=0, top_k=None), ["\n"], 256)
    sampled = {"until": ["a", ""], "do_sample": True, "temperature": 0.5, "top_p": 0.9, "max_new_tokens": 7}
    assert parse_generation(sampled) == (Sampling(0.5, None, 0.9), ["a"], 7)
    assert parse_generation({"do_sample": False, "temperature": 0.5})[0].temperature == 0
    assert parse_generation({"num_beams": 1, "repetition_penalty": 1.0, "top_k": 0, "temperature": 1})[0].top_k is None
    with pytest.raises(ValueError, match="generation_kwargs: num_beams 4 not supported"):
        parse_generation({"num_beams": 4})


def test_new_tokens_that_leave_no_room_are_refused(both):
    request = Instance("generate_until", {}, ("The list", {"max_gen_toks": 512}), 0)
    with pytest.raises(ValueError, match="512 new tokens, which leaves no room"):
        both[1].generate_until([request], disable_tqdm=True)


def test_tasks_to_calibrate_on_are_looked_up_as_these_are(manager):
    with pytest.raises(ValueError, match="--calibration_tasks: the harness has no nonesuch; `lm_eval ls tasks` lists"):
        task_documents(["nonesuch"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tasks nonesuch", "--tasks: the harness has no nonesuch"),
        ("--tasks next_words --include_path nowhere", "--include_path nowhere is not a directory"),
        ("--tasks next_words --batch_size 0", "--batch_size 0 must be at least 1, or auto"),
        ("--tasks next_words --limit 1.5", "--limit 1.5 must be a whole number"),
        ("--tasks next_words --num_fewshot -1", "--num_fewshot -1 must be at least 0"),
        ("--tasks next_words --log_samples", "--log_samples needs --output_path"),
        ("--tasks next_words --fewshot_as_multiturn", "--fewshot_as_multiturn needs --apply_chat_template"),
        ("--tasks next_words --include_path own --apply_chat_template", "the model has no chat template"),
        ("--perplexity own/items.jsonl --output_path results", "there are no --tasks: leave out --output_path"),
        ("--perplexity own/items.jsonl --seed 1 --limit 2", "there are no --tasks: leave out --limit, --seed"),
        ("--tasks next_words --window 5 --stride 2", "there is no --perplexity FILE: leave out --window, --stride"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(manager, capsys, flags, message):
    assert eval_cli.main(flags.split()) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
