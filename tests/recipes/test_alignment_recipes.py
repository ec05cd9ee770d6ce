"""The recipes of nemo_run for SFT and DPO: data that can be changed, shipped and read as the command line reads it."""

from __future__ import annotations

import pytest

from nemo_minitron.config import ChatDataConfig, DpoConfig, RewardConfig, SftConfig
from nemo_minitron.errors import ConfigError


def test_recipes_are_configurations_without_faults() -> None:
    import fiddle as fdl
    from nemo_minitron.recipes.alignment import align, dpo_recipe, reward_recipe, sft_recipe
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    from nemo_minitron.jobs.in_place import checked

    for recipe, kind in (
        (sft_recipe("models/a", "chats.jsonl", "runs/sft", tensor=2, num_nodes=2), SftConfig),
        (dpo_recipe("models/a", "pairs.jsonl", "runs/dpo", tensor=2, num_nodes=2), DpoConfig),
        (reward_recipe("models/a", "chats.jsonl", "runs/reward", tensor=2, num_nodes=2), RewardConfig),
    ):
        recipe.config.lr = 2e-6
        shipped = ZlibJSONSerializer().deserialize(ZlibJSONSerializer().serialize(recipe))
        assert shipped == recipe
        built = fdl.build(shipped)
        assert built.func is getattr(align, "__wrapped__", align) or built.func is align
        config = checked(built.keywords["config"])
        assert isinstance(config, kind)
        assert (config.lr, config.parallel.data, config.parallel.world_size) == (2e-6, 8, 16)
        assert config.parallel.sequence_parallel is (kind is not RewardConfig)
    with pytest.raises(ConfigError, match=r"num_nodes \* devices = 8: is not a multiple of tensor \* pipeline = 3"):
        sft_recipe("models/a", "chats.jsonl", "runs/sft", tensor=3)


def test_all_faults_of_a_recipe_are_one_error() -> None:
    from nemo_minitron.jobs.in_place import checked

    config = DpoConfig(
        output="out", model="model", data=ChatDataConfig(path="a.jsonl", template="vicuna"), loss="kto", lr=-1.0
    )
    with pytest.raises(ConfigError) as found:
        checked(config)
    text = str(found.value)
    assert "template=vicuna" in text
    assert "loss=kto" in text
    assert "lr=-1.0" in text
