"""16-bit runs against a reference whose forward uses the same rounded weights, close enough to tell schedules apart."""

import itertools
import logging

import pytest
import torch

from tests.support import oracle, training

pytestmark = pytest.mark.timeout(300)

WINDOWS = 16
# Where float32 and float64 put a weight on two sides of a rounding boundary, one 16-bit weight differs by one unit in
# the last place, and the runs drift apart a little from there on. Without that they agree to 1e-6; the schedules are
# more than 1e-2 apart.
TOLERANCE = 1e-3
PRECISIONS = ("bf16", "bf16+fp32", "fp16", "fp16static", "fp16+fp32")


def _references(precision, scales, **arguments):
    common = dict(world_size=2, windows=WINDOWS, n=4, a=2, precision=precision, scales=scales, **arguments)
    return {name: oracle.run_reference(schedule=name, **common) for name in ("acco", "local", "wp", "dpu", "sync")}


@pytest.mark.parametrize(
    ("precision", "schedule"),
    [
        pytest.param(precision, schedule, marks=pytest.mark.full if (place + number) % 2 or schedule == "dpu" else ())
        for place, precision in enumerate(PRECISIONS)
        for number, schedule in enumerate(("acco", "local", "wp", "dpu", "sync"))
    ],
)
def test_sixteen_bit(ranks, precision, schedule, capsys):
    config = training.ds_config(4, 2.0, precision=precision, schedule=schedule)
    records = ranks(2).run(training.train, config=config, windows=WINDOWS, precision=precision)
    scale = records[0]["scale"]
    scales = None
    if precision.startswith("fp16"):
        # the scale of each window is the one after the step before it
        first = 128.0 if precision == "fp16static" else 2.0**17
        scales = [first, *scale[:-1]]
        if precision != "fp16static":
            assert records[0]["skipped"][-1] > 0, "the dynamic scale must start too high for this test"
            assert scale[-1] < first
    references = _references(precision, scales, clip=2.0)
    distances = {name: oracle.distance(records[0]["weights"], r["weights"]) for name, r in references.items()}
    with capsys.disabled():
        print(f"\n{precision} {schedule}: distance to " + ", ".join(f"{k} {v:.1e}" for k, v in distances.items()))
    mine = distances.pop(schedule)
    assert mine < TOLERANCE
    assert min(distances.values()) > 10 * mine
    for record in records[1:]:
        assert (record["replicas"] == records[0]["replicas"]) == references[schedule]["is_alike"]


