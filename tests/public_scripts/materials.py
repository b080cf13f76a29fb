# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Makes what the scripts train: a tokenizer, tiny models, texts and pairs, of Python's own library.

Nothing is taken from a hub. All of it depends on the Python version alone.
"""

import json
import random
import shutil
import sysconfig
import tempfile
from pathlib import Path

import torch

VOCABULARY = 512
WIDTH, LAYERS, HEADS, LONGEST = 64, 2, 4, 256
SEQ_LEN = 64
PRETRAINING_STEPS, PRETRAINING_BATCH, PRETRAINING_LR = 200, 8, 3e-3
SAMPLES, HELD_OUT = 4096, 128
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"


def library(pattern: str) -> str:
    """Returns the source of the modules of Python's library whose file has that name."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob(pattern)))


def make_tokenizer(text: str):
    """Returns a byte-level BPE tokenizer of :data:`VOCABULARY` words, with a chat template."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(text.splitlines(keepends=True), VOCABULARY, special_tokens=["<end>", "<pad>"])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        made.save(str(file))
        words = dict(eos_token="<end>", pad_token="<pad>", model_max_length=LONGEST, chat_template=CHAT)
        return PreTrainedTokenizerFast(tokenizer_file=str(file), **words)


def make_model(seed: int):
    """Returns a Llama of 0.2 million random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = dict(hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    words = dict(vocab_size=VOCABULARY, eos_token_id=0, pad_token_id=1, bos_token_id=None)
    return LlamaForCausalLM(LlamaConfig(**sizes, **words, max_position_embeddings=LONGEST))


def pretrain(model, ids: torch.Tensor) -> None:
    """Trains the model on random pieces of one long text, in this process."""
    chance = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_LR, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, PRETRAINING_STEPS)
    for _ in range(PRETRAINING_STEPS):
        begins = torch.randint(len(ids) - SEQ_LEN, (PRETRAINING_BATCH,), generator=chance)
        batch = torch.stack([ids[begin : begin + SEQ_LEN] for begin in begins])
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        falling.step()
        optimizer.zero_grad()


def paragraphs(text: str, letters: int = 160) -> list[str]:
    """Cuts a text at line ends into pieces of at least so many letters."""
    pieces, piece = [], ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= letters:
            pieces.append(piece)
            piece = ""
    return pieces


def write_lines(folder: Path, rows: list[dict]) -> None:
    """Writes train.json and test.json, one row a line."""
    folder.mkdir(parents=True)
    for name, part in (("train", rows[HELD_OUT:]), ("test", rows[:HELD_OUT])):
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in part))


def make(folder: Path, seeds: list[int]) -> None:
    """Fills a folder with texts, pairs, train.txt, test.txt, a pretrained model, and random-SEED for each seed; what is
    there remains."""
    torch.set_num_threads(1)  # a thread more costs more than it saves at this size
    if not (folder / "pretrained").exists():
        _make_texts(folder)
        source = library("[a-c]*.py")
        tokenizer = make_tokenizer(source)
        model = make_model(0)
        pretrain(model, torch.tensor(tokenizer(source, verbose=False).input_ids))
        tokenizer.save_pretrained(folder / "pretrained")
        model.save_pretrained(folder / "pretrained")
    for path in (folder / f"random-{seed}" for seed in seeds):
        if not path.exists():
            shutil.copytree(folder / "pretrained", path)  # for the tokenizer
            make_model(int(path.name.partition("-")[2])).save_pretrained(path)


def _make_texts(folder: Path) -> None:
    pieces = paragraphs(library("[s-z]*.py"))
    random.Random(0).shuffle(pieces)
    pieces = pieces[:SAMPLES]
    write_lines(folder / "texts", [{"text": piece} for piece in pieces])
    write_lines(folder / "pairs", [pair_of(piece, number) for number, piece in enumerate(pieces)])
    (folder / "train.txt").write_text("".join(pieces[HELD_OUT:]))
    (folder / "test.txt").write_text("".join(pieces[:HELD_OUT]))


def pair_of(piece: str, number: int) -> dict:
    """Returns a preference: how the piece goes on, rather than the same letters mixed."""
    middle = len(piece) // 2
    mixed = list(piece[middle:])
    random.Random(number).shuffle(mixed)
    return {"prompt": piece[:middle], "chosen": piece[middle:], "rejected": "".join(mixed)}
