# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The model and text of train_gpt.py under Hugging Face's Trainer, with whatever optimizer the DeepSpeed JSON names.

    DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 examples/hf_trainer.py --deepspeed ds_configs/acco_auto.json

Without ``DS_ACCELERATOR=cpu`` the same command trains on the machine's GPUs. Every option of ``TrainingArguments`` can
be given, and fills the "auto" values of the JSON. ``--output_dir`` gets the checkpoints, the trained model and
``trainer_state.json`` with all that was logged.
"""

from deepspeed.accelerator import get_accelerator
from text_data import Sequences, add_text_arguments, check_text_arguments, load_text, make_model, share_cores
from transformers import HfArgumentParser, Trainer, TrainingArguments

import deepspeed_acco  # noqa: F401  makes DeepSpeed know "optimizer": {"type": "ACCO"}


def parse_arguments():
    parser = HfArgumentParser(TrainingArguments, description="Train a GPT on bytes of text with the HF Trainer.")
    add_text_arguments(parser)
    parser.set_defaults(
        # Without it Trainer takes each rank of a host without GPUs for the only one.
        use_cpu=get_accelerator().device_name() == "cpu",
        output_dir="runs/hf_trainer",
        max_steps=60,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
        gradient_accumulation_steps=4,
        learning_rate=3e-3,
        adam_beta2=0.95,
        weight_decay=0.1,
        warmup_steps=6,
        eval_strategy="steps",
        eval_steps=20,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    training_args, text_args = parser.parse_args_into_dataclasses()
    check_text_arguments(parser, text_args)
    if training_args.deepspeed is None:
        parser.error("--deepspeed is missing; give a DeepSpeed JSON, for example ds_configs/acco_auto.json")
    return training_args, text_args


def main():
    args, text_args = parse_arguments()
    share_cores()
    samples_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    training, validation = load_text(text_args.data, text_args.seq_len, samples_per_step)
    trainer = Trainer(
        model=make_model(text_args.preset, text_args.seq_len, args.seed),
        args=args,
        train_dataset=Sequences(training),
        eval_dataset=Sequences(validation),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        print(f"val_loss {metrics['eval_loss']:.4f}", flush=True)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
