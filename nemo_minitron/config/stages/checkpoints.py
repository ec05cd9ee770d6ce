"""Stages that import and export models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from nemo_minitron.config.parts import (
    DTYPES,
    MEMORY,
    QUANTIZED_EXPORTS,
    SHARD_SIZE,
    OptionalDataConfig,
    choice,
    format_list_faults,
    group_size_faults,
    one_of,
    positive,
    shard_size_faults,
    written_formats,
)
from nemo_minitron.config.stages.base import NEEDS_TORCH, StageConfig
from nemo_minitron.config.tables import Choices, WrittenFormats

__all__ = ["ExportConfig", "GgufConfig", "ImportConfig"]

#: Kinds of GGUF files that the ``gguf`` package writes, and those that need llama.cpp's own quantizer.
GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
GGUF_K_TYPES = ("Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")


@dataclass
class ImportConfig(StageConfig):
    """Import a model into the suite's working format.

    Attributes:
        source: HF directory, GGUF file, NeMo 2 directory or ``.nemo`` file, or ``org/name``, a model in the local cache
            of the Hugging Face Hub.
        package: instead of ``source``, a model that a Python package carries, by its name in the table of packages.
        format: what to write
        dtype: type of the written weights, "float32" or "bfloat16"; null keeps the stored one.
        verify: reload the result and compare logits with the source's.
        cache_dir: where a fetched package is kept.
        memory: of ``verify``: "live" has each model in memory whole, in float32; "streamed" a layer at a time; "auto"
            streams models that do not fit.
    """

    STAGE: ClassVar[str] = "import"
    HELP: ClassVar[str] = "Take a model over: Hugging Face, GGUF, NeMo 2 or .nemo into the working format."
    MODULE: ClassVar[str] = "nemo_minitron.stages.import_"  # the name itself is a keyword
    NEEDS: ClassVar[tuple[str, ...]] = (*NEEDS_TORCH, "transformers")
    LEVEL: ClassVar[str] = "nemo"
    MAKES_MODEL: ClassVar[bool] = True
    ROLE: ClassVar[str] = "teacher"
    INPUTS: ClassVar[tuple[str, ...]] = ("source",)
    PATHS: ClassVar[tuple[str, ...]] = ("output", "cache_dir")
    TABLES: ClassVar[dict[str, Choices]] = {"format": WrittenFormats()}
    ADDED: ClassVar[tuple[str, ...]] = ("memory",)
    NEEDS_GPU: ClassVar[bool] = False

    source: str | None = None
    package: str | None = None
    format: str = "nemo2"
    dtype: str | None = None
    verify: bool = True
    cache_dir: str = ".cache/minitron"
    memory: str = "auto"

    def is_path(self, name: str, value: str) -> bool:
        """``cache_dir`` is used only with a package."""
        return name != "cache_dir" or self.package is not None

    def faults(self) -> list[str]:
        """Not exactly one origin, unknown choices."""
        return [
            *one_of(self, "source", "package"),
            *choice(self, "format", written_formats()),
            *choice(self, "dtype", DTYPES),
            *choice(self, "memory", MEMORY),
        ]


@dataclass
class GgufConfig:
    """The files of format "gguf", for llama.cpp.

    Attributes:
        types: how the weights are stored, a file for each: "F32", "F16", "BF16", "Q8_0" (8.5 bits a weight) or "Q4_0"
            (4.5 bits); with llama.cpp's quantizer "Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M" or "Q6_K".
        importance: an importance matrix in llama.cpp's GGUF form, for the types with a K; null makes one of ``data``
            and ``samples`` of the export, or quantizes without where there is no text.
    """

    PATHS: ClassVar[tuple[str, ...]] = ("importance",)

    types: list[str] = field(default_factory=lambda: ["Q8_0"])
    importance: str | None = None

    def faults(self) -> list[str]:
        """Unknown or no types, types given twice, a matrix that nothing uses."""
        known = (*GGUF_TYPES, *GGUF_K_TYPES)
        faults = [f"types: {name!r} must be one of {', '.join(known)}" for name in self.types if name not in known]
        if not self.types:
            faults.append(f"types: none is given; list any of {', '.join(known)}")
        if twice := sorted({name for name in self.types if self.types.count(name) > 1}):
            faults.append(f"types: {', '.join(twice)} is given twice")
        if self.importance is not None and not self.quantizes:
            faults.append(f"importance={self.importance}: only the types {', '.join(GGUF_K_TYPES)} use one")
        return faults

    @property
    def quantizes(self) -> bool:
        """Whether llama.cpp's quantizer is needed."""
        return any(name in GGUF_K_TYPES for name in self.types)


