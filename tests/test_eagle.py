"""eagle.py: a head's logits are those of transformers' modules, and what it drafts changes no token.

    python -m pytest tests/test_eagle.py

Worth knowing: with `speculators` installed (it asks for older packages: `pip install --no-deps`), its own heads are
compared, too.
"""

import json

import pytest
import torch
from conftest import GREEDY, SIZES, prompt_of, relative_error
from heads import change_tensors, make_head, save
from transformers import LlamaConfig, Qwen3Config

from fast.checkpoint import load_model, open_checkpoint
from fast.drafting import SPARE
from fast.eagle import EagleDraft, EagleHead
from fast.head_files import load_head
from model import Transformer
from scripts.download import check_config


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


KINDS = {
    "safeailab": ("safeailab", {"hidden_at": (2, 4, 5), "own_embeddings": False}),
    "specforge": ("specforge", {"hidden_at": (2, 3, 8)}),
    "speculators": ("speculators", {"norm_before_residual": True}),
    "norms": ("speculators", {"fc_norm": True, "norm_output": True, "own_embeddings": False}),
    "one-norm": ("specforge", {"hidden_at": (1, 2), "norm_before_fc": True}),
    "narrow": ("specforge", {"hidden_at": (1, 2), "hidden_size": 32, "attention_bias": True}),
    "qwen3": ("speculators", {"kind": "qwen3"}),
    "two-layers": ("speculators", {"num_hidden_layers": 2, "norm_before_residual": True}),
    "window": ("speculators", {"sliding_window": 3, "layer_types": ["sliding_attention"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(deep, tmp_path, kind):
    layout, options = KINDS[kind]
    reference = make_head(**options)
    hf, target = deep[0], load_model(deep[1], dtype=torch.float32)
    target.setup_caches(1, 64, SPARE)
    head = load_head(save(reference, tmp_path / "head", layout), target, dtype=torch.float32)
    head.setup_caches(1, 64, SPARE)
    text = prompt_of(12)
    states = hf(torch.tensor([text]), output_hidden_states=True).hidden_states
    before_the_norm = target.run_layers(target.tok_embeddings(torch.tensor([text])), None, None)[0]
    torch.testing.assert_close(target.norm(before_the_norm), states[8])
    states = torch.cat([(*states[:8], before_the_norm)[i] for i in reference.hidden_at], -1)
    expected = reference.drafts(states[0, :8], torch.tensor(text[1:]), 4, hf.model.embed_tokens)
    assert relative_error(forced(head, target, text), expected) < 1e-4
    assert (head.ids - torch.arange(len(head.ids))).equal(reference.d2t)
    drafts = text[1:9]
    for n in range(1, 5):
        likeliest = reference.drafts(states[0, :8], torch.tensor(drafts), n, hf.model.embed_tokens)[-1].argmax()
        drafts.append(int(head.ids[likeliest]))
    drafter = EagleDraft(head, target, GREEDY, 4)
    read(drafter, text[:8])
    found = drafter.draft(4, torch.tensor([text[8:9]]), torch.tensor([[8]]), target.slots[:20])
    assert found[0].tolist() == [drafts[8:]]


def test_kernels_compute_what_float32_does(deep, tmp_path):
    path, text = save(make_head(own_embeddings=False), tmp_path, "specforge"), prompt_of(12)
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        target = load_model(deep[1], dtype=dtype)
        target.setup_caches(1, 64, SPARE)
        head = load_head(path, target, dtype=dtype)
        head.setup_caches(1, 64, SPARE)
        logits.append(forced(head, target, text))
    assert relative_error(logits[1], logits[0]) < 0.05


def read(drafter: EagleDraft, prompt: list[int]) -> None:
    slots = drafter.target.slots[: len(prompt)]
    drafter.run(torch.tensor([prompt]), slots, slots, torch.tensor([[len(prompt) - 1]]))


def forced(head: EagleHead, target: Transformer, text: list[int]) -> torch.Tensor:
    """Logits `[4, own_vocab]` of four drafts after `text[:9]`, when `text[9:12]` are what is drafted."""
    drafter, found, kept = EagleDraft(head, target, GREEDY, 4), [], head.logits
    read(drafter, text[:8])
    head.logits = lambda x: found.append(kept(x)) or found[-1]
    x = drafter._read_step(torch.tensor([text[8:9]]), torch.tensor([[8]]), target.slots[:20])
    drafter._first(x)
    for i in range(3):
        x, _ = drafter._next(torch.tensor([[text[9 + i]]]), x, torch.tensor([[8 + i]]), target.slots[:20])
    head.logits = kept
    return torch.cat(found)[:, 0]


SPECULATORS = {
    "plain": {"eagle_aux_hidden_state_layer_ids": [2, 3, 8]},
    "residual": {"norm_before_residual": True, "eagle_aux_hidden_state_layer_ids": [1, 4]},
    "norms": {"fc_norm": True, "norm_output": True},
    "one-norm": {"norm_before_fc": True},
    "qwen3": {"norm_before_residual": True},
}


@pytest.mark.parametrize("kind", SPECULATORS)
def test_logits_are_those_of_speculators(deep, tmp_path, kind):
    eagle3 = pytest.importorskip("speculators.models.eagle3", reason="needs the package speculators")
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    options = {"eagle_aux_hidden_state_layer_ids": [2, 4, 5], **SPECULATORS[kind]}
    config_class = Qwen3Config if kind == "qwen3" else LlamaConfig
    layer = config_class(**{**SIZES, "num_hidden_layers": 1, "head_dim": 16})
    layer._attn_implementation = "eager"
    config = eagle3.Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=64,
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=3)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=str(deep[1]), architectures=["LlamaForCausalLM"]),
        ),
        **options,
    )
    torch.manual_seed(0)
    theirs = eagle3.Eagle3DraftModel(config).float().eval()
    t2d = torch.arange(128) % 2 == 1
    theirs.load_vocab_mappings(t2d, torch.arange(1, 128, 2) - torch.arange(64))
    for name, parameter in theirs.named_parameters():
        parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    target, text, found = load_model(deep[1], dtype=torch.float32), prompt_of(12), []
    target.setup_caches(1, 64, SPARE)
    head = load_head(tmp_path, target, dtype=torch.float32)
    head.setup_caches(1, 64, SPARE)
    states = target(torch.tensor([text[:11]]), hidden_at=head.hidden_at)[1]
    theirs.lm_head.register_forward_hook(lambda module, inputs, logits: found.append(logits[0, 7]))
    theirs(states, torch.tensor([text[1:]]), torch.zeros(1, 11, dtype=torch.long), ttt_steps=4)
    assert relative_error(forced(head, target, text), torch.stack(found)) < 1e-4


