"""All six directions, each result opened by the other side's own loader and its logits compared with the source's."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.checkpoints import tiny_checkpoint

from nemo_minitron.checkpoints import Checkpoint, open_checkpoint, verify, write_checkpoint
from nemo_minitron.checkpoints.formats.nemo1.checkpoint import Archive
from nemo_minitron.errors import CheckpointError

pytestmark = pytest.mark.slow

CASES = {
    "untied": {"tied": False},
    "tied": {"tied": True},
    # every query head its own group, an odd width, Llama-3's RoPE
    "scaled": {
        "tied": False,
        "num_key_value_heads": 6,
        "intermediate_size": 77,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("conversion")


def chain(room: Path, case: str) -> dict[str, Checkpoint]:
    """hf -> nemo2 -> nemo -> hf2, and the three other directions; one conversion of each kind, opened."""
    names = {"hf": "hf", "hf_nemo2": "nemo2", "nemo2_nemo": "nemo", "nemo_hf": "hf"}
    names |= {"hf_nemo": "nemo", "nemo_nemo2": "nemo2", "nemo2_hf": "hf"}
    home = room / case
    opened: dict[str, Checkpoint] = {}
    if not home.exists():
        changes = dict(CASES[case])
        tiny_checkpoint(home / "hf", **changes)
    opened["hf"] = open_checkpoint(home / "hf")
    steps = [
        ("hf_nemo2", "hf"),
        ("nemo2_nemo", "hf_nemo2"),
        ("nemo_hf", "nemo2_nemo"),
        ("hf_nemo", "hf"),
        ("nemo_nemo2", "hf_nemo"),
        ("nemo2_hf", "hf_nemo2"),
    ]
    for name, source in steps:
        path = home / (name + (".nemo" if names[name] == "nemo" else ""))
        opened[name] = open_checkpoint(path) if path.exists() else write_checkpoint(opened[source], path, names[name])
    return opened


@pytest.mark.parametrize("case", CASES)
def test_six_directions_keep_every_bit(room: Path, case: str) -> None:
    opened = chain(room, case)
    source = opened["hf"]
    for name, checkpoint in opened.items():
        assert checkpoint.shape == source.shape, name
        assert checkpoint.architecture == source.architecture, name
        assert checkpoint.tokenizer is not None, name
        assert (checkpoint.tokenizer / "tokenizer.json").read_bytes() == (source.path / "tokenizer.json").read_bytes()
        for tensor in source.weights.names():
            assert torch.equal(checkpoint.weights.tensor(tensor), source.weights.tensor(tensor)), (name, tensor)


@pytest.mark.parametrize("case", CASES)
def test_the_way_does_not_matter(room: Path, case: str) -> None:
    """Both ways to a format leave the same description, so the loaders below need to open only one of the two."""
    opened = chain(room, case)
    for first, second, file in (
        ("hf_nemo2", "nemo_nemo2", "context/model.yaml"),
        ("nemo_hf", "nemo2_hf", "config.json"),
    ):
        assert (opened[first].path / file).read_text() == (opened[second].path / file).read_text()
    one, other = Archive(opened["hf_nemo"].path), Archive(opened["nemo2_nemo"].path)
    assert one.read("model_config.yaml") == other.read("model_config.yaml")


@pytest.mark.parametrize(
    ("case", "source", "target"),
    [
        ("untied", "hf", "hf_nemo2"),
        ("untied", "hf_nemo2", "nemo2_nemo"),
        ("untied", "nemo2_nemo", "nemo_hf"),
        ("tied", "hf", "hf_nemo2"),
        ("tied", "hf", "hf_nemo"),
        ("scaled", "hf", "hf_nemo2"),
        ("scaled", "hf", "hf_nemo"),
    ],
)
def test_own_loaders_compute_the_source(room: Path, case: str, source: str, target: str) -> None:
    opened = chain(room, case)
    result = verify(opened[source], opened[target])
    print(f"{case} {source} -> {target}: {result.relative:.2e} of {result.scale:.3g}, {result.loader} loader")
    assert result.relative < 1e-4
    assert result.same_choice == 1.0


def test_a_checkpoint_that_nemo_wrote_is_read(room: Path) -> None:
    """NeMo saves a model of its own (local spec, random weights): no minitron.json."""
    home = room / "native"
    tiny_checkpoint(home / "hf")
    script = f"""
