# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Which public scripts are run, how they are started, and where their losses are found: a row each.

Words in braces are filled for each run: the file of the script, the folders of models and texts, seed, micro-batches a
step, steps, the step that saves, and the folder that the run writes to.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MICRO_BATCH, EVALUATION_BATCH, SEQ_LEN = 4, 32, 64


def loss_of_trainer(out: Path, step: int) -> float:
    """Returns the evaluation loss of a step that HF Trainer saved with its checkpoint.

    Raises:
        ValueError: the checkpoint knows of no evaluation at that step.
    """
    file = out / f"checkpoint-{step}" / "trainer_state.json"
    last = json.loads(file.read_text())["log_history"][-1]
    if last["step"] != step or "eval_loss" not in last:
        raise ValueError(f"{file} ends with {last}; needed is an evaluation at step {step}")
    return last["eval_loss"]


def loss_of_results(out: Path, step: int) -> float:
    """Returns the evaluation loss that Accelerate's examples write at their end, whatever the step."""
    return json.loads((out / "all_results.json").read_text())["eval_loss"]


@dataclass(frozen=True)
class Script:
    """A script of somebody else's.

    Args:
        name: in results and tables.
        checkout: the folder below --checkouts, a git clone.
        file: the script in it; it is run as it is.
        start: what the launcher starts.
        arguments: of the script.
        config: the stock configuration in the checkout: a file of ``accelerate launch``, or a DeepSpeed JSON.
        needs: packages; TRL's scripts run from the clone, and ask for the version of an installed one.
        steps: of a run, unless the runner is told otherwise.
        loss: reads the final loss.
        saved: the folder of the checkpoint of the step that saves, below the run's.
        resume: arguments to go on from there; None where the script cannot.
        resume_n: the numbers of micro-batches with which the script's own resuming is exact.
        search: a folder of the checkout for Python's search path, where the script's package is part of it.
    """

    name: str
    checkout: str
    file: str
    start: tuple[str, ...]
    arguments: tuple[str, ...]
    config: str
    needs: tuple[str, ...]
    steps: int
    loss: Callable[[Path, int], float]
    saved: str
    resume: tuple[str, ...] | None = None
    resume_n: tuple[int, ...] = ()
    search: str | None = None


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


OF_TRAINER = _words(
    f"--per_device_train_batch_size {MICRO_BATCH} --per_device_eval_batch_size {EVALUATION_BATCH}"
    " --gradient_accumulation_steps {n} --max_steps {steps} --seed {seed} --output_dir {out} --report_to none"
    " --eval_strategy steps --eval_steps {steps} --save_strategy steps --save_steps {half} --logging_steps 20 --use_cpu"
)
OF_TRL = dict(
    checkout="trl",
    config="trl/accelerate_configs/zero1.yaml",
    steps=100,
    loss=loss_of_trainer,
    saved="checkpoint-{half}",
    search=".",
)

SCRIPTS = (
    Script(
        name="trl-sft",
        file="trl/scripts/sft.py",
        start=("-m", "trl.scripts.sft"),
        arguments=OF_TRAINER
        + _words("--model_name_or_path {models}/pretrained --dataset_name {texts}/texts --learning_rate 1e-3")
        + _words(f"--max_length {SEQ_LEN}"),
        needs=("accelerate", "datasets", "transformers", "trl"),
        **OF_TRL,
    ),
    Script(
        name="trl-sft-lora",
        file="trl/scripts/sft.py",
        start=("-m", "trl.scripts.sft"),
        arguments=OF_TRAINER
        + _words("--model_name_or_path {models}/pretrained --dataset_name {texts}/texts --learning_rate 5e-3")
        + _words(f"--max_length {SEQ_LEN} --use_peft --lora_r 8 --lora_alpha 16"),
        needs=("accelerate", "datasets", "transformers", "trl", "peft"),
        **OF_TRL,
    ),
    Script(
        name="accelerate-clm",
        checkout="accelerate",
        file="examples/by_feature/deepspeed_with_config_support.py",
        start=("-m", "tests.public_scripts.on_cpu", "{file}"),
        arguments=_words(
            "--model_name_or_path {models}/random-{seed} --train_file {texts}/train.txt"
            f" --validation_file {{texts}}/test.txt --block_size {SEQ_LEN} --learning_rate 3e-3"
            f" --per_device_train_batch_size {MICRO_BATCH} --per_device_eval_batch_size {EVALUATION_BATCH}"
            " --max_train_steps {steps} --seed {seed} --checkpointing_steps {half} --output_dir {out}"
        ),
        config="examples/deepspeed_config_templates/zero_stage1_config.json",
        needs=("accelerate", "datasets", "transformers"),
        steps=300,  # from random weights
        loss=loss_of_results,
        saved="step_{half}",
        resume=("--resume_from_checkpoint", "{saved}"),
        resume_n=(1,),  # it takes its steps for micro-batches when it skips those that were seen
    ),
    Script(
        name="trl-dpo",
        file="trl/scripts/dpo.py",
        start=("-m", "trl.scripts.dpo"),
        arguments=OF_TRAINER
        + _words("--model_name_or_path {models}/pretrained --dataset_name {texts}/pairs --learning_rate 1e-4")
        + _words(f"--max_length {2 * SEQ_LEN}"),
        needs=("accelerate", "datasets", "transformers", "trl"),
        **OF_TRL,
    ),
)
