"""Models saved by transformers 5 against its own logits and answers, and our exports opened by it."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.checkpoints import hf_logits
from support.families import CLASSES, OWN, SIZES
from support.pruning import live, logits, one_process, tokens
from support.transformers5 import run_transformers5, transformers5

from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
from nemo_minitron.checkpoints.formats.huggingface import loader

pytestmark = pytest.mark.slow

IDS = tokens(2, 48, vocab=SIZES["vocab_size"])
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.3,
}
#: Name -> class of transformers, and its settings. Thetas are nobody's default.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (CLASSES[family], OWN[family]) for family in CLASSES},
    "gemma3": (
        "Gemma3",
        OWN["gemma3"]
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 20000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            }
        },
    ),
    # types of layers that no pattern gives
    "gemma3-list": (
        "Gemma3",
        OWN["gemma3"]
        | {
            "sliding_window_pattern": None,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.5, "rope_theta": 30000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
            },
        },
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 5}),
    "llama-scaled": ("Llama", {"rope_parameters": {**LLAMA3, "rope_theta": 30000.0}}),
    "qwen2-linear": ("Qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 30000.0}}),
    "llama-yarn": ("Llama", {"rope_parameters": {**YARN, "rope_theta": 30000.0}}),
    "mistral-yarn": ("Mistral", {"sliding_window": None, "rope_parameters": {**YARN, "rope_theta": 30000.0}}),
    "qwen3-moe-normalized": ("Qwen3Moe", {**OWN["qwen3_moe"], "norm_topk_prob": True}),
    "qwen3-scaled": ("Qwen3", {"rope_parameters": {**LLAMA3, "rope_theta": 30000.0}, "tie_word_embeddings": True}),
}

SAVE = """
import json, sys, torch, transformers
assert transformers.__version__.startswith("5."), transformers.__version__
folder, models, sizes = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
for name, (kind, own) in models.items():
    torch.manual_seed(0)
    made = getattr(transformers, kind + "ForCausalLM")
    model = made(made.config_class(**sizes | own))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if parameter.ndim == 1 and not key.endswith("bias") and kind not in ("Nemotron", "Gemma3"):
                parameter.add_(1.0)
    model.save_pretrained(f"{folder}/{name}")
    if "experts" in str(sorted(model.state_dict())):
        model.save_pretrained(f"{folder}/{name}-fused", save_original_format=False)
"""

ANSWER = """
import sys, torch, transformers
assert transformers.__version__.startswith("5."), transformers.__version__
folder, ids, names = sys.argv[1], torch.load(sys.argv[2]), sys.argv[3].split(",")
out = {}
for name in names:
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", dtype=torch.float32).eval()
    with torch.no_grad():
        answer = model.generate(ids[:1, :8], attention_mask=torch.ones(1, 8), do_sample=False, max_new_tokens=12)
        out[name] = (model(ids).logits, answer)
torch.save(out, folder + "/answers.pt")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of every family by transformers 5, and ``answers.pt``: its logits and greedy answers."""
    folder = tmp_path_factory.mktemp("transformers5")
    sizes = {key: value for key, value in SIZES.items() if key != "rope_theta"}
    models = {
        name: (kind, {"rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"}, **own})
        for name, (kind, own) in MODELS.items()
    }
    site = transformers5()
    run_transformers5(site, SAVE, folder, json.dumps(models), json.dumps(sizes))
    torch.save(IDS, folder / "ids.pt")
    run_transformers5(site, ANSWER, folder, folder / "ids.pt", ",".join(MODELS))
    return folder


@pytest.fixture(scope="module")
def exported(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same models read and written by us, and what transformers 5 answers with them."""
    folder = tmp_path_factory.mktemp("exported")
    for name in MODELS:
        write_checkpoint(open_checkpoint(saved / name), folder / name, "hf")
    run_transformers5(transformers5(), ANSWER, folder, saved / "ids.pt", ",".join(MODELS))
    return folder


@pytest.fixture(scope="module")
def groups():
    with one_process() as made:
        yield made


def close(here: torch.Tensor, there: torch.Tensor) -> bool:
    """Within 1e-4 of the largest logit."""
    assert there.std() > 0.05
    here = here[..., : there.shape[-1]]
    return bool((here - there).abs().max() <= 1e-4 * there.abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_megatron_computes_what_transformers_5_computes(name, saved, groups):
    expected, _ = torch.load(saved / "answers.pt")[name]
    assert "rope_theta" not in json.loads((saved / name / "config.json").read_text())
    assert close(logits(live(open_checkpoint(saved / name), groups), IDS), expected)


@pytest.mark.parametrize("name", MODELS)
def test_what_an_import_is_verified_with_computes_the_same(name, saved):
    """The stack's transformers, which does not know ``rope_parameters``."""
    expected, _ = torch.load(saved / "answers.pt")[name]
    with torch.no_grad():
        assert close(loader.hf_logits(saved / name, IDS, torch.float32), expected)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_in_one_tensor(name, saved):
    """As transformers 5 holds them, and saves them if it is told to."""
    with safe_open(saved / f"{name}-fused" / "model.safetensors", framework="pt") as file:
        assert "model.layers.0.mlp.experts.gate_up_proj" in file.keys()  # noqa: SIM118 (not a dict)
    fused, alone = open_checkpoint(saved / f"{name}-fused").weights, open_checkpoint(saved / name).weights
    for tensor in alone.names():
        assert torch.equal(fused.tensor(tensor), alone.tensor(tensor)), tensor


@pytest.mark.parametrize("name", MODELS)
def test_both_generations_read_an_export(name, saved, exported):
    expected, answer = torch.load(saved / "answers.pt")[name]
    again, same = torch.load(exported / "answers.pt")[name]
    assert close(again, expected)
    assert torch.equal(same, answer)
    assert answer.shape[1] > 9
    # transformers 4 fails where no pattern gives the types of the layers; what verifies exports sets them by hand
    logits_of = hf_logits if name != "gemma3-list" else partial(loader.hf_logits, dtype=torch.float32)
    with torch.no_grad():
        assert close(logits_of(exported / name, IDS), expected)


def test_the_key_matters(saved, groups, tmp_path):
    """What a reader would compute that did not know ``rope_parameters``."""
    shutil.copytree(saved / "llama-scaled", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    expected, _ = torch.load(saved / "answers.pt")["llama-scaled"]
    assert not close(logits(live(open_checkpoint(tmp_path / "hf"), groups), IDS), expected)
