"""Trains the tests' network under Lightning on CPU ranks, for test_lightning.py: with DeepSpeedStrategy as it is, but
for the device, since it accepts CUDA alone. Every epoch has the same data and ends with a validation."""

import argparse
import json
from pathlib import Path

import lightning
import torch
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy

import deepspeed_acco
from tests.support import training

ACCUMULATE, STEPS_PER_EPOCH = 4, 5
VALIDATION = training.batch(7, 7, 7)


class CPUInPlaceOfCUDA(CPUAccelerator, CUDAAccelerator):
    """Is what the strategy accepts, and a CPU."""

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device("cpu", index) for index in range(devices)]


class OnCPU(DeepSpeedStrategy):
    """Has the device that all ranks share."""

    root_device = torch.device("cpu", 0)


class Module(lightning.LightningModule):
    """Has an optimizer, which Lightning asks for only where the JSON names none."""

    def __init__(self):
        super().__init__()
        self.network = training.make_network()
        self.losses, self.val_losses = [], []

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return deepspeed_acco.ACCO(trained, **training.HYPER, schedule="acco")

    def training_step(self, batch, index):
        loss = self.network(*(values.flatten(0, 1) for values in batch))
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        self.val_losses.append(self.network(*(values.flatten(0, 1) for values in batch)).item())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume")
    parser.add_argument("--local_rank", type=int)
    args = parser.parse_args()
    module = Module()
    trainer = lightning.Trainer(
        accelerator=CPUInPlaceOfCUDA(),
        devices=2,
        strategy=OnCPU(config=args.config),
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=2.0,
        max_epochs=args.epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    micro_batches = [training.batch(0, 0, index) for index in range(2 * ACCUMULATE * STEPS_PER_EPOCH)]
    trainer.fit(
        module,
        torch.utils.data.DataLoader(micro_batches, shuffle=False),
        torch.utils.data.DataLoader([VALIDATION] * 2),
        ckpt_path=args.resume,
    )
    engine = trainer.strategy.model
    trainer.save_checkpoint(args.out / "checkpoint")
    if trainer.is_global_zero:
        told = {
            "optimizer": type(engine.optimizer).__name__,
            "n": engine.gradient_accumulation_steps(),
            "clip": engine.gradient_clipping(),
            "steps": engine.global_steps,
            "losses": module.losses,
            "val_losses": module.val_losses,
        }
        (args.out / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
