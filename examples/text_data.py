# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""What the examples share: bytes of real text, a small GPT from random weights, and the options for both."""

import os
import sysconfig
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

# Layers, width, attention heads.
PRESETS = {
    "tiny": (1, 32, 2),  # 0.03 M parameters
    "small": (2, 64, 2),  # 0.1 M
    "medium": (8, 512, 8),  # 25 M
    "large": (12, 768, 12),  # 85 M
    "xl": (24, 1024, 16),  # 303 M
}
HOLD_OUT_EVERY = 20  # of many files each 20th is for validation, of a single one its last twentieth
VALIDATION_SEQUENCES = 128


def add_text_arguments(parser) -> None:
    parser.add_argument("--preset", choices=PRESETS, default="small", help="size of the model (default: %(default)s)")
    parser.add_argument("--seq_len", type=int, default=128, help="bytes in a sequence (default: %(default)s)")
    parser.add_argument(
        "--data", type=Path, help="a text file or a folder of them (default: Python's standard library)"
    )


def check_text_arguments(parser, args) -> None:
    if args.data is not None and not args.data.exists():
        parser.error(f"--data {args.data} does not exist; give a text file or a folder of text files")
    if args.seq_len < 2:
        parser.error(f"--seq_len {args.seq_len} is not allowed; allowed: 2 and more")


def share_cores() -> None:
    """The ranks of a host without accelerators share its cores."""
    if get_accelerator().device_name() == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_SIZE", "1"))))


def make_model(preset: str, seq_len: int, seed: int) -> GPTNeoXForCausalLM:
    """A GPT over bytes with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    layers, width, heads = PRESETS[preset]
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=256,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=seq_len,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def read_files(data: Path | None) -> list[bytes]:
    """The contents of the text files, in the order of their names."""
    if data is not None and data.is_file():
        return [data.read_bytes()]
    folder, pattern, left_out = data, "*", set()
    if data is None:
        folder, pattern = Path(sysconfig.get_paths()["stdlib"]), "*.py"
        left_out = {"site-packages", "dist-packages", "test", "tests"}
    paths = sorted(path for path in folder.rglob(pattern) if path.is_file())
    contents = [path.read_bytes() for path in paths if not left_out.intersection(path.relative_to(folder).parts)]
    return [content for content in contents if content and b"\0" not in content]  # a zero byte: not text


def split(files: list[bytes]) -> tuple[bytes, bytes]:
    """Training and validation text. Whole files are held out, of a single file its last part."""
    if len(files) == 1:
        held_out = len(files[0]) // HOLD_OUT_EVERY
        return files[0][: len(files[0]) - held_out], files[0][len(files[0]) - held_out :]
    middle = min(HOLD_OUT_EVERY, len(files)) // 2
    is_held_out = [index % HOLD_OUT_EVERY == middle for index in range(len(files))]
    training = b"".join(content for content, held in zip(files, is_held_out) if not held)
    return training, b"".join(content for content, held in zip(files, is_held_out) if held)


def to_sequences(text: bytes, seq_len: int) -> torch.Tensor:
    """Bytes as a table of [sequences, seq_len], without the rest that fills no sequence."""
    count = len(text) // seq_len
    return torch.frombuffer(bytearray(text[: count * seq_len]), dtype=torch.uint8).view(count, seq_len)


def load_text(data: Path | None, seq_len: int, samples_per_step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation sequences, [sequences, seq_len] bytes each; of the validation a fixed part.

    Raises:
        SystemExit: when there is not enough text for one optimizer step and one validation.
    """
    files = read_files(data)
    texts = split(files) if files else (b"", b"")
    for_training, for_validation = (len(text) // seq_len for text in texts)
    if for_training < samples_per_step or for_validation < 1:
        raise SystemExit(
            f"too little text: {for_training} sequences of --seq_len {seq_len} bytes for training and "
            f"{for_validation} for validation; at least {samples_per_step} (one optimizer step) and 1 are needed. "
            "Give more text by --data, a smaller --seq_len or a smaller batch"
        )
    training, validation = (to_sequences(text, seq_len) for text in texts)
    spread = torch.linspace(0, len(validation) - 1, min(VALIDATION_SEQUENCES, len(validation))).long()
    return training, validation[spread]


class Sequences(torch.utils.data.Dataset):
    """The rows of a table of bytes, as a language model of transformers takes them."""

    def __init__(self, table: torch.Tensor):
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.table[index].long()
        return {"input_ids": row, "labels": row}
