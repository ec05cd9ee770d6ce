"""Distributed checkpoints: the writer against the reader, assembled regions, damage, and hostile files."""

from __future__ import annotations

import io
import os
import pickle
import random
import tarfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import tiny_checkpoint
from support.mixture import random_mixture
from support.pruning import DictWeights
from torch.distributed import checkpoint as dcp

from nemo_minitron import axes
from nemo_minitron.checkpoints import Checkpoint, open_checkpoint, write_checkpoint
from nemo_minitron.checkpoints.formats.torch_dist import checksums
from nemo_minitron.checkpoints.formats.torch_dist.reader import TorchDist, TorchDistWeights
from nemo_minitron.checkpoints.formats.torch_dist.writer import write_torch_dist
from nemo_minitron.errors import CheckpointError

EMBEDDING = "embedding.word_embeddings.weight"


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint(tmp_path / "hf"))


@pytest.fixture
def directory(source: Checkpoint, tmp_path: Path) -> Path:
    write_torch_dist(source, tmp_path / "w", prefix="module.", dtype="float32", vocab_rows=256, common={"epoch": 0})
    return tmp_path / "w"


def weights(directory: Path, source: Checkpoint) -> TorchDistWeights:
    store = TorchDist(directory)
    return TorchDistWeights(store, source.shape, "llama", store.prefix(EMBEDDING))


def test_what_is_written_is_read_bit_for_bit(directory: Path, source: Checkpoint) -> None:
    read = weights(directory, source)
    read.check()
    assert read.prefix == "module."
    assert read.padded_vocab() == 256
    assert read.dtype() == "float32"
    for name in source.weights.names():
        assert torch.equal(read.tensor(name), source.weights.tensor(name)), name
    padding = read.store.read("module." + EMBEDDING, [slice(120, 256), slice(0, 48)])
    assert torch.equal(padding[:11], source.weights.tensor(EMBEDDING)[120:])
    assert padding[11:].abs().max() == 0


def test_keys_and_sizes_are_megatrons(directory: Path) -> None:
    store = TorchDist(directory)
    assert store.sizes["module.decoder.layers.self_attention.linear_qkv.weight"] == (3, 120, 48)
    assert store.sizes["module.decoder.layers.mlp.linear_fc1.weight"] == (3, 152, 48)
    assert store.sizes["module.output_layer.weight"] == (256, 48)
    assert store.sizes["module.decoder.final_layernorm.weight"] == (48,)
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    assert "module.decoder.layers.mlp.linear_fc2._extra_state/shard_2_3" in metadata.state_dict_metadata
    assert torch.load(directory / "common.pt", weights_only=True) == {"epoch": 0}


@pytest.mark.parametrize("seed", range(5))
def test_any_region_is_assembled_from_any_chunks(tmp_path: Path, seed: int) -> None:
    """A tensor that torch stored as a grid of chunks, read by random regions against plain slicing."""
    from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    whole = torch.randn(7, 10)
    items = [
        WriteItem(
            MetadataIndex("t", (row, column)),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                ChunkStorageMetadata(torch.Size((row, column)), torch.Size((min(3, 7 - row), 5))),
                TensorProperties(dtype=whole.dtype),
                whole.shape,
            ),
        )
        for row in (0, 3, 6)
        for column in (0, 5)
    ]

    class Grid(dcp.SavePlanner):
        def set_up_planner(self, *_: object, **__: object) -> None: ...

        def create_local_plan(self) -> SavePlan:
            return SavePlan(items)

        def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], dcp.Metadata]:
            return create_default_global_save_plan(all_plans)

        def finish_plan(self, new_plan: SavePlan) -> SavePlan:
            return new_plan

        def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
            assert write_item.tensor_data is not None
            chunk = write_item.tensor_data.chunk
            return whole[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))].clone()

    dcp.save({}, storage_writer=dcp.FileSystemWriter(tmp_path), planner=Grid(), no_dist=True)
    store, generator = TorchDist(tmp_path), torch.Generator().manual_seed(seed)
    for _ in range(20):
        region = []
        for size in whole.shape:
            low, high = sorted(torch.randperm(size + 1, generator=generator)[:2].tolist())
            region.append(slice(low, high))
        assert torch.equal(store.read("t", region), whole[tuple(region)])
    store = TorchDist(tmp_path)
    with pytest.raises(CheckpointError, match="cover 7 of the 14 elements"):
        store._chunks["t"] = [chunk for chunk in store._chunks["t"] if chunk.offsets[1] == 0]
        store.read("t", [slice(0, 7), slice(4, 6)])