from nemo_minitron.runtime import cpu
cpu.prepare()
import torch
from pathlib import Path
from nemo import lightning as nl
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.collections.llm.gpt.model.llama import HFLlamaImporter, LlamaModel
from nemo_minitron.checkpoints import open_checkpoint
from nemo_minitron.checkpoints.formats.nemo2.config import nemo_config
if __name__ == "__main__":
    source = open_checkpoint({str(home / "hf")!r})
    config = nemo_config(source.shape, source.architecture, dtype="float32", multiple=128, rows=None)
    model = LlamaModel(config, tokenizer=AutoTokenizer({str(home / "hf")!r}))
    connector = HFLlamaImporter({str(home / "hf")!r})
    strategy = nl.MegatronStrategy(ckpt_save_optimizer=False, always_save_context=True, process_group_backend="gloo")
    trainer = connector.nemo_setup(model, nl.Trainer(devices=1, accelerator="cpu", strategy=strategy))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.normal_(std=0.2)
    connector.nemo_save(Path({str(home / "native")!r}), trainer)
    torch.save(dict(model.module.named_parameters()), {str(home / "parameters.pt")!r})
"""
    (home / "script.py").write_text(script)
    subprocess.run([sys.executable, home / "script.py"], check=True, timeout=240, capture_output=True)
    native, source = open_checkpoint(home / "native"), open_checkpoint(home / "hf")
    assert native.shape == source.shape
    assert native.architecture == source.architecture
    stored = torch.load(home / "parameters.pt", weights_only=True)
    norms = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    for name in native.weights.names():
        key = name
        for canonical, local in norms.items():
            key = key.replace(canonical, local)
        tensor = native.weights.tensor(name)
        assert torch.equal(tensor, stored[key][: tensor.shape[0]]), name
    result = verify(native, write_checkpoint(native, home / "back", "hf"))
    assert result.relative < 1e-4


def test_auto_resume_finds_the_weights_and_the_tokenizer(room: Path) -> None:
    """NeMo's resume API: ``AutoResume(restore_config=...)`` and ``load_context`` on a directory that we wrote."""
    path = chain(room, "untied")["hf_nemo2"].path
    script = f"""
from nemo_minitron.runtime import cpu
cpu.prepare()
from nemo import lightning as nl
from nemo.lightning.io import load_context
if __name__ == "__main__":
    context = load_context({str(path)!r} + "/context")
    assert context.model.config.kv_channels == 12, context.model.config
    tokenizer = load_context({str(path)!r} + "/context", subpath="model.tokenizer")
    assert tokenizer.vocab_size == 131, tokenizer.vocab_size
    assert "w1 w2" in tokenizer.tokenizer.apply_chat_template([{{"role": "user", "content": "w1 w2"}}], tokenize=False)
    resume = nl.AutoResume(restore_config=nl.RestoreConfig(path={str(path)!r}))
    trainer = nl.Trainer(devices=1, accelerator="cpu", strategy=nl.MegatronStrategy(process_group_backend="gloo"))
    resume.setup(trainer, model=context.model)
    assert str(trainer.strategy.restore_config.path) == {str(path)!r}
    print("resumed")
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=240, capture_output=True, text=True, check=False)
    assert "resumed" in done.stdout, done.stderr[-2000:]


def test_bfloat16_is_verified_against_the_rounded_source(room: Path) -> None:
    source = chain(room, "tied")["hf"]
    written = write_checkpoint(source, room / "bf16", "nemo2", dtype="bfloat16")
    result = verify(source, written)
    assert result.dtype == "bfloat16"
    assert result.relative < 1e-4


def test_a_wrong_conversion_is_found(room: Path) -> None:
    source = chain(room, "untied")["hf"]

    @dataclasses.dataclass
    class Swapped:
        """Up-projection and gate of one layer swapped: right shapes, wrong model."""

        inner: object

        def names(self) -> list[str]:
            return source.weights.names()

        def tensor(self, name: str) -> torch.Tensor:
            tensor = source.weights.tensor(name)
            return tensor.flip(0) if name == "decoder.layers.1.mlp.linear_fc1.weight" else tensor

    wrong = write_checkpoint(dataclasses.replace(source, weights=Swapped(None)), room / "wrong", "hf")
    with pytest.raises(CheckpointError, match="does not compute what"):
        verify(source, wrong)
    config = json.loads((room / "wrong" / "config.json").read_text())
    (room / "wrong" / "config.json").write_text(json.dumps(config | {"model_type": "nonsense"}))
    with pytest.raises(CheckpointError, match="could not be loaded by the hf loader"):
        verify(source, wrong)
