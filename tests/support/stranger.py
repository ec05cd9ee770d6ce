"""A model that nobody here has seen, with text, conversations and preference pairs of its own, saved by transformers 5.

Its tokenizer is a byte-level BPE trained on its text, without a chat template; it is Qwen2 with untied embeddings,
lightly trained, in bfloat16, in several files with an index.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from support.transformers5 import run_transformers5, transformers5

SAVE = """
import json, sys, torch, transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
assert transformers.__version__.startswith("5."), transformers.__version__
folder, lines = sys.argv[1], [json.loads(line)["text"] for line in open(sys.argv[2])]
raw = Tokenizer(models.BPE())
raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
raw.decoder = decoders.ByteLevel()
special = ["<|end|>", "<|im_start|>", "<|im_end|>"]
raw.train_from_iterator(lines, trainers.BpeTrainer(
    vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
))
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=raw, eos_token="<|end|>", extra_special_tokens=special[1:]
)
torch.manual_seed(0)
model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
    vocab_size=len(tokenizer) + 1, hidden_size=64, intermediate_size=192, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, eos_token_id=0, bos_token_id=None,
    pad_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
))
ids = [token for line in lines for token in (*tokenizer(line)["input_ids"], 0)]
blocks = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(60):
    batch = blocks[torch.randperm(len(blocks))[:16]]
    loss = model(batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="300KB")
tokenizer.save_pretrained(folder)
"""
_THINGS = ("apples", "pears", "boats", "letters", "stones", "lamps", "horses", "maps")
_PLACES = ("the harbour", "a small town", "the old mill", "my kitchen", "the market", "a quiet valley")


@dataclass(frozen=True)
class Stranger:
    """Paths of what a user comes with."""

    model: Path
    text: Path
    chats: Path
    pairs: Path


def make_stranger(folder: Path) -> Stranger:
    """Write all of it below a directory."""
    draw = random.Random(7)
    stories = [{"text": " ".join(_sentence(draw) for _ in range(draw.randint(4, 12)))} for _ in range(700)]
    chats = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer, _ in (_question(draw, number) for number in range(60))
    ]
    pairs = [
        {"prompt": question, "chosen": answer, "rejected": refusal}
        for question, answer, refusal in (_question(draw, number) for number in range(100, 140))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    found = Stranger(folder / "model", folder / "stories.jsonl", folder / "chats.jsonl", folder / "pairs.jsonl")
    for path, rows in ((found.text, stories), (found.chats, chats), (found.pairs, pairs)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_transformers5(transformers5(), SAVE, found.model, found.text)
    return found


def _sentence(draw: random.Random) -> str:
    count, thing, place = draw.randint(2, 99), draw.choice(_THINGS), draw.choice(_PLACES)
    forms = (
        f"There were {count} {thing} in {place}.",
        f"Somebody took {count} {thing} to {place} and came back late.",
        f"Nobody in {place} had counted the {thing}, but there were {count}.",
    )
    return draw.choice(forms)


def _question(draw: random.Random, number: int) -> tuple[str, str, str]:
    thing, place = draw.choice(_THINGS), draw.choice(_PLACES)
    return (
        f"How many {thing} were in {place} on day {number}?",
        f"There were {number} {thing} in {place}.",
        "Who knows.",
    )