def test_layers_under_their_own_keys_and_the_local_spelling(source: Checkpoint, tmp_path: Path) -> None:
    """Heterogeneous models have one key a layer; models of the local layer spec keep norms outside the linears."""
    local = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    state = {}
    for name in source.weights.names():
        key = name
        for canonical, spelling in local.items():
            key = key.replace(canonical, spelling)
        state["model." + key] = source.weights.tensor(name)
    dcp.save(state | {"optimizer.state.step": torch.ones(1)}, checkpoint_id=tmp_path / "w", no_dist=True)
    read = weights(tmp_path / "w", source)
    read.check()
    assert read.prefix == "model."
    for name in source.weights.names():
        assert torch.equal(read.tensor(name), source.weights.tensor(name)), name


def test_sizes_that_do_not_fit_are_named(directory: Path, source: Checkpoint) -> None:
    store = TorchDist(directory)
    for change, message in (
        ({"num_layers": 2}, "has 3 layers where the model's sizes ask for 2"),
        ({"ffn_hidden_size": 70}, r"linear_fc1.weight has shape \[152, 48\]"),
        ({"vocab_size": 300}, r"word_embeddings.weight has shape \[256, 48\]"),
    ):
        with pytest.raises(CheckpointError, match=message):
            TorchDistWeights(store, source.shape.replace(**change), "llama", "module.").check()
    store.sizes["module.decoder.layers.self_attention.linear_qkv.bias"] = (3, 120)
    with pytest.raises(CheckpointError, match=r"linear_qkv.bias has no place in a llama model"):
        TorchDistWeights(store, source.shape, "llama", "module.").check()
    del store.sizes["module.decoder.final_layernorm.weight"]
    with pytest.raises(CheckpointError, match=r"has no tensor module\.decoder\.final_layernorm\.weight"):
        TorchDistWeights(store, source.shape, "llama", "module.").check()


