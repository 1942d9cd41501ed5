"""dflash.py: a head's logits are those of transformers' modules; that it changes no token is in test_speculative.py.

    python -m pytest tests/test_dflash.py

Worth knowing: with `speculators` or `dflash` installed (they ask for older packages: `pip install --no-deps`), their
own heads are compared, too.
"""

import json

import pytest
import torch
from conftest import GREEDY, SIZES, prompt_of, relative_error
from heads import change_tensors, make_dflash, make_head, save, save_dflash
from transformers import Qwen3Config

from fast.checkpoint import load_model, open_checkpoint
from fast.cli import DEMO
from fast.dflash import DFlashDraft, DFlashHead
from fast.drafting import SPARE
from fast.head_files import load_head
from fast.sampling import Sampling
from fast.speculative import load_draft
from fast.tokenizer import load_tokenizer
from model import Transformer
from scripts.download import check_config


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "use_sliding_window": True}
KINDS = {
    "z-lab": ("z-lab", {"hidden_at": (2, 4, 7)}),
    "older": ("older", {"num_hidden_layers": 1, "mask_token_id": 127}),
    "window": ("z-lab", MIXED),
    "scaled": ("z-lab", {"input_embedding_scale": 8.0, "output_multiplier": 0.5, "attention_bias": True}),
    "speculators": ("speculators", {"hidden_at": (0, 8), "num_hidden_layers": 3}),
    "own-vocab": ("speculators", {"own_vocab": list(range(1, 128, 2)), **MIXED}),
    "from-last": ("speculators", {"sample_from_anchor": True, "own_vocab": list(range(0, 128, 3))}),
}


def cached(model: Transformer, rows: int = 1) -> Transformer:
    model.setup_caches(rows, 64, SPARE)
    return model


def states_of(hf, target: Transformer, text: list[int], hidden_at: tuple[int, ...]) -> torch.Tensor:
    """What enters these layers, `[1, S, len(hidden_at) * dim]`, by transformers; the last by ours, before the norm."""
    states = hf(torch.tensor([text]), output_hidden_states=True).hidden_states
    last = target.run_layers(target.tok_embeddings(torch.tensor([text])), None, None)[0]
    return torch.cat([(*states[:-1], last)[i] for i in hidden_at], -1)


def logits_of(head: DFlashHead, target: Transformer, text: list[int], n: int, k: int) -> torch.Tensor:
    """Logits `[k, own_vocab]` of k drafts after `text`, whose first n tokens are a prompt and the others steps."""
    drafter, found, kept = DFlashDraft(head, target, Sampling(0, None), k), [], head.logits
    slots, last = target.slots, len(text) - 1
    drafter.run(torch.tensor([text[:n]]), slots[:n], slots[:n], torch.tensor([[n - 1]]))
    for i in range(n, last):
        drafter.run(torch.tensor([text[i : i + 1]]), torch.tensor([[i]]), slots[: i + 1])
    head.logits = lambda x: found.append(kept(x)) or found[-1]
    drafts = drafter.draft(k, torch.tensor([text[last:]]), torch.tensor([[last]]), slots[: last + k + 1])[0]
    del head.logits
    assert drafts.tolist() == head.ids[found[0].argmax(-1)].tolist()
    return found[0][0]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(deep, tmp_path, kind):
    layout, options = KINDS[kind]
    reference, text = make_dflash(**options), prompt_of(14)
    hf, target = deep[0], cached(load_model(deep[1], dtype=torch.float32))
    head = cached(load_head(save_dflash(reference, tmp_path, layout), target, dtype=torch.float32))
    assert head.n_parameters == sum(parameter.numel() for parameter in reference.parameters())
    states = states_of(hf, target, text[:13], reference.hidden_at)[0]
    for n, k in ((13, 1), (13, 6), (10, 5), (1, 15)):
        expected = reference.drafts(states, text[13], k, hf)
        found = logits_of(head, target, text, n, k)
        assert found.shape == expected.shape
        assert relative_error(found, expected) < 1e-4
    if hasattr(reference, "d2t"):
        assert (head.ids - torch.arange(len(head.ids))).equal(reference.d2t)


@pytest.mark.parametrize("kind", ["z-lab", "window", "from-last"])
def test_kernels_compute_what_float32_does(deep, tmp_path, kind):
    layout, options = KINDS[kind]
    path, text, logits = save_dflash(make_dflash(**options), tmp_path, layout), prompt_of(14), []
    for dtype in (torch.float32, torch.bfloat16):
        target = cached(load_model(deep[1], dtype=dtype))
        logits.append(logits_of(cached(load_head(path, target, dtype=dtype)), target, text, 12, 6))
    assert relative_error(logits[1], logits[0]) < 0.05


