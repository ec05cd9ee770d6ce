"""Models with scaled RoPE against transformers, beyond their original context: logits, gradients, answers, formats."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import hf_logits, tiny_tokenizer
from support.families import SIZES, family_model, some_units
from support.pruning import live, logits, one_process, tokens

from nemo_minitron.checkpoints import open_checkpoint, verify, write_checkpoint
from nemo_minitron.checkpoints.formats.huggingface.loader import hf_logits as own_hf_logits
from nemo_minitron.pruning import DepthPrune, WidthPrune, prune_weights

CONTEXT = 256
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 2.5}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
#: Family and scaling of each model. Betas are chosen so that the short heads have frequencies of all three kinds.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-yarn": ("llama", {**YARN, "beta_fast": 2.0, "beta_slow": 0.25}),
    "qwen2-yarn": ("qwen2", {**YARN, "attention_factor": 0.8}),
    "qwen3-yarn": ("qwen3", {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3}),
    "mixtral-yarn": ("mixtral", YARN),
    "qwen3_moe-yarn": ("qwen3_moe", YARN),
    "llama-linear": ("llama", LINEAR),
    "qwen2-linear": ("qwen2", {**LINEAR, "factor": 8.0}),
    "qwen3-llama3": ("qwen3", LLAMA3),
}
#: Without the padding token, whose embedding transformers gives no gradient.
IDS = tokens(2, 200, vocab=SIZES["vocab_size"]).clamp(min=3)


@pytest.fixture(scope="module")
def groups():
    with one_process() as found:
        yield found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("rotary"), {}

    def model(name: str) -> Path:
        if name not in made:
            family, scaling = MODELS[name]
            own = {"rope_scaling": scaling, "max_position_embeddings": CONTEXT}
            made[name] = family_model(family, folder / name, **own)
            tiny_tokenizer(made[name])
        return made[name]

    return model


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> bool:
    found = found[..., : expected.shape[-1]]
    assert expected.std() > 0.05
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_logits_beyond_the_original_context(name, models, groups, tmp_path):
    """Of the model, of its export, and of what is left of it after pruning; scaling is what makes the difference."""
    source = open_checkpoint(models(name))
    expected = hf_logits(models(name), IDS)
    assert close(logits(live(source, groups), IDS), expected)
    write_checkpoint(source, tmp_path / "again", "hf")
    assert torch.equal(hf_logits(tmp_path / "again", IDS), expected)
    kept = some_units(source.shape)
    pruned = prune_weights(source, kept)
    write_checkpoint(pruned, tmp_path / "pruned", "hf")
    assert close(found := logits(live(pruned, groups), IDS), hf_logits(tmp_path / "pruned", IDS))
    chunks = live(source, groups)
    WidthPrune(kept)(DepthPrune(kept)(chunks[0]))
    assert torch.equal(logits(chunks, IDS), found)
    plain = dataclasses.replace(source, architecture=dataclasses.replace(source.architecture, rotary_scaling=None))
    assert not close(logits(live(plain, groups), IDS), expected, 1e-2)


def test_the_factor_stands_where_transformers_4_takes_another(models, groups, tmp_path):
    """As Qwen2.5's own advice writes it: ``max_position_embeddings`` is still the original context."""
    own = {"rope_scaling": {**YARN, "factor": 4.0, "original_max_position_embeddings": 64}}
    path = family_model("qwen2", tmp_path / "hf", max_position_embeddings=64, **own)
    source = open_checkpoint(path)
    assert source.architecture.max_position_embeddings == 256
    found = logits(live(source, groups), IDS)
    assert close(found, own_hf_logits(path, IDS, torch.float32).detach())
    assert not close(found, hf_logits(path, IDS), 1e-2)
    write_checkpoint(source, tmp_path / "again", "hf")
    assert close(found, hf_logits(tmp_path / "again", IDS))