def test_truncated_missing_and_damaged_files(directory: Path, source: Checkpoint) -> None:
    read = weights(directory, source)
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    file = next(
        chunk.file
        for chunk in read.store._chunks["module.decoder.layers.mlp.linear_fc1.weight"]
        if chunk.offsets[0] == 1
    )
    whole = (directory / file).read_bytes()
    (directory / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=rf"{file}, tensor module.*linear_fc1.weight: the file ends early"):
        read.tensor(name)
    (directory / file).write_bytes(os.urandom(len(whole)))
    with pytest.raises(CheckpointError, match=rf"{file}, tensor module.*: the stored chunk is damaged"):
        read.tensor(name)
    (directory / file).unlink()
    with pytest.raises(CheckpointError, match=rf"{file}, tensor module.*cannot be read"):
        read.tensor(name)
    data = (directory / ".metadata").read_bytes()
    (directory / ".metadata").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"\.metadata (was refused|is damaged)"):
        TorchDist(directory)
    (directory / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"\.metadata is missing: this is no finished"):
        TorchDist(directory)


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def flipped(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(content)


@pytest.mark.parametrize("name", [".metadata", "chunks"])
def test_a_flipped_bit_is_seen_or_changes_nothing(directory: Path, source: Checkpoint, name: str) -> None:
    """Of 150 flips at random places, each is refused by one line or leaves every weight as it was."""
    files = sorted(directory.glob("*.distcp")) if name == "chunks" else [directory / name]
    expected = {name: source.weights.tensor(name) for name in source.weights.names()}
    dice, refused = random.Random(7), []
    for _ in range(150):
        file = dice.choice(files)
        place = dice.randrange(8 * file.stat().st_size)
        flipped(file, place)
        try:
            read = weights(directory, source)
            read.check()
            same = all(torch.equal(read.tensor(name), tensor) for name, tensor in expected.items())
            assert same, f"bit {place} of {file.name}"
        except CheckpointError as error:
            refused.append(str(error))
        flipped(file, place)
    assert len(refused) > 20
    assert not [message for message in refused if "\n" in message]
    weights(directory, source).check()


def test_chunks_without_checksums_are_taken(directory: Path, source: Checkpoint, tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        write_torch_dist(source, tmp_path / "n", prefix="module.", dtype="float32", vocab_rows=256, common={})
    finally:
        torch.serialization.set_crc32_options(True)
    assert list(TorchDist(tmp_path / "n").damage()) == []
    read = weights(tmp_path / "n", source)
    assert torch.equal(read.tensor(EMBEDDING), source.weights.tensor(EMBEDDING))


def test_all_damaged_chunks_are_named(directory: Path) -> None:
    store = TorchDist(directory)
    assert list(store.damage()) == []
    for key in (EMBEDDING, "output_layer.weight"):
        chunk, *_ = store._chunks["module." + key]
        flipped(directory / chunk.file, 8 * (chunk.start + chunk.length // 2))
    faults = list(TorchDist(directory).damage())
    assert len(faults) == 2
    assert all("the stored chunk is damaged (the checksum of" in fault for fault in faults)


@given(st.integers(1, 3 * checksums._BLOCK // 4), st.integers(0, 2**31), st.booleans())
@settings(max_examples=25, deadline=None)
def test_what_is_summed_while_it_is_read(length: int, seed: int, flip: bool) -> None:
    """The sums are those of the bytes, of chunks below and above a block; a flipped bit of a weight is seen."""
    tensor = torch.randint(0, 2**15, (length,), generator=torch.Generator().manual_seed(seed), dtype=torch.int16)
    file = io.BytesIO()
    torch.save(tensor, file)
    content = bytearray(b"before" + file.getvalue() + b"after")
    at = content.index(tensor.numpy().tobytes())
    if flip:
        content[at + seed % (2 * length)] ^= 1 << seed % 8
    window = checksums.SummedWindow(io.BytesIO(content), 6, len(file.getvalue()))
    read = torch.load(window, weights_only=True)
    assert torch.equal(read, tensor) != flip
    whole = content[at : at + 2 * length]
    assert window.sums == ({(at - 6, 2 * length): zlib.crc32(whole)} if 2 * length >= checksums._BLOCK else {})
    assert (checksums.damage(window) is not None) == flip


def test_a_hostile_metadata_runs_nothing(directory: Path, tmp_path: Path) -> None:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.planner_data = Evil(tmp_path / "executed")
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"posix\.mkdir, which is no part of the format"):
        TorchDist(directory)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "payload",
    [b"cbuiltins\neval\n(S'1'\ntR.", b"ctorch.serialization\nload\n(S'x'\ntR.", b"ctorch\nload\n(S'x'\ntR."],
)
def test_names_outside_the_allow_list_are_refused(directory: Path, payload: bytes) -> None:
    (directory / ".metadata").write_bytes(payload)
    with pytest.raises(CheckpointError, match="no part of the format"):
        TorchDist(directory)


def test_dotted_names_do_not_get_around_the_allow_list(directory: Path) -> None:
    # protocol 4 lets a name be an attribute path: pathlib "Path.cwd", "os.system"
    for module, name in (("pathlib", "os.mkdir"), ("torch", "Size.__class__"), ("pathlib", "Path.home")):
        data = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode()
        data += b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
        (directory / ".metadata").write_bytes(data)
        with pytest.raises(CheckpointError, match="no part of the format"):
            TorchDist(directory)


def test_metadata_cannot_point_outside(directory: Path) -> None:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../" + info.relative_path
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="lies outside the checkpoint"):
        TorchDist(directory)


def test_a_chunk_with_code_in_it_is_refused(directory: Path, source: Checkpoint, tmp_path: Path) -> None:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    buffer = io.BytesIO()
    torch.save(Evil(tmp_path / "executed"), buffer)
    for index, info in metadata.storage_data.items():
        if index.fqn == "module.decoder.final_layernorm.weight":
            (directory / "evil.distcp").write_bytes(buffer.getvalue())
            info.relative_path, info.offset, info.length = "evil.distcp", 0, len(buffer.getvalue())
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="damaged"):
        weights(directory, source).tensor("decoder.final_layernorm.weight")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_nemo_archive_round_trip(tmp_path: Path, tied: bool) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path / "hf", tied=tied))
    written = write_checkpoint(source, tmp_path / "out.nemo", "nemo", vocab_multiple=64)
    assert written.shape == source.shape
    assert written.architecture == source.architecture
    for name in source.weights.names():
        assert torch.equal(written.weights.tensor(name), source.weights.tensor(name)), name
    back = write_checkpoint(written, tmp_path / "back", "hf")
    for name in source.weights.names():
        assert torch.equal(back.weights.tensor(name), source.weights.tensor(name)), name
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (tmp_path / "hf" / "tokenizer.json").read_bytes()
    # without our record NeMo's own configuration has to say the same
    unpacked = tmp_path / "unpacked"
    with tarfile.open(tmp_path / "out.nemo") as tar:
        tar.extractall(unpacked, filter="data")
    (unpacked / "minitron.json").unlink()
    foreign = open_checkpoint(unpacked)
    assert foreign.shape == source.shape
    assert foreign.architecture == source.architecture