@dataclass
class ExportConfig(StageConfig):
    """Write a model in other formats: ``output/hf``, ``output/nemo2``, ``output/model.nemo``, ``output/gguf``,
    ``output/hf-fp8``.

    Attributes:
        model: checkpoint to export.
        formats: what to write, any of these
        dtype: type of the written weights, "float32" or "bfloat16"; null keeps the stored one.
        verify: reload each result with its format's own loader and compare logits.
        max_shard_size: what one file of the "hf" weights may hold, such as "5GB" or "512MiB"; up to that they are one
            file.
        base_model: name on the Hugging Face Hub of the model that it was made from, for the model card.
        license: the Hub's name of that model's license, such as "apache-2.0", for the model card; null takes what the
            base's own card says.
        memory: of ``verify``: "live" has each model in memory whole, in float32; "streamed" a layer at a time; "auto"
            streams models that do not fit.
        quantize: quantized Hugging Face models to write beside ``formats``, through NVIDIA's ModelOpt, any of "fp8",
            "int4", "int4_awq" and "nvfp4": ``output/hf-fp8`` and so on.
        data: text that quantized models are calibrated on, by its calibration split, and measured on, by its held-out
            split. The GGUF types with a K are calibrated on it too.
        samples: blocks of the calibration split that a quantized model is calibrated on.
        tokens: held-out tokens that the float and each quantized model are scored on, rounded down to whole blocks.
        group_size: of "int4" and "int4_awq", the columns that share a scale; null takes 128.
        gguf: the files of format "gguf".
    """

    STAGE: ClassVar[str] = "export"
    HELP: ClassVar[str] = "Write a model as Hugging Face, NeMo 2, .nemo or GGUF, and check it."
    LEVEL: ClassVar[str] = "torch"
    ROLE: ClassVar[str] = "distilled"
    INPUTS: ClassVar[tuple[str, ...]] = ("model", "gguf.importance")
    ADDED: ClassVar[tuple[str, ...]] = (
        "max_shard_size", "base_model", "license", "memory", "quantize", "data", "samples", "tokens", "group_size",
        "gguf",
    )  # fmt: skip
    TABLES: ClassVar[dict[str, Choices]] = {"formats": WrittenFormats(exports=True)}
    NEEDS_GPU: ClassVar[bool] = False

    model: str = MISSING
    formats: list[str] = field(default_factory=lambda: ["hf"])
    dtype: str | None = None
    verify: bool = True
    max_shard_size: str = SHARD_SIZE
    base_model: str | None = None
    license: str | None = None
    memory: str = "auto"
    quantize: list[str] = field(default_factory=list)
    data: OptionalDataConfig = field(default_factory=OptionalDataConfig)
    samples: int = 128
    tokens: int = 16384
    group_size: int | None = None
    gguf: GgufConfig = field(default_factory=GgufConfig)

    @property
    def measures_importance(self) -> bool:
        """Whether an importance matrix for GGUF is made of the text."""
        return "gguf" in self.formats and self.gguf.quantizes and self.gguf.importance is None and self.data.given

    def settled(self) -> dict[str, Any]:
        """Text, and how much of it, changes nothing where nothing is quantized: a pipeline's defaults may bring it."""
        if self.quantize or self.measures_importance:
            return {}
        defaults = type(self)()
        return {name: getattr(defaults, name) for name in ("data", "samples", "tokens", "group_size")}

    def faults(self) -> list[str]:
        """Unknown or no formats, a size that is none, nothing to calibrate a quantized model on."""
        faults = format_list_faults(self.formats, exports=True)
        faults += [
            f"quantize: {name!r} must be one of {', '.join(QUANTIZED_EXPORTS)}"
            for name in self.quantize
            if name not in QUANTIZED_EXPORTS
        ]
        if self.quantize:
            faults += [*positive(self, "samples", "tokens"), *group_size_faults(self.group_size, self.quantize)]
            if not self.data.given:
                faults.append("data: no text is given to calibrate and measure the quantized models on; list sources")
            elif 0 < self.tokens < self.data.sequence_length:
                faults.append(
                    f"tokens={self.tokens}: less than one block of data.sequence_length={self.data.sequence_length}"
                )
        if not self.formats and not self.quantize:
            faults.append(f"formats: none is given; list any of {', '.join(WrittenFormats(exports=True).names())}")
        faults += [*choice(self, "dtype", DTYPES), *choice(self, "memory", MEMORY)]
        return [*faults, *shard_size_faults(self.max_shard_size)]
