"""COMMITs in 8 bits on real gloo ranks: the float64 reference with its own quantizer, the same bits on every lane and
rank, looks, values that are not finite, weights that somebody else writes, checkpoints, bytes and memory."""

import pytest
import torch

from deepspeed_acco.algorithm.window import phase_a_micro_batches
from deepspeed_acco.algorithm.wire import COMMIT_COMMS
from tests.engine import test_adaptive_windows as adaptive
from tests.engine import test_checkpoints as checkpoints
from tests.engine import test_quantized_estimate as quantized
from tests.support import oracle, training

pytestmark = pytest.mark.timeout(240)

BITS = COMMIT_COMMS["int8"]
COMMIT_BITS = (BITS.gradient, BITS.change)
# A value so near a tie that float32 and float64 round it to two sides moves a weight by a level, for one step.
TOLERANCE = 2e-3
TOLERANCE_WITHOUT_TIES = 2e-5


def run_reference(world_size, groups=1, commit_bits=COMMIT_BITS, **arguments):
    with quantized.wide_network():
        return oracle.run_reference(
            world_size=world_size,
            groups=groups,
            commit_bits=commit_bits,
            shard_numels=quantized.shard_numels(world_size, groups),
            **arguments,
        )


def shown_distance(record, reference):
    with quantized.wide_network():
        return oracle.distance(record["after_destroy"], reference["shown"])


CASES = [  # schedule, estimate_comm, ranks, ranks of a host, clipping, groups, n, warm-up, staging bytes
    ("acco", "int4", 2, 1, 2.0, 1, 4, 0, None),
    pytest.param("acco", "full", 3, 1, 0.0, 2, 5, 2, 600, marks=pytest.mark.full),
    ("acco", "int8", 4, 2, 2.0, 1, 3, 0, 600),
    pytest.param("acco", "full", 4, 2, 2.0, 2, 2, 0, None, marks=pytest.mark.full),
    ("local", None, 2, 1, 2.0, 2, 1, 3, 600),
    pytest.param("local", None, 4, 2, 0.0, 1, 2, 0, None, marks=pytest.mark.full),
    pytest.param("wp", None, 2, 1, 2.0, 1, 2, 2, None, marks=pytest.mark.full),
    pytest.param("dpu", None, 3, 1, 0.0, 1, 1, 0, 600, marks=pytest.mark.full),
    ("sync", None, 2, 1, 2.0, 2, 2, 0, None),
]


@pytest.mark.parametrize(
    ("schedule", "estimate_comm", "world_size", "in_host", "clip", "groups", "n", "warmup", "staging"), CASES
)
def test_equals_the_reference(ranks, schedule, estimate_comm, world_size, in_host, clip, groups, n, warmup, staging):
    params = {"schedule": schedule, "commit_comm": "int8", "ranks_per_host": in_host, "overlap_warmup_steps": warmup}
    params |= {"estimate_comm": estimate_comm} if estimate_comm else {}
    config = training.ds_config(n, clip, **params)
    records = ranks(world_size).run(
        quantized.train_wide, config=config, windows=7, groups=groups, staging_bytes=staging
    )
    a = phase_a_micro_batches(n, 0.5) if estimate_comm else n
    common = dict(schedule=schedule, world_size=world_size, groups=groups, windows=7, n=n, a=a, clip=clip)
    common |= dict(warmup=warmup, ranks_per_host=in_host, estimate_bits=quantized.BITS.get(estimate_comm))
    reference = run_reference(**common)
    mine = quantized.distance(records[0], reference)
    assert mine < TOLERANCE
    assert shown_distance(records[0], reference) < 3 * TOLERANCE, "right behind a step"
    assert records[0]["losses"] == pytest.approx(reference["losses"], rel=1e-5, abs=1e-6)
    for bits in (None, (8, 8), (4, 4)):
        assert quantized.distance(records[0], run_reference(commit_bits=bits, **common)) > 5 * mine, bits
    for record in records[1:]:
        assert all(a.equal(b) for a, b in zip(record["after_destroy"], records[0]["after_destroy"]))
        assert record["replicas"] == records[0]["replicas"] or not reference["is_alike"]


