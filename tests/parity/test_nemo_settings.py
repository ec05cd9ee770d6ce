"""The lists of known settings against the stack: defaults of NeMo's classes pass, keys that it reads are known."""

from __future__ import annotations

import dataclasses
import logging
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron import axes
from nemo_minitron.accounting import by_pattern
from nemo_minitron.checkpoints.formats import nemo_known
from nemo_minitron.checkpoints.formats.nemo1.config import DEFAULTS, REQUIRED, from_nemo1, to_nemo1
from nemo_minitron.checkpoints.formats.nemo2.config import from_nemo2
from nemo_minitron.errors import CheckpointError

pytestmark = pytest.mark.slow

SIZES = {"num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 96, "num_attention_heads": 64, "vocab_size": 256}


def plain(value: Any) -> Any:
    """As ``io_dump`` writes a value."""
    if value is None or isinstance(value, bool | int | float | str | list):
        return value
    if isinstance(value, tuple):
        return list(value)
    if hasattr(value, "__module__") and hasattr(value, "__qualname__"):
        return {"_target_": f"{value.__module__}.{value.__qualname__}", "_call_": False}
    return {"_target_": str(value), "_call_": False}


def described(kind: type) -> dict[str, Any]:
    """A ``model.yaml`` of a class with its defaults, small where it has no sizes."""
    values = {"_target_": f"{kind.__module__}.{kind.__name__}"}
    for field in dataclasses.fields(kind):
        default = field.default
        if default is dataclasses.MISSING:
            default = None if field.default_factory is dataclasses.MISSING else field.default_factory()
        values[field.name] = plain(default) or SIZES.get(field.name, plain(default))
    return {"config": values, "optim": {}, "tokenizer": None, "model_transform": None, "model_context_managers": []}


def classes() -> list[type]:
    from nemo.collections.llm.gpt.model.base import GPTConfig

    found: dict[str, type] = {}
    for table in axes.FAMILIES.values():
        if table.nemo2 is None:
            continue
        module = import_module(f"nemo.collections.llm.gpt.model.{table.nemo2.module}")
        for name, kind in vars(module).items():
            readable = name.startswith(tuple(start for start in table.nemo2.reads if start != "GPTConfig"))
            if readable and isinstance(kind, type) and issubclass(kind, GPTConfig):
                found[name] = kind
    return list(found.values())


def test_every_class_of_nemo_passes_with_its_defaults(caplog):
    caplog.set_level(logging.WARNING, "nemo_minitron")
    read = classes()
    assert len(read) > 30
    refused = {}
    for kind in read:
        try:
            shape, _ = from_nemo2(described(kind), Path("model.yaml"), 256, None)
            assert shape.num_layers > 0, kind
        except CheckpointError as error:
            refused[kind.__name__] = str(error)
    assert not [record.getMessage() for record in caplog.records if record.name.startswith("nemo_minitron")]
    # mixtures of experts of families that have none
    assert all("num_moe_experts=" in text for text in refused.values()), refused
    assert len(refused) < len(read) / 4


def test_every_field_of_megatron_is_used_or_known():
    """Neutral values are those that the class has by default."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
    assert len(fields) > 150
    for values in (nemo_known.NEUTRAL, nemo_known.EXPERTS_NEUTRAL):
        for key in values.keys() & fields.keys():
            assert fields[key] in values[key], key


def keys_of_nemo1() -> set[str]:
    """Keys that NeMo's models ask their configuration for, by their source."""
    import nemo.collections.nlp.models.language_modeling as package

    keys: set[str] = set()
    for name in ("megatron_gpt_model.py", "megatron_base_model.py"):
        text = (Path(package.__file__).parent / name).read_text()
        keys |= set(re.findall(r"\bcfg\.get\(\s*['\"](\w+)['\"]", text))
        keys |= set(re.findall(r"\bcfg\.([a-z]\w+)\b(?!\()", text))
    return keys


def test_every_key_that_nemo_1_asks_for_is_used_or_known():
    keys = keys_of_nemo1()
    assert len(keys) > 100
    used = {*DEFAULTS, *REQUIRED, "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"}
    used |= {"encoder_seq_length"}
    pinned = {*nemo_known.NEUTRAL, *nemo_known.NEMO1_NEUTRAL}
    patterns = {**nemo_known.MEGATRON, **nemo_known.DENSE, **nemo_known.NEMO1}
    assert keys - used - pinned - by_pattern(keys, patterns).keys() == set()


def test_what_is_written_is_known(caplog):
    import yaml
    from support.families import SIZES as TINY

    from nemo_minitron.architecture import Architecture
    from nemo_minitron.shape import ModelShape

    caplog.set_level(logging.WARNING, "nemo_minitron")
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim")
    sizes = (TINY[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    counts = (TINY[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    shape = ModelShape(**dict(zip(names, (*sizes, *counts), strict=True)), vocab_size=131, tied_embeddings=False)
    architecture = Architecture("llama", norm_epsilon=1e-5, rotary_base=20000.0, max_position_embeddings=64)
    text = to_nemo1(shape, architecture, dtype="bfloat16", multiple=128, rows=131)
    assert from_nemo1(yaml.safe_load(text), Path("model_config.yaml"), 256, None)[0] == shape
    assert not [record.getMessage() for record in caplog.records if record.name.startswith("nemo_minitron")]
