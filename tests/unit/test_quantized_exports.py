"""Quantized exports through ModelOpt: every family, the files, the numbers in them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import tiny_checkpoint
from support.families import CLASSES, family_model

from nemo_minitron.axes import family
from nemo_minitron.checkpoints import open_checkpoint, write_checkpoint
from nemo_minitron.checkpoints.formats.huggingface.loader import load_transformers
from nemo_minitron.config import ExportConfig, OptionalDataConfig, SourceConfig, load
from nemo_minitron.data import Blocks
from nemo_minitron.errors import CheckpointError, ConfigError, MissingDependency, ShapeError
from nemo_minitron.jobs.needs import check_needs
from nemo_minitron.jobs.records import hashed_settings
from nemo_minitron.quantization import SCHEMES, fake, load_quantized, matrices_of, mean_loss, scheme_of, write_quantized
from nemo_minitron.quantization.export import without_cuda
from nemo_minitron.quantization.matrices import export_faults
from nemo_minitron.quantization.reading import algorithm_of, dequantize
from nemo_minitron.runtime import requirements
from nemo_minitron.stages import export

SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 2}
GROUP = 32
TOKENS = torch.randint(0, 131, (6, 25), generator=torch.Generator().manual_seed(0))


def floats(root: Path, name: str = "llama", **changes: Any) -> Path:
    """A random model of a family, as this suite exports it."""
    family_model(name, root / "source", **SIZES | changes)
    write_checkpoint(open_checkpoint(root / "source"), root / "hf", "hf")
    return root / "hf"


def written(root: Path, scheme: str, hf: Path, group: int = GROUP) -> tuple[Path, Any]:
    matrices = write_quantized(
        hf,
        open_checkpoint(hf),
        root / scheme,
        scheme_of(scheme, group),
        dtype="float32",
        calibrate=lambda model: model(TOKENS[:, :-1]),
    )
    return root / scheme, matrices


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_the_files_are_what_modelopt_documents(tmp_path: Path) -> None:
    hf = floats(tmp_path, tie_word_embeddings=False)
    plain = tensors(hf)
    columns = {"q_proj": 64, "o_proj": 128, "up_proj": 64, "down_proj": 96}
    for name, scheme in SCHEMES.items():
        path, matrices = written(tmp_path, name, hf)
        assert len(matrices.held) == 14 and not matrices.kept
        stated = json.loads((path / "hf_quant_config.json").read_text())
        assert stated["producer"] == {"name": "modelopt", "version": "0.37.0"}
        assert stated["quantization"]["quant_algo"] == scheme.algorithm == algorithm_of(path)
        assert stated["quantization"]["exclude_modules"] == ["lm_head"]
        config = json.loads((path / "config.json").read_text())
        assert config.pop("quantization_config")["quant_method"] == "modelopt"
        assert config == json.loads((hf / "config.json").read_text())
        found = tensors(path)
        for part, n in columns.items():
            own = f"model.layers.1.{'self_attn' if part in ('q_proj', 'o_proj') else 'mlp'}.{part}"
            m = plain[f"{own}.weight"].shape[0]
            have = {key.rpartition(".")[2]: value for key, value in found.items() if key.startswith(own + ".")}
            shapes = {key: (value.dtype, tuple(value.shape)) for key, value in have.items()}
            scalar = (torch.float32, ())
            if name == "fp8":
                expected = {"weight": (torch.float8_e4m3fn, (m, n)), "weight_scale": scalar, "input_scale": scalar}
            elif name == "nvfp4":
                expected = {
                    "weight": (torch.uint8, (m, n // 2)),
                    "weight_scale": (torch.float8_e4m3fn, (m, n // 16)),
                    "weight_scale_2": scalar,
                    "input_scale": scalar,
                }
            else:
                assert stated["quantization"]["group_size"] == GROUP
                expected = {
                    "weight": (torch.uint8, (m // 2, n)),
                    "weight_scale": (torch.float32, (m, n // GROUP)),
                }
                if part in ("o_proj", "down_proj"):  # those of the others are in the norms before them
                    expected["pre_quant_scale"] = (torch.float32, (n,))
            assert shapes == expected
        for name_, tensor in plain.items():  # what is not quantized
            if "_proj" not in name_ and not (scheme.searched and "layernorm" in name_):
                assert torch.equal(found[name_], tensor)
        with pytest.raises(CheckpointError, match=rf"\(modelopt {scheme.algorithm}\) are for serving"):
            open_checkpoint(path)


def test_stored_numbers_are_the_weights_rounded(tmp_path: Path) -> None:
    """Packed by ModelOpt, unpacked by our reader, and rounded by our arithmetic that the training uses."""
    hf = floats(tmp_path)
    plain = tensors(hf)
    fused = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gu", "up_proj": "gu"}
    limits: dict[tuple[str, str], torch.Tensor] = {}
    for name, tensor in plain.items():
        if "_proj" in name:
            key = (name.split(".")[2], fused.get(name.split(".")[-2], name.split(".")[-2]))
            limits[key] = torch.maximum(limits.get(key, torch.zeros(())), tensor.abs().max())
    for name in ("fp8", "int4", "nvfp4"):
        found = tensors(written(tmp_path, name, hf)[0])
        for key in [key for key in found if key.endswith("_proj.weight")]:
            own = key.removesuffix("weight")
            stored = {part.removeprefix(own): value for part, value in found.items() if part.startswith(own)}
            weight = plain[key].requires_grad_()
            if name == "fp8":
                rounded = fake.fp8(weight, weight.abs().max())
            elif name == "int4":
                rounded = fake.int4(weight, GROUP)
            else:
                layer, module = key.split(".")[2], key.split(".")[-2]
                rounded = fake.nvfp4(weight, limits[layer, fused.get(module, module)])
            torch.testing.assert_close(dequantize(SCHEMES[name].algorithm, stored), rounded.detach(), rtol=1e-6, atol=0)
            rounded.square().sum().backward()  # straight through: the gradient at the rounded numbers
            assert torch.equal(weight.grad, 2 * rounded.detach())
            weight.grad = None


def test_rounding_is_modelopts(tmp_path: Path) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor
    from modelopt.torch.quantization.tensor_quant import fake_tensor_quant, scaled_e4m3

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(24, 64, generator=generator) * torch.logspace(-9, 3, 24)[:, None]
    x[3] = 0
    x[5, :16] = 0
    x[6, :16] = torch.tensor([6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25] * 2)  # ties
    for dtype in (torch.float32, torch.bfloat16):
        y = x.to(dtype)
        limits = fake.group_ranges(y, 16).repeat_interleave(16, -1)
        args = (limits, None, 4, False, False)
        assert torch.equal(fake.int4(y, 16), fake_tensor_quant(y, *args))
        limit = y.abs().max().float()
        assert torch.equal(fake.fp8(y, limit), scaled_e4m3(y, limit, None, 4, 3))
        with without_cuda():
            packed, scale, outer = NVFP4QTensor.quantize(y, 16, weights_scaling_factor_2=limit / (6 * 448.0))
        theirs = packed.dequantize(dtype=torch.float32, scale=scale, double_scale=outer, block_sizes={-1: 16})
        torch.testing.assert_close(fake.nvfp4(y.float(), limit), theirs, rtol=1e-6, atol=0)
    # outside the range: clipped, and no gradient from there in FP8, as in ModelOpt
    z = torch.tensor([0.5, 2.0, -3.0], requires_grad=True)
    out = fake.fp8(z, torch.tensor(1.0), clips=True)
    assert out.tolist() == [0.5, 1.0, -1.0]
    out.sum().backward()
    assert z.grad is not None and z.grad.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_family_is_written_and_read(tmp_path: Path, name: str) -> None:
    hf = floats(tmp_path, name)
    model = open_checkpoint(hf)
    own = load_transformers(hf, torch.float32).float().eval()
    loss = mean_loss(own, Blocks.of(TOKENS))
    for scheme in SCHEMES.values():
        scheme = scheme_of(scheme.name, GROUP)
        if faults := export_faults(model.shape, model.architecture, scheme):
            special = family(name).zero_centered_norm or family(name).expert
            assert scheme.searched and special and len(faults) == 1
            continue
        path, matrices = written(tmp_path, scheme.name, hf)
        stated = json.loads((path / "hf_quant_config.json").read_text())["quantization"]
        assert bool(matrices.kept) == (scheme.group is not None and bool(family(name).expert) and "qwen" in name)
        read = load_quantized(path)
        assert mean_loss(read, Blocks.of(TOKENS)) == pytest.approx(loss, abs=0.2)
        for module in matrices.kept:  # named for the readers, and stored as it was
            assert any(
                module == each or (each[-1] == "*" and module.startswith(each[:-1]))
                for each in stated["exclude_modules"]
            )
            assert torch.equal(read.get_submodule(module).weight, own.get_submodule(module).weight)


def test_widths_that_a_group_cannot_hold_stay(tmp_path: Path) -> None:
    hf = floats(tmp_path, intermediate_size=90)
    model = open_checkpoint(hf)
    matrices = matrices_of(model.family, model.shape, scheme_of("int4", GROUP))
    assert matrices.note() == ("2 of 14 matrices stay as they are: down_proj (90 columns are no multiple of 32)")
    path, _ = written(tmp_path, "int4", hf)
    found = tensors(path)
    assert torch.equal(found["model.layers.0.mlp.down_proj.weight"], tensors(hf)["model.layers.0.mlp.down_proj.weight"])
    assert mean_loss(load_quantized(path), Blocks.of(TOKENS)) > 0
    assert len(matrices_of(model.family, model.shape, scheme_of("int4")).held) == 2  # the 128 columns of o_proj


def text(tmp_path: Path, count: int = 400) -> OptionalDataConfig:
    generator = torch.Generator().manual_seed(1)
    lines = [
        " ".join(f"w{index}" for index in torch.randint(0, 120, (30,), generator=generator).tolist())
        for _ in range(count)
    ]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return OptionalDataConfig(
        sources=[SourceConfig(name="text", path=str(tmp_path / "text.jsonl"))],
        sequence_length=24,
        cache_dir=str(tmp_path / "cache"),
        calibration_fraction=0.2,
        held_out_fraction=0.2,
    )


def test_the_stage_measures_what_it_wrote(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model", hidden_size=64, intermediate_size=96, head_dim=16)
    config = ExportConfig(
        model=str(tmp_path / "model"),
        output=str(tmp_path / "out"),
        verify=False,
        quantize=["fp8", "int4"],
        data=text(tmp_path),
        samples=4,
        tokens=24 * 6,
        group_size=GROUP,
    )
    plan = export.plan(config)
    assert not plan.faults and [Path(each.path).name for each in plan.writes] == ["hf", "hf-fp8", "hf-int4"]
    found = export.run(config)["quantized"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"hf", "hf-fp8", "hf-int4", ".minitron-output"}
    for name, figures in found.items():
        folder = tmp_path / "out" / f"hf-{name}"
        assert (folder / "tokenizer.json").is_file() and (folder / "README.md").is_file()
        assert figures["tokens"] == 24 * 6 and figures["quantized"] == 21 and figures["kept"] == {}
        assert 0 < abs(figures["loss"] - figures["float_loss"]) < 0.3
    assert found["int4"]["bytes"] < found["fp8"]["bytes"]


def test_what_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_checkpoint(tmp_path / "model")  # 48 and 76 columns, 72 of the heads
    common = {"model": str(tmp_path / "model"), "output": str(tmp_path / "out"), "verify": False}
    config = ExportConfig(**common, quantize=["int4"], data=text(tmp_path))
    with pytest.raises(ShapeError, match=r"multiple of 128 \(48, 72, 76\); set group_size=16"):
        export.run(config)
    assert not (tmp_path / "out").exists()

    settings = tmp_path / "export.yaml"
    settings.write_text(json.dumps({**common, "quantize": ["int5"], "group_size": 64}))
    with pytest.raises(ConfigError) as refused:
        load("export", settings)
    assert len(refused.value.faults) == 3
    told = "\n".join(refused.value.faults)
    assert "'int5' must be one of fp8, int4, int4_awq, nvfp4" in told
    assert "no text is given to calibrate" in told and "is a setting of int4 and int4_awq" in told

    monkeypatch.setattr(requirements, "_there", lambda module: module != "modelopt")
    with pytest.raises(MissingDependency, match=r"nvidia-modelopt>=0.37 \(not installed\): pip install"):
        check_needs([config])


def test_text_counts_only_where_something_is_quantized(tmp_path: Path) -> None:
    """A pipeline's defaults give every stage their text; earlier exports keep their identity."""
    plain = ExportConfig(model="m", output="o")
    assert hashed_settings(plain) == hashed_settings(ExportConfig(model="m", output="o", data=text(tmp_path)))
    assert not {"data", "quantize", "samples", "tokens", "group_size"} & set(hashed_settings(plain))
    quantized = ExportConfig(model="m", output="o", data=text(tmp_path), quantize=["fp8"])
    assert {"data", "quantize"} <= set(hashed_settings(quantized))


def test_a_directory_of_another_make_is_refused(tmp_path: Path) -> None:
    hf = floats(tmp_path)
    with pytest.raises(CheckpointError, match="hf_quant_config.json cannot be read"):
        load_quantized(hf)
    (hf / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "W8A8"}}))
    with pytest.raises(CheckpointError, match="quant_algo 'W8A8' cannot be read; known: FP8"):
        load_quantized(hf)