@pytest.mark.parametrize(
    ("schedule", "world_size", "in_host"),
    [("acco", 3, 1), ("local", 2, 1), ("wp", 2, 1), ("sync", 4, 2)],
)
def test_equals_the_reference_to_rounding(ranks, schedule, world_size, in_host):
    """So few levels that none is near a tie."""
    n, bits = (4, 4) if schedule == "acco" else (2, None)
    params = {"estimate_comm": "int4"} if bits else {}
    config = training.ds_config(n, schedule=schedule, commit_comm="int8", ranks_per_host=in_host, **params)
    records = ranks(world_size).run(training.train, config=config, windows=3)
    size = sum(param.numel() for param in training.param_groups(training.make_network(), 1))
    reference = oracle.run_reference(
        schedule=schedule,
        world_size=world_size,
        windows=3,
        n=n,
        a=2,
        estimate_bits=bits,
        commit_bits=COMMIT_BITS,
        ranks_per_host=in_host,
        shard_numels=[-(-size // (2 * world_size)) * 2],
    )
    assert oracle.distance(records[0]["weights"], reference["weights"]) < TOLERANCE_WITHOUT_TIES
    assert oracle.distance(records[0]["after_destroy"], reference["shown"]) < TOLERANCE_WITHOUT_TIES


@pytest.mark.parametrize(
    ("precision", "schedule"),
    [
        *(("bf16", "acco"), ("fp16static", "acco")),
        *(pytest.param(*case, marks=pytest.mark.full) for case in (("bf16+fp32", "sync"), ("bf16", "local"))),
    ],
)
def test_sixteen_bit(ranks, precision, schedule):
    n, params = (4, {"estimate_comm": "int4"}) if schedule == "acco" else (2, {})
    config = training.ds_config(n, 2.0, precision=precision, schedule=schedule, commit_comm="int8", **params)
    records = ranks(2).run(quantized.train_wide, config=config, windows=6, precision=precision)
    scales = [128.0] * 6 if precision.startswith("fp16") else None
    common = dict(schedule=schedule, world_size=2, windows=6, n=n, a=2, clip=2.0, precision=precision, scales=scales)
    bits = quantized.BITS[params["estimate_comm"]] if params else None
    reference = run_reference(estimate_bits=bits, **common)
    assert quantized.distance(records[0], reference) < quantized.TOLERANCE_16_BIT
    assert shown_distance(records[0], reference) < 2 * quantized.TOLERANCE_16_BIT


@pytest.mark.parametrize(
    "schedule", ["acco", "local", *(pytest.param(name, marks=pytest.mark.full) for name in ("wp", "sync"))]
)
def test_the_lanes_have_the_same_bits_and_looks_change_nothing(ranks, schedule):
    n, params = (4, {"estimate_comm": "int4"}) if schedule == "acco" else (3, {})
    params |= {"schedule": schedule, "commit_comm": "int8"}
    runs = [
        ranks(2).run(
            quantized.train_wide,
            config=training.ds_config(n, 2.0, precision="bf16", lane=lane, **params),
            windows=8,
            precision="bf16",
            look=look,
        )
        for lane, look in (("auto", None), ("inline", None), ("auto", "look_in_every_way"))
    ]
    for record in runs[1:]:
        assert record[0]["losses"] == runs[0][0]["losses"]
        for key in ("live", "after_destroy"):
            assert all(mine.equal(theirs) for mine, theirs in zip(record[0][key], runs[0][0][key]))


# ---- looks


def _looks(config, alone):
    """What looks show after each window, by rank 0 alone or by all; and a state_dict between forward and backward."""
    import torch.distributed as dist

    import deepspeed_acco

    with quantized.wide_network():
        engine = training.start_engine(config)
        shown, between = [], []
        for window in range(5):
            training.run_windows(engine, 1, first_window=window)
            if not alone or dist.get_rank() == 0:
                with deepspeed_acco.true_weights(engine):
                    shown.append(training.live_weights(engine))
        loss = engine(*training.batch(dist.get_rank(), 5, 0))
        state = {name: value.clone() for name, value in engine.module.state_dict().items()}
        engine.backward(loss)
        between = [state[name] for name, param in engine.module.named_parameters() if param.requires_grad]
        engine.destroy()
        return shown, between


@pytest.mark.parametrize(
    ("schedule", "in_host"), [("acco", 1), ("local", 2), pytest.param("dpu", 2, marks=pytest.mark.full)]
)
def test_one_rank_may_look_alone_and_sees_what_all_hold(ranks, schedule, in_host):
    world_size, n = 2 * in_host, 2
    config = training.ds_config(n, 2.0, schedule=schedule, commit_comm="int8", ranks_per_host=in_host)
    alone = ranks(world_size).run(_looks, config=config, alone=True)
    together = ranks(world_size).run(_looks, config=config, alone=False)
    expected = []
    run_reference(
        schedule=schedule,
        world_size=world_size,
        windows=5,
        n=n,
        a=1 if schedule == "acco" else n,
        clip=2.0,
        ranks_per_host=in_host,
        keep=lambda reference, report: expected.append(reference.shown[0]),
    )
    for record in together:
        for mine, theirs in zip(record[0], alone[0][0]):
            assert all(a.equal(b) for a, b in zip(mine, theirs))
        assert all(a.equal(b) for a, b in zip(record[1], record[0][-1])), "of the newest COMMIT"
    for mine, theirs in zip(alone[0][0], expected):
        flat = oracle.flatten(mine)
        assert (flat - theirs[: flat.numel()]).norm() < 5e-3 * theirs.norm(), "a step is 0.1 of it"


# ---- values that are not finite, and what somebody else writes


@pytest.mark.parametrize(("precision", "schedule"), [("fp32", "acco"), ("bf16", "acco"), ("fp32", "wp")])
def test_a_gradient_that_is_not_finite_skips_the_step_everywhere(ranks, precision, schedule):
    params = {"estimate_comm": "int4"} if schedule == "acco" else {}
    config = training.ds_config(4, 2.0, precision=precision, schedule=schedule, commit_comm="int8", **params)
    records = ranks(2).run(quantized.train_with_bad_target, config=config, windows=5, bad=(2, 0), precision=precision)
    quantized.require_one_skip(records)
    if precision == "fp32":
        common = dict(schedule=schedule, world_size=2, windows=5, n=4, a=2, clip=2.0, spoil=quantized.spoil)
        reference = run_reference(estimate_bits=4 if params else None, **common)
        assert quantized.distance(records[0], reference) < TOLERANCE


def _train_and_write(config, restores, in_look):
    """Rank 1 writes one value of the live weights in mid-training, none of the few that are compared one by one."""
    import torch.distributed as dist

    with quantized.wide_network():
        engine = training.start_engine(config)
        training.run_windows(engine, 3)
        if in_look:
            engine.module.state_dict()
        if dist.get_rank() == 1:
            weight = engine.module.middle.weight.data
            kept = weight[20, 21].clone()
            weight[20, 21] = 3.0
            if restores:
                weight[20, 21] = kept
        try:
            training.run_windows(engine, 4, first_window=3)
        except RuntimeError as error:
            return str(error)
        live = training.live_weights(engine)
        engine.destroy()
        return live


@pytest.mark.parametrize("schedule", ["acco", "sync"])
def test_weights_that_are_written_and_not_restored_are_an_error_on_every_rank(ranks, schedule):
    config = training.ds_config(2, schedule=schedule, commit_comm="int8", comm_timeout_s=20)
    kept = ranks(2).run(_train_and_write, config=config, restores=True, in_look=False)
    assert all(a.equal(b) for a, b in zip(*kept))
    for told in ranks(2).run(_train_and_write, config=config, restores=False, in_look=False):
        assert "weights were written between two rounds" in told and 'set commit_comm to "full"' in told


def _train_and_listen(config, restores):
    import logging

    from deepspeed_acco.engine.log import logger

    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logger().addHandler(handler)
    live = _train_and_write(config, restores, in_look=True)
    logger().removeHandler(handler)
    return live, sum("were written in an evaluation" in message for message in told)


def test_what_is_written_in_a_look_is_gone_when_training_goes_on(ranks):
    config = training.ds_config(2, schedule="acco", commit_comm="int8")
    kept, written = (ranks(2).run(_train_and_listen, config=config, restores=restores) for restores in (True, False))
    for (mine, _), (theirs, _) in zip(kept, written):
        assert all(a.equal(b) for a, b in zip(mine, theirs))
    assert [count for _, count in kept] == [0, 0] and [count for _, count in written] == [0, 1], "said once, by rank 1"


# ---- checkpoints


@pytest.mark.parametrize(
    ("schedule", "in_host"),
    [
        *(("acco", 1), ("local", 2)),
        *(pytest.param(*case, marks=pytest.mark.full) for case in (("wp", 1), ("sync", 1), ("dpu", 2))),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(ranks, tmp_path, schedule, in_host):
    params = {"estimate_comm": "int4"} if schedule == "acco" else {}
    config = training.ds_config(
        3, precision="bf16", schedule=schedule, commit_comm="int8", ranks_per_host=in_host, **params
    )
    run = ranks(2 * in_host).run(quantized.resume, config=config, folder=str(tmp_path), windows=4, save_at=5)
    for record in run:
        assert record["again"]["losses"] == record["first"]["losses"]
        assert all(a.equal(b) for a, b in zip(record["first"]["live"], record["again"]["live"]))


@pytest.mark.parametrize(
    ("before", "after"), [("int8", "full"), ("full", "int8"), ("int8", "AdamW"), ("AdamW", "int8")]
)
def test_going_on_with_another_way_of_sending_and_with_zero1(ranks, tmp_path, before, after):
    """The masters and AdamW's state are exact; what goes on begins at them."""
    configs = {comm: training.ds_config(2, schedule="sync", commit_comm=comm) for comm in ("int8", "full")}
    configs["AdamW"] = checkpoints.with_adamw(configs["full"], torch_adam=True)
    common = dict(folder=str(tmp_path), groups=2, read="shards_of")
    saved = ranks(2).run(checkpoints.save, config=configs[before], windows=3, **common)
    arguments = dict(windows=3, first_window=3, **common)
    results = ranks(2).run(checkpoints.load_and_go_on, config=configs[after], **arguments)
    for (state, record), expected in zip(results, saved):
        assert checkpoints.same_state(state, expected)
        assert all(loss == loss and loss < 10 for loss in record["losses"])


def test_going_on_with_another_number_of_ranks(ranks, tmp_path):
    config = training.ds_config(2, schedule="acco", commit_comm="int8")
    common = dict(folder=str(tmp_path), groups=2)
    saved = ranks(2).run(checkpoints.save, config=config, windows=3, **common)[0]
    checkpoints.convert(str(tmp_path))
    config["checkpoint"] = {"load_universal": True}
    results = ranks(3).run(checkpoints.load_and_go_on, config=config, windows=3, first_window=3, **common)
    for state, record in results:
        assert checkpoints.same_state(state, saved)
        assert record["replicas"] == results[0][1]["replicas"], "the ranks stand at the same weights"


# ---- bytes and memory


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.full)])
def test_bytes_of_a_step(ranks, world_size, capsys):
    steps, numel, moved = 3, 2**20, {}
    for name, params in {
        "one RS+AG": {"schedule": "sync"},
        "sync": {"schedule": "sync", "commit_comm": "int8"},
        "acco, int4": {"schedule": "acco", "estimate_comm": "int4", "commit_comm": "int8"},
    }.items():
        config = training.ds_config(2, precision="bf16", **params)
        moved[name] = ranks(world_size).run(quantized.bytes_of_steps, config=config, steps=steps, numel=numel)[0]
    with capsys.disabled():
        print(f"\n{world_size} ranks, {steps} steps, (bytes on the interface, bytes counted): {moved}")
    whole, codes = moved["one RS+AG"][1], 2 / 256
    commit = (BITS.gradient / 8 + BITS.change / 8 + 2 * codes) / 4
    assert moved["sync"][1] / whole == pytest.approx(commit, rel=3e-3)
    assert moved["acco, int4"][1] / whole == pytest.approx(commit + (1 + 2 * codes) / 4, rel=3e-3)
    assert moved["acco, int4"][0] <= 0.77 * moved["one RS+AG"][0]


def _own_bytes(config):
    import deepspeed

    from deepspeed_acco.tools.launch.emulated_accelerator import EmulatedAccelerator

    module = EmulatedAccelerator(2**18, 0.0).bfloat16()
    engine, *_ = deepspeed.initialize(model=module, model_parameters=list(module.parameters()), config=config)
    engine.backward(engine())
    own = engine.optimizer.own_bytes()
    engine.destroy()
    return own


@pytest.mark.parametrize(("schedule", "more"), [("acco", 0.0), ("sync", 0.0), ("local", 2.0 + 4 / 256)])
def test_the_buffer_has_one_byte_a_parameter(ranks, schedule, more):
    params = {"estimate_comm": "int4"} if schedule == "acco" else {}
    config = training.ds_config(2, precision="bf16", schedule=schedule, commit_comm="int8", **params)
    own, numel = ranks(2).run(_own_bytes, config=config)[0], 2**18
    accumulated, x, reduced, held = 2.0, 1 + 2 / 256, 4 / 2, 2 / 2
    assert own / numel == pytest.approx(accumulated + x + reduced + held + more, rel=1e-3)


# ---- adaptive windows


@pytest.mark.full
def test_adaptive_windows_in_the_reference(ranks):
    config = adaptive.ds_config(4, 2.0, estimate_comm="int4", commit_comm="int8")
    speeds = [{"slowness": [1]}, {"slowness": [4, 1, 2]}]
    records = ranks(2).run(adaptive.train, per_rank=speeds, config=config, windows=12)
    size = sum(param.numel() for param in training.param_groups(training.make_network(), 1))
    reference = adaptive.replay(
        records[0],
        "acco",
        2,
        4,
        2,
        clip=2.0,
        estimate_bits=4,
        commit_bits=COMMIT_BITS,
        shard_numels=[-(-size // 4) * 2],
    )
    adaptive.check(records, reference, tolerance=1e-3)


@pytest.mark.full
def test_drift(ranks):
    """After many small steps the weights that all ranks hold are near the masters, everywhere."""
    config = training.ds_config(2, precision="bf16", schedule="acco", estimate_comm="int4", commit_comm="int8")
    config["optimizer"]["params"]["lr"] = 1e-4
    record = ranks(2).run(quantized.train_wide, config=config, windows=60, precision="bf16")[0]
    for shown, master in zip(record["after_destroy"], record["weights"]):
        ulp = torch.ldexp(torch.ones_like(master), torch.frexp(shown.float())[1] - 8)
        # Of a block's largest change: what rounding kept back, and a few steps.
        level = (ulp.max() / 2 + 4e-4) / 7
        assert ((shown.float() - master).abs() <= ulp / 2 + level / 2).all()
