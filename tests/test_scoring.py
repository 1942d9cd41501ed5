"""scoring.py against Hugging Face's logits, one request at a time; shared prefixes, compiling, a full memory.

python -m pytest tests/test_scoring.py
"""

import functools
import random

import pytest
import torch

from fast.checkpoint import load_model
from fast.scoring import Scorer, Text, bucket, split, to_groups, to_texts

CONTEXT = 128  # of the tiny models


def made_up_requests() -> list[tuple[list[int], list[int]]]:
    """Questions with four answers, half of them after the same examples; one-token answers; texts that share nothing;
    one whose every token is scored; contexts that are too long; an empty continuation."""
    draw = random.Random(0)

    def ids(n: int) -> list[int]:
        return [draw.randrange(128) for _ in range(n)]

    examples, requests = ids(30), []
    for question in range(8):
        context = (examples if question % 2 else []) + ids(draw.randrange(5, 60))
        requests += [(context, ids(draw.randrange(1, 20))) for _ in range(4)]
    for _ in range(3):
        context = ids(20)
        requests += [(context, ids(1)) for _ in range(3)]
    requests += [(ids(draw.randrange(1, 200)), ids(draw.randrange(1, 100))) for _ in range(4)]
    requests += [(ids(3), ids(CONTEXT)), (ids(3), []), (ids(1), ids(1))]
    draw.shuffle(requests)
    return requests


REQUESTS = made_up_requests()


def expected_of(hf_model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The rule of the harness's HFLM, without batches: cut on the left, score the last positions."""
    if not continuation:
        return 0.0, True
    ids = torch.tensor([(context + continuation)[-(CONTEXT + 1) :][:-1]])
    log_probs = hf_model(ids).logits[0, -len(continuation) :].log_softmax(-1)
    wanted = torch.tensor(continuation)
    return float(log_probs.gather(1, wanted[:, None]).sum()), bool((log_probs.argmax(-1) == wanted).all())


def assert_as_expected(found: list[tuple[float, bool]], hf_model, requests=REQUESTS) -> None:
    expected = [expected_of(hf_model, *request) for request in requests]
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)


def test_scores_through_a_quantized_cache(tiny):
    """With a quantised cache every text goes through it, so that sharing a beginning hardly changes a score."""
    model = load_model(tiny("llama")[1], dtype=torch.float32)
    exact, alone, batched = (
        Scorer(model, rows, kv_dtype=kv_dtype).score(REQUESTS)
        for rows, kv_dtype in ((16, None), (1, torch.int8), (16, torch.int8))
    )
    assert [value for value, _ in batched] == pytest.approx([value for value, _ in alone], abs=0.01)
    assert 0.02 < max(abs(a - b) for (a, _), (b, _) in zip(batched, exact, strict=True)) < 0.5


@pytest.mark.parametrize("batch_size", [None, 1, 3, 16])
@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen2"])
def test_scores_are_those_of_transformers(tiny, family, batch_size):
    hf_model, directory = tiny(family)
    scorer = Scorer(load_model(directory, dtype=torch.float32), batch_size)
    assert_as_expected(scorer.score(REQUESTS), hf_model)


def test_greedy_answers_are_recognised(tiny):
    hf_model, directory = tiny("llama")
    prompts = [[1, 2, 3], [7, 8, 9, 10]]
    answers = [
        hf_model.generate(torch.tensor([p]), max_new_tokens=5, do_sample=False)[0, len(p) :].tolist() for p in prompts
    ]
    requests = [*zip(prompts, answers, strict=True), (prompts[0], [*answers[0][:4], (answers[0][4] + 1) % 128])]
    scorer = Scorer(load_model(directory, dtype=torch.float32))
    assert [greedy for _, greedy in scorer.score(requests)] == [True, True, False]


def test_what_texts_share_is_computed_once(tiny):
    model, n_tokens = load_model(tiny("llama")[1], dtype=torch.float32), []
    model.tok_embeddings.register_forward_hook(lambda _, args, __: n_tokens.append(args[0].numel()))
    context = list(range(60))
    requests = [(context, [answer, 1, 2]) for answer in range(100, 104)]
    requests += [([5, 6, 7, 8] * 5, [answer]) for answer in range(4)]  # one input, four continuations
    Scorer(model, batch_size=4).score(requests)
    # 59 of the 60 tokens are shared: the last is computed per row, to predict the first token of the answer.
    assert sorted(n_tokens) == [4 * 3, 20, 59]


