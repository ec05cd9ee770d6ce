"""GGUF files of tiny models, written by llama.cpp's own package, and in float64 what they compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Stored
from safetensors.numpy import load_file

#: Kinds that the package can write.
QUANTIZED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def vocabulary(size: int) -> list[str]:
    """Tokens of byte-level BPE, filled up."""
    from tokenizers import pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "abc", "12", "123"]
    return (words + [f"[unused{number}]" for number in range(size)])[:size]


def write_gguf(
    path: Path,
    model: Path,
    *,
    architecture: str = "llama",
    stored: str = "F32",
    fields: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (),
    parts: int = 1,
) -> Path:
    """The tensors of a HF model as llama.cpp's converter writes them.

    Args:
        path: the file; of several parts, without their numbers.
        model: HF directory of one safetensors file.
        architecture: of the file.
        stored: name of a kind of numbers; vectors are always F32.
        fields: more keys of the header, or other values; None leaves one out.
        tensors: more tensors.
        without: tensors to leave out.
        parts: files that the tensors are divided over.

    Returns:
        The first file.
    """
    config = json.loads((model / "config.json").read_text())
    heads, groups, layers = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers"))
    head = config.get("head_dim") or config["hidden_size"] // heads
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, layers)
    held: dict[str, np.ndarray] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        tensor = tensor.astype(np.float32)
        if architecture == "llama" and (count := {"q_proj": heads, "k_proj": groups}.get(name.split(".")[-2])):
            tensor = tensor.reshape(count, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        if architecture in ("nemotron", "gemma3") and name.endswith("norm.weight"):
            tensor = tensor + 1
        held[table.get_name(name, try_suffixes=(".weight", ".bias"))] = np.ascontiguousarray(tensor)
    held = {name: tensor for name, tensor in {**held, **(tensors or {})}.items() if name not in without}
    words = vocabulary(config["vocab_size"])
    epsilon = "layer_norm_epsilon" if architecture == "nemotron" else "layer_norm_rms_epsilon"
    header: dict[str, Any] = {
        f"{architecture}.block_count": layers,
        f"{architecture}.context_length": config["max_position_embeddings"],
        f"{architecture}.embedding_length": config["hidden_size"],
        f"{architecture}.feed_forward_length": config["intermediate_size"],
        f"{architecture}.attention.head_count": heads,
        f"{architecture}.attention.head_count_kv": groups,
        f"{architecture}.attention.key_length": head,
        f"{architecture}.attention.value_length": head,
        f"{architecture}.attention.{epsilon}": config.get("rms_norm_eps", config.get("norm_eps")),
        f"{architecture}.rope.freq_base": float(config["rope_theta"]),
        f"{architecture}.rope.dimension_count": int(head * config.get("partial_rotary_factor", 1)),
        f"{architecture}.vocab_size": config["vocab_size"],
        "general.file_type": 0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3 if word in ("<unk>", "<s>", "</s>") else 1 for word in words],
        "tokenizer.ggml.merges": ["a b", "ab c", "1 2", "12 3"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        **(fields or {}),
    }
    if architecture == "gemma3":
        header = {f"{architecture}.attention.sliding_window": config["sliding_window"], **header}
    kind = Stored[stored]
    places = np.array_split(np.array(list(held), dtype=object), parts)
    paths = [path] if parts == 1 else [part_path(path, place, parts) for place in range(parts)]
    for place, (file, names) in enumerate(zip(paths, places, strict=True)):
        writer = gguf.GGUFWriter(file, architecture)
        if parts > 1:
            writer.add_uint16("split.no", place)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", len(held))
        for key, value in header.items() if place == 0 else ():
            add(writer, key, value)
        for name in names:
            tensor = held[name]
            if tensor.ndim == 1:
                writer.add_tensor(name, tensor)
            else:
                writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths[0]


def part_path(path: Path, place: int, parts: int) -> Path:
    """A part's name, as llama.cpp makes it."""
    return path.with_name(f"{path.stem}-{place + 1:05d}-of-{parts:05d}.gguf")


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A key of the header, by the type of its value."""
    if value is not None:
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds.get(type(value), writer.add_array)(key, value)


def numbers(tensor: Any) -> np.ndarray:
    """A stored tensor in float64, by the definitions of the kinds (``ggml-quants.c``), not by the package."""
    shape, kind = tuple(int(size) for size in reversed(tensor.shape)), tensor.tensor_type.name
    raw = np.ascontiguousarray(tensor.data).reshape(-1)
    if kind in ("F32", "F16"):
        return raw.astype(np.float64).reshape(shape)
    raw = raw.view(np.uint8)
    if kind.endswith("_K"):
        return {"Q4_K": _q4_k, "Q6_K": _q6_k}[kind](raw).reshape(shape)
    if kind == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64).reshape(shape)
    size = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24}[kind]
    blocks = raw.reshape(-1, size)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float64)
    if kind == "Q8_0":
        return (scale * blocks[:, 2:].view(np.int8)).reshape(shape)
    at = 2
    least = np.zeros_like(scale)
    if kind.endswith("_1"):
        least, at = blocks[:, 2:4].copy().view(np.float16).astype(np.float64), 4
    high = np.zeros((len(blocks), 32), dtype=np.int64)
    if kind.startswith("Q5"):
        bits = blocks[:, at : at + 4].copy().view(np.uint32).astype(np.int64)
        high, at = ((bits >> np.arange(32)) & 1) << 4, at + 4
    low = np.concatenate([blocks[:, at:] & 15, blocks[:, at:] >> 4], axis=1).astype(np.int64)
    values = low + high
    if kind.endswith("_0"):
        values = values - (16 if kind.startswith("Q5") else 8)
    return (scale * values + least).reshape(shape)


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float64)


def _q4_k(raw: np.ndarray) -> np.ndarray:
    """256 numbers: scale and least of 8 groups of 32 in 6 bits each, then 4 bits a number."""
    blocks = raw.reshape(-1, 144)
    scale, least, packed = _halves(blocks, 0), _halves(blocks, 2), blocks[:, 4:16].astype(np.int64)
    out = []
    for group in range(8):
        if group < 4:
            factor, low = packed[:, group] & 63, packed[:, group + 4] & 63
        else:
            factor = (packed[:, group + 4] & 15) | (packed[:, group - 4] >> 6 << 4)
            low = (packed[:, group + 4] >> 4) | (packed[:, group] >> 6 << 4)
        bits = blocks[:, 16 + 32 * (group // 2) : 48 + 32 * (group // 2)].astype(np.int64)
        values = bits & 15 if group % 2 == 0 else bits >> 4
        out.append(scale * factor[:, None] * values - least * low[:, None])
    return np.concatenate(out, axis=1)


def _q6_k(raw: np.ndarray) -> np.ndarray:
    """256 numbers: 4 low and 2 high bits each, and a scale of 8 bits for every 16."""
    blocks = raw.reshape(-1, 210)
    scales, scale = blocks[:, 192:208].view(np.int8).astype(np.float64), _halves(blocks, 208)
    out = []
    for half in range(2):
        low = blocks[:, 64 * half : 64 * half + 64].astype(np.int64)
        high = blocks[:, 128 + 32 * half : 160 + 32 * half].astype(np.int64)
        for quarter in range(4):
            part = low[:, 32 * (quarter % 2) : 32 * (quarter % 2) + 32]
            bits = (part & 15 if quarter < 2 else part >> 4) | ((high >> 2 * quarter & 3) << 4)
            factors = np.repeat(scales[:, 8 * half + 2 * quarter : 8 * half + 2 * quarter + 2], 16, axis=1)
            out.append(scale * factors * (bits - 32))
    return np.concatenate(out, axis=1)


def reference_logits(path: Path, ids: np.ndarray) -> np.ndarray:
    """Logits in float64 as llama.cpp computes them from the file: ``[b, s] -> [b, s, vocabulary]``."""
    reader = gguf.GGUFReader(path)
    held = {tensor.name: numbers(tensor) for tensor in reader.tensors}
    name = reader.get_field("general.architecture").contents()

    def key(below: str, default: Any = None) -> Any:
        field = reader.get_field(f"{name}.{below}")
        return default if field is None else field.contents()

    heads, groups = key("attention.head_count"), key("attention.head_count_kv")
    head = key("attention.key_length")
    turned, length = key("rope.dimension_count", head), ids.shape[1]
    steps = np.arange(0, turned, 2) / turned

    def circle(base: float, divisor: Any) -> tuple[np.ndarray, np.ndarray]:
        angles = np.arange(length)[:, None] / base**steps / divisor
        return np.cos(angles)[:, None], np.sin(angles)[:, None]

    full = circle(key("rope.freq_base"), held.get("rope_freqs.weight", 1.0) * key("rope.scaling.factor", 1.0))
    # of Gemma 3: five of six layers see a window, and turn with another base, unscaled
    local, window = circle(key("rope.freq_base_swa", 10000.0), 1.0), key("attention.sliding_window")
    period = key("attention.sliding_window_pattern", 6)

    def norm(x: np.ndarray, at: str) -> np.ndarray:
        if name == "nemotron":
            x = x - x.mean(-1, keepdims=True)
            scaled = x / np.sqrt((x**2).mean(-1, keepdims=True) + key("attention.layer_norm_epsilon"))
            return scaled * held[f"{at}.weight"] + held[f"{at}.bias"]
        scaled = x / np.sqrt((x**2).mean(-1, keepdims=True) + key("attention.layer_norm_rms_epsilon"))
        return scaled * held[f"{at}.weight"]

    def linear(x: np.ndarray, at: str) -> np.ndarray:
        return x @ held[f"{at}.weight"].T + held.get(f"{at}.bias", 0.0)

    def turn(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        """llama.cpp turns neighbours in "llama", the halves of a head in the others."""
        x, rest = x[..., :turned], x[..., turned:]
        if name == "llama":
            one, two = x[..., 0::2], x[..., 1::2]
        else:
            one, two = x[..., : turned // 2], x[..., turned // 2 :]
        pair = (one * cos - two * sin, one * sin + two * cos)
        out = np.stack(pair, -1).reshape(x.shape) if name == "llama" else np.concatenate(pair, -1)
        return np.concatenate([out, rest], -1)

    x = held["token_embd.weight"][ids]
    if name == "gemma3":
        x = x * np.sqrt(x.shape[-1])
    causal = np.tri(length, dtype=bool)
    for layer in range(key("block_count")):
        at = f"blk.{layer}"
        slides = name == "gemma3" and (layer + 1) % period != 0
        mask = np.where(causal & ~np.tri(length, k=-window, dtype=bool) if slides else causal, 0.0, -np.inf)
        normed = norm(x, f"{at}.attn_norm")
        q, k, v = (
            linear(normed, f"{at}.attn_{part}").reshape(*x.shape[:2], count, head)
            for part, count in (("q", heads), ("k", groups), ("v", groups))
        )
        if f"{at}.attn_q_norm.weight" in held:
            q, k = norm(q, f"{at}.attn_q_norm"), norm(k, f"{at}.attn_k_norm")
        q, k = (turn(part, *(local if slides else full)) for part in (q, k))
        k, v = (np.repeat(part, heads // groups, 2) for part in (k, v))
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(head) + mask
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("bhqk,bkhd->bqhd", scores / scores.sum(-1, keepdims=True), v)
        added = linear(attended.reshape(*x.shape[:2], heads * head), f"{at}.attn_output")
        x = x + (norm(added, f"{at}.post_attention_norm") if name == "gemma3" else added)
        normed = norm(x, f"{at}.ffn_norm")
        up = linear(normed, f"{at}.ffn_up")
        if f"{at}.ffn_gate.weight" in held:
            gate = linear(normed, f"{at}.ffn_gate")
            if name == "gemma3":
                up = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
            else:
                up = gate / (1 + np.exp(-gate)) * up
        else:
            up = np.maximum(up, 0) ** 2
        added = linear(up, f"{at}.ffn_down")
        x = x + (norm(added, f"{at}.post_ffw_norm") if name == "gemma3" else added)
    return norm(x, "output_norm") @ held.get("output.weight", held["token_embd.weight"]).T