def test_nemo_needs_a_tokenizer(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path / "hf", tokenizer=False))
    with pytest.raises(CheckpointError, match="carries no tokenizer"):
        write_checkpoint(source, tmp_path / "out.nemo", "nemo")


def rewrite(archive: Path, change: tarfile.TarInfo, data: bytes = b"") -> None:
    with tarfile.open(archive, "a") as tar:
        tar.addfile(change, io.BytesIO(data))


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("../evil", tarfile.REGTYPE, "leads outside"),
        ("/etc/evil", tarfile.REGTYPE, "leads outside"),
        ("model_weights/../../evil", tarfile.REGTYPE, "leads outside"),
        ("link", tarfile.SYMTYPE, "is a link, a device"),
        ("hard", tarfile.LNKTYPE, "is a link, a device"),
        ("device", tarfile.CHRTYPE, "is a link, a device"),
        ("fifo", tarfile.FIFOTYPE, "is a link, a device"),
        ("model_config.yaml", tarfile.REGTYPE, "is there twice"),
    ],
)
def test_hostile_members_are_refused(tmp_path: Path, name: str, kind: bytes, message: str) -> None:
    archive = tmp_path / "out.nemo"
    write_checkpoint(open_checkpoint(tiny_checkpoint(tmp_path / "hf")), archive, "nemo")
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    rewrite(archive, member)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(archive)


def test_truncated_compressed_and_foreign_archives(tmp_path: Path) -> None:
    import gzip

    archive = tmp_path / "out.nemo"
    write_checkpoint(open_checkpoint(tiny_checkpoint(tmp_path / "hf")), archive, "nemo")
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(archive)
    archive.write_bytes(gzip.compress(whole))
    with pytest.raises(CheckpointError, match=r"compressed \.nemo; unpack it"):
        open_checkpoint(archive)
    archive.write_bytes(b"not a tar at all" * 100)
    with pytest.raises(CheckpointError, match=r"truncated or not a \.nemo"):
        open_checkpoint(archive)