def test_all_of_a_window_that_is_not_causal_is_seen(deep, tmp_path):
    """As in full attention, if the window is wider than the text."""
    wide, found = {**MIXED, "sliding_window": 64}, []
    for options, layout, changes in (
        ({}, "z-lab", {}),
        (wide, "z-lab", {"is_causal": False}),
        (wide, "speculators", {"sliding_window_non_causal": True}),
        (wide, "z-lab", {}),
    ):
        path = save_dflash(make_dflash(**options), tmp_path, layout)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **changes}))
        target = cached(load_model(deep[1], dtype=torch.bfloat16))
        found.append(logits_of(cached(load_head(path, target)), target, prompt_of(14), 13, 6))
    assert found[0].equal(found[1])
    assert found[0].equal(found[2])
    assert relative_error(found[3], found[0]) > 0.05


DFLASH = {"full": {}, "window": MIXED, "scaled": {"input_embedding_scale": 8.0, "output_multiplier": 0.5}}


@pytest.mark.parametrize("kind", DFLASH)
def test_logits_are_those_of_dflash(deep, tmp_path, kind):
    model = pytest.importorskip("dflash.model", reason="needs the package dflash")
    options = dict(DFLASH[kind])
    scales = {name: options.pop(name) for name in ("input_embedding_scale", "output_multiplier") if name in options}
    config = Qwen3Config(**{**SIZES, "num_hidden_layers": 2, "head_dim": 16, **options})
    config.num_target_layers, config.block_size = 8, 8
    config.dflash_config = {"target_layer_ids": [1, 3, 6], "mask_token_id": 7, **scales}
    theirs, text = model.DFlashDraftModel(config).float().eval(), prompt_of(14)
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    hf, target = deep[0], cached(load_model(deep[1], dtype=torch.float32))
    states = hf(torch.tensor([text[:13]]), output_hidden_states=True).hidden_states
    block = torch.tensor([[text[13]] + [7] * 5])
    hidden = theirs(
        target_hidden=model.extract_context_feature(states, theirs.target_layer_ids),
        noise_embedding=model._raw_input_embeddings(hf, block, scales.get("input_embedding_scale", 1.0)),
        position_ids=torch.arange(19)[None],
    )
    expected = theirs.compute_logits(hidden[:, 1:], hf.lm_head)[0]
    head = cached(load_head(tmp_path, target, dtype=torch.float32))
    assert (head.max_k, head.hidden_at) == (7, (2, 4, 7))
    assert relative_error(logits_of(head, target, text, 12, 5), expected) < 1e-4


@pytest.mark.parametrize("from_last", [False, True])
@pytest.mark.parametrize("n_own", [64, 128])
def test_logits_are_those_of_speculators(deep, tmp_path, n_own, from_last):
    dflash = pytest.importorskip("speculators.models.dflash", reason="needs the package speculators")
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    layer = Qwen3Config(**{**SIZES, "num_hidden_layers": 2, "head_dim": 16})
    layer._attn_implementation = "eager"
    config = dflash.DFlashSpeculatorConfig(
        transformer_layer_config=layer, draft_vocab_size=n_own, block_size=6, mask_token_id=7,
        aux_hidden_state_layer_ids=[2, 4, 7], sample_from_anchor=from_last,
        speculators_config=SpeculatorsConfig(
            algorithm="dflash",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=5)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=str(deep[1]), architectures=["LlamaForCausalLM"]),
        ),
    )  # fmt: skip
    torch.manual_seed(0)
    theirs, (hf, path), text = dflash.DFlashDraftModel(config).float().eval(), deep, prompt_of(14)
    for name, parameter in theirs.named_parameters():
        parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.2)
    if n_own < 128:
        theirs.load_vocab_mappings(torch.arange(128) % 2 == 1, torch.arange(1, 128, 2) - torch.arange(64))
    theirs.load_verifier_weights()
    theirs.save_pretrained(tmp_path)
    target = cached(load_model(path, dtype=torch.float32))
    long = text + prompt_of(10)
    loss_mask = torch.zeros(1, 24)
    loss_mask[0, 13] = 1  # the only block begins there
    states = states_of(hf, target, long, (2, 4, 7))
    found = theirs._backbone_forward(
        states, torch.tensor([long]), loss_mask, states[..., :64], torch.zeros(1, 24, dtype=torch.long), max_anchors=1
    )
    head = cached(load_head(tmp_path, target, dtype=torch.float32))
    expected = found[1][0] if from_last else found[1][0, 1:]
    assert relative_error(logits_of(head, target, text, 12, len(expected)), expected) < 1e-4
    assert head.max_k == len(expected)