class Float64Rotary(torch.nn.Module):
    """Cosine and sine in float64, by the paper's formulas; transformers' own are float32 in a model of any dtype."""

    def __init__(self, scaling: dict[str, Any], base: float, dim: int) -> None:
        super().__init__()
        places = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        wavelengths = 2 * math.pi * base**places
        if scaling["rope_type"] == "linear":
            self.frequencies, self.factor = 2 * math.pi / wavelengths / scaling["factor"], 1.0
            return
        low, high = (
            dim * math.log(scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (scaling.get("beta_fast", 32), scaling.get("beta_slow", 1))
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
        ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
        assert ramp.unique().numel() > 2
        self.frequencies = 2 * math.pi / wavelengths * (ramp / scaling["factor"] + 1 - ramp)
        self.factor = scaling.get("attention_factor", 0.1 * math.log(scaling["factor"]) + 1)

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[..., None].double() * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * self.factor, angles.sin() * self.factor


@pytest.mark.parametrize("name", ["llama-yarn", "llama-linear"])
def test_logits_and_gradients_equal_a_float64_reference(name, models, groups, tmp_path):
    """Every parameter's gradient to 1e-4 of its largest element, logits to 2e-5 of the largest."""
    from transformers import AutoModelForCausalLM

    from nemo_minitron.checkpoints.live import canonical_parameters

    path, (_, scaling) = models(name), MODELS[name]
    theirs = AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float64).train()
    theirs.model.rotary_emb = Float64Rotary(scaling, SIZES["rope_theta"], SIZES["head_dim"])
    weights = torch.randn(2, 200, SIZES["vocab_size"], generator=torch.Generator().manual_seed(2)).double()
    expected = theirs(IDS).logits
    (expected * weights).sum().backward()
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    save_file({key: part.grad for key, part in theirs.named_parameters()}, tmp_path / "model.safetensors")
    gradients = open_checkpoint(tmp_path).weights

    (chunk,) = live(open_checkpoint(path), groups)
    found = chunk(IDS, torch.arange(200).expand_as(IDS), None)[..., : SIZES["vocab_size"]]
    (found * weights).sum().backward()
    assert close(found.detach(), expected.detach(), 2e-5)
    for key, parameter in canonical_parameters(chunk):
        gradient = gradients.tensor(key)
        ours = parameter.grad[: len(gradient)]
        assert (ours - gradient).abs().max() <= 1e-4 * gradient.abs().max(), key


@pytest.mark.parametrize("name", ["llama-yarn", "qwen2-linear"])
def test_answers_beyond_the_original_context(name, models, groups):
    """Token by token with a cache, as transformers answers."""
    from transformers import AutoModelForCausalLM

    from nemo_minitron.generation import Sampling, generate_tokens

    model = AutoModelForCausalLM.from_pretrained(models(name)).eval()
    prompts = [IDS[0, :30].tolist(), IDS[1, :70].tolist()]
    found = generate_tokens(
        live(open_checkpoint(models(name)), groups),
        groups,
        prompts,
        sampling=Sampling(greedy=True, max_new_tokens=12),
        ends=[],
        vocab_size=SIZES["vocab_size"],
        max_length=CONTEXT,
    )
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "eos_token_id": None}
        there = model.generate(ids, do_sample=False, max_new_tokens=12, **options)
        assert answer.tokens == there[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"),
    [("llama-yarn", "nemo2"), ("qwen3-llama3", "nemo2"), ("qwen2-linear", "nemo2"), ("llama-linear", "nemo")],
)
def test_nemo_computes_it(name, form, models, tmp_path):
    """NeMo's own loaders open what is written; its description says all without our record."""
    source, path = open_checkpoint(models(name)), tmp_path / (f"model.{form}" if form == "nemo" else form)
    written = write_checkpoint(source, path, form)
    assert written.architecture == source.architecture
    assert verify(source, written).relative < 1e-4
    if form == "nemo2":
        (path / "minitron.json").unlink()
        again = open_checkpoint(path)
        assert dataclasses.replace(again.architecture, max_position_embeddings=CONTEXT) == source.architecture
        assert verify(again, write_checkpoint(again, tmp_path / "hf", "hf")).relative < 1e-4