def test_groups_follow_what_is_shared():
    examples, questions = [1, 2] * 100, [[60 + q] * 20 for q in range(2)]
    requests = [(examples + question, [100 + a, 0]) for question in questions for a in range(3)]
    texts = to_texts(requests, 512)
    assert [(len(g.texts), g.n_shared) for g in to_groups(texts, 8)] == [(6, 200)]  # by the examples, the longer part
    assert [(len(g.texts), g.n_shared) for g in to_groups(texts, 4)] == [(4, 200), (2, 219)]
    assert [(len(g.texts), g.n_shared) for g in to_groups(texts, 1)] == [(1, 0)] * 6
    texts = to_texts([([1] * 20 + question * 3, [100 + a, 0]) for question in questions for a in range(3)], 128)
    assert [(len(g.texts), g.n_shared) for g in to_groups(texts, 8)] == [(3, 79), (3, 79)]  # by the questions


def test_a_full_memory_halves_the_batch(tiny, monkeypatch, capsys):
    hf_model, directory = tiny("llama")
    scorer = Scorer(load_model(directory, dtype=torch.float32), batch_size=16)
    score_suffixes = scorer._score_suffixes

    def with_little_memory(suffixes, prefixes):
        if len(suffixes) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score_suffixes(suffixes, prefixes)

    monkeypatch.setattr(scorer, "_score_suffixes", with_little_memory)
    assert_as_expected(scorer.score(REQUESTS), hf_model)
    assert scorer.batch_size == 2
    assert "out of memory: continuing with batches of 2" in capsys.readouterr().err


def test_a_compiled_model_is_compiled_for_all_batches_at_once(tiny, monkeypatch):
    hf_model, directory = tiny("llama")
    # Dynamo alone decides whether a graph serves other shapes; Inductor would only take time.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    scorer = Scorer(load_model(directory, dtype=torch.float32), batch_size=16, compile=True)
    square = [([q] * 10, [q] * 7) for q in range(16)]  # as many rows as columns: Dynamo must not take them for one size
    scorer.score([*square, ([1] * 100, [2]), ([1] * 99, [2])])
    sharing = [([1] * 50 + [q], [a, 1]) for q in range(4) for a in range(2, 4)]
    scorer.score(sharing)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 3  # whole texts, prefixes, suffixes
    assert_as_expected(scorer.score(REQUESTS), hf_model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_buckets_are_few_and_close():
    assert [bucket(n) for n in (1, 16, 17, 128, 129, 257, 2048)] == [16, 16, 32, 128, 144, 288, 2048]
    assert all(n <= bucket(n) <= max(n + 15, n * 1.125) for n in range(1, 5000))
    assert len({bucket(n) for n in range(1, 4097)}) < 50


def test_a_group_can_be_split():
    texts = [Text([1, 2, 3, n], [(n, [0])]) for n in range(3)]
    (group,) = to_groups([Text([9] * 40 + text.ids, text.continuations) for text in texts], 8)
    assert [(len(piece.texts), piece.n_shared) for piece in split(group, 2)] == [(2, 43), (1, 0)]


def test_what_cannot_be_scored_is_refused(tiny):
    model = load_model(tiny("llama")[1], dtype=torch.float32)
    with pytest.raises(ValueError, match="at least one token of context"):
        Scorer(model).score([([], [1])])
    with pytest.raises(ValueError, match="continuation of 129 tokens exceeds the maximum length 128"):
        Scorer(model).score([([1], [1] * 129)])
    with pytest.raises(ValueError, match="max_seq_length -1 must be at least 1"):
        Scorer(model, max_length=-1)
    model.norm.weight.data[7] = torch.nan
    with pytest.raises(ValueError, match="the model's logits for scored text 2 are NaN or infinite"):
        Scorer(model).score([([1], []), ([1, 2], [3]), ([1, 2], [3, 4])])