# --- files that are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["z-lab", "speculators"])
def test_a_head_is_fetched_but_is_no_model(tmp_path, layout):
    path = save_dflash(make_dflash(), tmp_path, layout)
    check_config(path / "config.json")
    with pytest.raises(ValueError, match=f"{path} is no model but a head .DFlash.: give it, as it is, to --draft_ch"):
        open_checkpoint(path)


def test_a_step_of_more_drafts_than_a_block_has(ours, tmp_path):
    target = cached(ours())
    for size, ks in ((2, (1,)), (3, (2,)), (8, (2, 3, 7)), (16, (3, 7, 15)), (40, (3, 7, 15))):
        head = cached(load_head(save_dflash(make_dflash(block_size=size), tmp_path), target, dtype=torch.float32))
        assert DFlashDraft(head, target, GREEDY).ks == ks
        if size < 16:
            with pytest.raises(ValueError, match=f"speculate_k {size} must be 1 to {size - 1}, the drafts in a bl"):
                DFlashDraft(head, target, GREEDY, size)


@pytest.mark.parametrize(
    ("inside", "changes", "message"),
    [
        ({}, {"vocab_size": 130}, "a head for a model with 130 embeddings, this one has 128; a head serves only"),
        ({}, {"hidden_size": 32}, "hidden_size is 32; expected 64, its target's"),
        ({}, {"dflash_config": 5}, "dflash_config is 5; expected an object"),
        (
            {"target_layer_ids": [1]},
            {},
            r"target_layer_ids is \[1\]; expected ascending numbers of the target's layers, up to 0",
        ),
        ({"target_layer_ids": None}, {}, "target_layer_ids is None; expected ascending numbers of the"),
        ({"target_layer_ids": [0]}, {}, r"fc.weight is \[64, 128\], expected \[64, 64\]"),
        ({"mask_token_id": None}, {}, "it has no mask_token_id"),
        ({"mask_token_id": 128}, {}, "mask_token_id is 128; expected a whole number above -1, up to 127"),
        ({"block_size": None}, {}, "it has no block_size"),
        ({"block_size": 1}, {}, "block_size is 1; expected a whole number above 1"),
        ({"input_embedding_scale": "big"}, {}, "input_embedding_scale is 'big'; expected a number above 0"),
        ({"final_logit_softcapping": 30.0}, {}, "final_logit_softcapping is 30.0, which is not supported"),
        ({}, {"is_causal": True}, "is_causal is True, which is not supported"),
        ({}, {"model_type": "gpt_oss"}, "the head's layers are of type 'gpt_oss'; supported: llama, qwen3"),
        ({}, {"num_hidden_layers": 3, "layer_types": None}, "missing tensors: layers.2.input_layernorm.weight"),
        (
            {},
            {"architectures": ["DFlash2DraftModel"]},
            "architecture 'DFlash2DraftModel' is not supported; supported",
        ),
    ],
)
def test_a_bad_configuration_is_one_line(ours, tmp_path, inside, changes, message):
    path = save_dflash(make_dflash(), tmp_path)
    config = json.loads((path / "config.json").read_text())
    config = {**config, "dflash_config": {**config["dflash_config"], **inside}, **changes}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as raised:
        load_draft(path, ours(), load_tokenizer(DEMO), "cpu", torch.float32)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("hidden_norm.weight"), r"missing tensors: hidden_norm.weight \[64\]"),
        (
            lambda t: t.pop("layers.1.self_attn.q_norm.weight"),
            r"missing tensors: layers.1.self_attn.q_norm.weight \[16\]",
        ),
        (lambda t: t.update(extra=torch.ones(1)), "unexpected tensors: extra"),
        (lambda t: t.pop("d2t"), "has no d2t; expected integers, one for each of its 64 tokens"),
        (lambda t: t.pop("lm_head.weight"), r"missing tensors: lm_head.weight \[64, 64\]"),
    ],
)
def test_bad_tensors_are_one_line(ours, tmp_path, change, message):
    path = save_dflash(make_dflash(own_vocab=list(range(64))), tmp_path, "speculators")
    change_tensors(path, change)
    with pytest.raises(ValueError, match=message):
        load_head(path, ours(), dtype=torch.float32)


def test_a_head_uses_the_target_s_embeddings_and_output(ours, tmp_path):
    """An EAGLE-3 head without an output projection of its own, too, if it has the target's vocabulary."""
    target = ours("llama-tied")
    eagle = save(make_head(own_embeddings=False, own_vocab=range(128)), tmp_path / "eagle", "specforge")
    change_tensors(eagle, lambda tensors: tensors.pop("lm_head.weight"))
    for path in (save_dflash(make_dflash(), tmp_path / "dflash"), eagle):
        head = load_head(path, target, dtype=torch.float32)
        for name in ("tok_embeddings", "output"):
            ours_, theirs = (getattr(model, name).weight for model in (head, target))
            assert ours_.data_ptr() == theirs.data_ptr()