@pytest.mark.parametrize("wire", ["bf16", "fp16", "fp32"])
def test_communication_data_type(ranks, wire):
    """fp32 training, gradients sent in another dtype: the rounding of the sent sums must be there, and nothing else."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[wire]
    config = training.ds_config(4, schedule="acco") | {"communication_data_type": wire}
    records = ranks(2).run(training.train, config=config, windows=20)
    exact = oracle.run_reference(schedule="acco", world_size=2, windows=20, n=4, a=2)
    rounded = oracle.run_reference(
        schedule="acco",
        world_size=2,
        windows=20,
        n=4,
        a=2,
        send=(lambda total: (total.float() / 2).to(dtype).double() * 2)
        if wire == "fp16"
        else (lambda total: total.float().to(dtype).double()),
    )
    mine = oracle.distance(records[0]["weights"], rounded["weights"])
    if wire == "fp32":
        assert mine < 1e-5
    else:
        assert mine < 0.4 * oracle.distance(records[0]["weights"], exact["weights"])


def _steps_with_bad_gradient(config, bad_window, bad_micro_batch, windows, lr_decay=1.0):
    """Trains; one micro-batch of rank 1 has an infinite input."""
    import torch.distributed as dist

    def decays(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, lr_decay)

    engine = training.start_engine(config, lr_scheduler=decays)
    record = {"skipped": [], "lr": [], "norms": [], "weights": [], "told": [], "applied": []}
    told = logging.Handler(logging.WARNING)
    told.emit = lambda line: record["told"].append(line.getMessage())
    logging.getLogger("deepspeed_acco").addHandler(told)
    for window in range(windows):
        for micro_batch in range(engine.gradient_accumulation_steps()):
            x, y = training.batch(dist.get_rank(), window, micro_batch, next(engine.module.parameters()).dtype)
            if dist.get_rank() == 1 and (window, micro_batch) == (bad_window, bad_micro_batch):
                y = y * float("nan")
            engine.backward(engine(x, y))
            engine.step()
        record["skipped"].append(engine.skipped_steps)
        record["lr"].append(engine.get_lr()[0] / training.HYPER["lr"])
        record["applied"].append(engine.was_step_applied())
        record["norms"].append(float(engine.get_global_grad_norm()))
        record["weights"].append(training.true_master_weights(engine))
    engine.destroy()
    logging.getLogger("deepspeed_acco").removeHandler(told)
    return record


BAD_GRADIENTS = [
    *(("acco", 0, "fp32"), ("acco", 3, "bf16"), ("acco", 3, "fp16static")),
    *(("local", 0, "bf16"), ("local", 3, "fp16static"), ("local", 3, "fp32")),
    *(("wp", 0, "bf16"), ("wp", 3, "fp32"), ("wp", 3, "fp16static")),
    *(("sync", 0, "bf16"), ("sync", 3, "fp16static"), ("sync", 3, "fp32")),
]


@pytest.mark.parametrize(
    ("schedule", "bad_micro_batch", "precision"),
    [
        pytest.param(*case, marks=() if case in BAD_GRADIENTS else pytest.mark.full)
        for case in itertools.product(("acco", "local", "wp", "dpu", "sync"), (0, 3), ("fp32", "bf16", "fp16static"))
    ],
)
def test_gradient_that_is_not_finite(ranks, precision, schedule, bad_micro_batch):
    """The COMMIT is skipped on all ranks, counted, and training goes on from finite weights."""
    config = training.ds_config(4, 2.0, precision=precision, schedule=schedule)
    records = ranks(2).run(
        _steps_with_bad_gradient, config=config, bad_window=2, bad_micro_batch=bad_micro_batch, windows=6, lr_decay=0.5
    )
    for record in records:
        weights = record["weights"]
        assert all(tensor.isfinite().all() for tensor in weights[-1])
        assert all(a.equal(b) for a, b in zip(weights[2], weights[1])), "window 2 must change nothing"
        assert not all(a.equal(b) for a, b in zip(weights[3], weights[2])), "window 3 must train again"
        is_immediate = schedule == "sync" or precision == "fp16static"
        assert record["skipped"] == ([0, 0, 1, 1, 1, 1] if is_immediate else [0, 0, 0, 1, 1, 1])
        assert record["applied"] == [window != 2 or not is_immediate for window in range(6)]
        # The scheduler waits, at once or where the skip is known: afterwards it has moved for the steps that were made.
        moved = [1, 2, 2, 3, 4, 5] if is_immediate else [1, 2, 3, 3, 4, 5]
        assert record["lr"] == [0.5**times for times in moved]
    if precision != "fp16static":  # DeepSpeed's scaler tells
        lines = [line for line in records[0]["told"] if "skipped" in line]
        assert len(lines) == 1 and "step 3 was skipped: the gradient was not finite" in lines[0]
        assert not any("skipped" in line for line in records[1]["told"])
    for mine, theirs in zip(records[0]["weights"][-1], records[1]["weights"][-1]):
        assert mine.equal(theirs)


@pytest.mark.parametrize("schedule", ["acco", "local", "wp", pytest.param("dpu", marks=pytest.mark.full)])
def test_after_a_skipped_commit_like_the_reference(ranks, schedule):
    config = training.ds_config(4, 2.0, schedule=schedule)
    records = ranks(2).run(_steps_with_bad_gradient, config=config, bad_window=2, bad_micro_batch=3, windows=6)

    def spoil(rank, window, micro_batch):
        return float("nan") if (rank, window, micro_batch) == (1, 2, 3) else 1.0

    reference = oracle.run_reference(schedule=schedule, world_size=2, windows=6, n=4, a=2, clip=2.0, spoil=spoil)
    assert oracle.distance(records[0]["weights"][-1], reference["weights"]) < 1e-5