def test_a_foreign_nemo_configuration_is_named(tmp_path: Path) -> None:
    archive = tmp_path / "out.nemo"
    write_checkpoint(open_checkpoint(tiny_checkpoint(tmp_path / "hf")), archive, "nemo")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "u", filter="data")
    (tmp_path / "u" / "minitron.json").unlink()
    config = tmp_path / "u" / "model_config.yaml"
    text = config.read_text()
    config.write_text(text.replace("fast-swiglu", "gelu").replace("rmsnorm", "layernorm"))
    with pytest.raises(CheckpointError, match=r"normalization='layernorm'.*activation='gelu'"):
        open_checkpoint(tmp_path / "u")
    config.write_text("!!python/object/apply:os.mkdir ['executed']")
    with pytest.raises(CheckpointError, match="cannot be read as plain YAML"):
        open_checkpoint(tmp_path / "u")


@pytest.mark.parametrize("stacked", [False, True], ids=["a key a layer", "layers stacked"])
@pytest.mark.parametrize("grouped", [False, True], ids=["a key an expert", "experts stacked"])
def test_spellings_of_experts(tmp_path: Path, stacked: bool, grouped: bool) -> None:
    """However layers and experts are gathered under keys: by Megatron's grouped experts and by modules of their own."""
    source = random_mixture()
    assert isinstance(source.weights, DictWeights)
    held: dict[str, dict[tuple[int, ...], torch.Tensor]] = {}
    for name, tensor in source.weights.tensors.items():
        layer, expert, below = axes.name_parts(name)
        key, place = f"module.{name}", ()
        if layer is not None:
            key, place = ("module.decoder.layers.", (layer,)) if stacked else (f"module.decoder.layers.{layer}.", ())
            if expert is not None and grouped:
                key, place = f"{key}mlp.experts.experts.", (*place, expert)
            elif expert is not None:
                key = f"{key}{axes.EXPERTS}{expert}."
            key += below
        held.setdefault(key, {})[place] = tensor
    state = {}
    for key, parts in held.items():
        counts = tuple(max(numbers) + 1 for numbers in zip(*parts, strict=True))
        state[key] = torch.stack(list(parts.values())).reshape(*counts, *next(iter(parts.values())).shape)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    read = TorchDistWeights(TorchDist(tmp_path), source.shape, "mixtral", "module.")
    read.check()
    for name in source.weights.names():
        assert torch.equal(read.tensor(name), source.weights.tensor(name)), name
    with pytest.raises(CheckpointError, match="belongs to another model|has no tensor|has no place"):
        TorchDistWeights(TorchDist(tmp_path), source.shape.replace(num_moe_experts=3), "mixtral", "module.").check()


def test_the_cost_of_a_tensor_does_not_grow_with_the_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the chunks of all layers and experts only the one that is asked for is looked at; a file is opened once."""
    from nemo_minitron.checkpoints.formats.huggingface import checkpoint as huggingface

    source = random_mixture()
    write_torch_dist(source, tmp_path / "w", prefix="", dtype="float32", vocab_rows=67, common={})
    store = TorchDist(tmp_path / "w")
    key = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
    assert store.sizes[key] == (2, 4, 24, 20)
    assert len(store._chunks[key]) == 8
    every = [slice(0, size) for size in store.sizes[key]]
    assert len(store._near(key, every)) == 8
    for layer, expert in ((0, 0), (1, 3)):
        one = [slice(layer, layer + 1), slice(expert, expert + 1), *every[2:]]
        assert [chunk.offsets for chunk in store._near(key, one)] == [(layer, expert, 0, 0)]

    opened, original = [], huggingface._safe_open
    monkeypatch.setattr(huggingface, "_safe_open", lambda file, **how: (opened.append(file), original(file, **how))[1])
    read = write_checkpoint(source, tmp_path / "hf", "hf").weights
    for limit, times in ((1 << 30, 1), (10_000, len(read.names()) // 4)):
        monkeypatch.setattr(huggingface, "_MAPPED", limit)
        opened.clear()
        for name in read.names():
            assert torch.equal(read.tensor(name), source.weights.tensor(name))
        assert 1 <= len(opened) <= times