# --- files that are none ---------------------------------------------------------------------------------------------


def test_a_head_is_fetched_but_is_no_model(tmp_path):
    path = save(make_head(), tmp_path, "specforge")
    check_config(path / "config.json")
    with pytest.raises(ValueError, match=f"{path} is no model but a head .EAGLE-3.: give it, as it is, to --draft_"):
        open_checkpoint(path)


BAD_CONFIGS = [
    (
        {"vocab_size": 130},
        "a head for a model with 130 embeddings, this one has 128; a head serves only the model it was",
    ),
    (
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 3]}},
        r"is \[0, 2, 3\]; expected ascending numbers of the",
    ),
    ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 0]}}, r"is \[1, 0\]; expected ascending numbers of the"),
    ({"eagle_config": 5}, "eagle_config is 5; expected an object"),
    ({"fc_norm": True, "norm_before_fc": True}, "norm_before_fc and fc_norm are both true; expected one of them"),
    ({"quantization_config": {"bits": 4}}, "a quantised head .* is not supported"),
    ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": "all"}}, "ids is 'all'; expected ascending number"),
    ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0]}}, r"fc.weight is \[64, 192\], expected \[64, 64\]"),
    ({"eagle_config": None}, r"layer_ids is \[2, 1, -1\]; expected ascending numbers of the target's layers, up to 2"),
    ({"draft_vocab_size": 60}, r"has a d2t of \[64\] in torch.int64; expected integers, one for each of its 60 tokens"),
    ({"draft_vocab_size": 2**31}, "expected integers, one for each of its 2147483648 tokens"),
    ({"head_dim": 2**31}, "head_dim is 2147483648; expected a whole number above 1, up to 10000"),
    ({"draft_vocab_size": "many"}, "draft_vocab_size is 'many'; expected a whole number"),
    ({"norm_before_residual": 1}, "norm_before_residual is 1; expected true or false"),
    ({"fc_norm": True}, "missing tensors: fc_norm.0.weight"),
    ({"num_hidden_layers": 2}, "missing tensors: layers.1.input_layernorm.weight"),
    ({"transformer_layer_config": [1]}, r"transformer_layer_config is \[1\]; expected an object"),
    ({"model_type": "mistral"}, "the head's layers are of type 'mistral'; supported: llama, qwen3"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS)
def test_a_bad_configuration_is_one_line(ours, tmp_path, changes, message):
    path = save(make_head(), tmp_path, "specforge")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message) as raised:
        load_head(path, ours(), dtype=torch.float32)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("fc.weight"), r"missing tensors: fc.weight \[64, 192\]"),
        (lambda t: t.pop("embed_tokens.weight"), "the target's do not fit: it is 32 wide, its target 64"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64)}), "has tensors with and without `model.` before"),
        (lambda t: t.update(extra=torch.ones(1)), "unexpected tensors: extra"),
        (lambda t: t.pop("d2t"), "has no d2t; expected integers, one for each of its 64 tokens"),
        (lambda t: t.update(d2t=t["d2t"].float()), r"has a d2t of \[64\] in torch.float32; expected integers"),
        (lambda t: t.update(d2t=torch.tensor(1)), r"has a d2t of \[\] in torch.int64; expected integers"),
        (lambda t: t["d2t"].add_(1000), "d2t does not lead to 64 different tokens of the target's 128"),
        (lambda t: t["d2t"][:2].copy_(torch.tensor([1, 0])), "d2t does not lead to 64 different tokens of the target"),
    ],
)
def test_bad_tensors_are_one_line(ours, tmp_path, change, message):
    narrow = {"hidden_size": 32} if " wide" in message else {}
    path = save(make_head(**narrow), tmp_path, "specforge")
    change_tensors(path, change)
    with pytest.raises(ValueError, match=message):
        load_head(path, ours(), dtype=torch.float32)


def test_a_head_for_granite_is_refused(ours, tmp_path):
    with pytest.raises(ValueError, match="no head can serve a Granite model here"):
        load_head(save(make_head(), tmp_path, "specforge"), ours("granite"))


def test_the_target_keeps_its_embeddings(ours, tmp_path):
    target = ours("llama-tied")
    weight = target.tok_embeddings.weight
    head = load_head(save(make_head(own_embeddings=False), tmp_path, "specforge"), target, dtype=torch.float32)
    assert target.tok_embeddings.weight is weight
    assert head.tok_embeddings.weight.data_ptr() == weight.data_ptr()


def test_a_directory_without_weights_is_one_line(ours, tmp_path):
    path = save(make_head(), tmp_path, "specforge")
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{path} has no .*safetensors and no pytorch_model"):
        load_head(path, ours())
