"""Ways in which training could go wrong without a word."""

import json
import os
import time
from concurrent.futures import Future

import pytest
import torch

from tests.support import faults, oracle, training
from tests.support.ranks import RankPool

pytestmark = pytest.mark.timeout(240)


def _uneven_windows(config, counts):
    import torch.distributed as dist

    from deepspeed_acco.runtime.lanes import RoundFailed

    engine = training.start_engine(config)
    try:
        for window, count in enumerate(counts):
            for micro_batch in range(count):
                engine.set_gradient_accumulation_boundary(micro_batch == count - 1)
                engine.backward(engine(*training.batch(dist.get_rank(), window, micro_batch)))
            engine.step()
        training.true_master_weights(engine)
    except RoundFailed as error:
        return str(error)
    return "no error"


@pytest.mark.distributed
@pytest.mark.parametrize("counts", [([4, 2, 4], [4, 3, 4]), ([4, 1, 4, 4], [4, 4, 4, 4])])
def test_ranks_in_different_rounds_are_an_error(counts):
    """One rank issues a COMMIT where the other issues an ESTIMATE: sizes match, and the sum would be nonsense."""
    pool = RankPool(2)
    try:
        per_rank = [{"counts": list(rank_counts)} for rank_counts in counts]
        pool.start(_uneven_windows, per_rank=per_rank, config=training.ds_config(4, comm_timeout_s=6))
        messages = pool.collect(limit_s=90)
        assert any("the ranks are in different rounds" in message for message in messages), messages
        assert all("round" in message for message in messages)
    finally:
        pool.close()


def _large_gradients():
    """Sums that fp32 holds and fp16 does not."""
    engine = training.start_engine(training.ds_config(4, precision="fp16+fp32"))
    scales = [engine.optimizer.cur_scale]
    for _ in range(12):
        for _ in range(4):
            x, y = training.batch(0, 0, 0)
            engine.backward(engine(x.half(), (y * 30).half()))
            engine.step()
        scales.append(engine.optimizer.cur_scale)
    skipped = engine.skipped_steps
    engine.destroy()
    return scales, skipped


def test_fp16_sums_that_do_not_fit_lower_the_loss_scale(ranks):
    scales, skipped = ranks(1).run(_large_gradients)[0]
    assert scales[-1] <= scales[0] / 16, "every window that is skipped must lower the scale"
    assert 4 <= skipped < 12


def _full_state(config, windows):
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_full_fp32_param

    engine = training.start_engine(config)
    names = ("exp_avg", "exp_avg_sq")
    for window in range(windows):
        for micro_batch in range(4):
            engine.backward(engine(*training.batch(dist.get_rank(), window, micro_batch)))
            engine.step()
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    weights = [safe_get_full_fp32_param(p).clone() for p in parameters]  # a COMMIT is in flight
    states = {name: [safe_get_full_optimizer_state(p, name).clone() for p in parameters] for name in names}
    for p in parameters:
        safe_set_full_fp32_param(p, safe_get_full_fp32_param(p) * 2)
    doubled = [safe_get_full_fp32_param(p).clone() for p in parameters]
    engine.destroy()
    return weights, states, doubled


@pytest.mark.parametrize("schedule", ["acco", "local", "wp"])
def test_safe_get_and_set_wait_for_the_round(ranks, schedule):
    weights, states, doubled = ranks(2).run(_full_state, config=training.ds_config(4, schedule=schedule), windows=4)[0]
    kept = []
    reference = oracle.run_reference(
        schedule=schedule,
        world_size=2,
        windows=4,
        n=4,
        a=2,
        keep=lambda run, report: kept.append((run.exp_avg[0].clone(), run.exp_avg_sq[0].clone())),
    )
    assert oracle.distance(weights, reference["weights"]) < 1e-5
    for name, expected in zip(("exp_avg", "exp_avg_sq"), kept[-1]):
        mine = oracle.flatten(states[name]).double()
        assert float((mine - expected).norm() / expected.norm()) < 1e-5, name
    assert all(twice.equal(once * 2) for once, twice in zip(weights, doubled))


def _module_that_returns_a_parameter():
    """And a record that is no tuple; neither may trip or escape the guard."""
    import dataclasses

    import deepspeed

    @dataclasses.dataclass
    class Record:
        loss: torch.Tensor
        scale: torch.Tensor

    class Returning(training.Network):
        def forward(self, x, y):
            return Record(super().forward(x, y), self.unused)

    torch.manual_seed(5)
    module = Returning()
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=training.param_groups(module, 1), config=training.ds_config(2)
    )
    for window in range(4):
        for micro_batch in range(2):
            record = engine(*training.batch(0, window, micro_batch))
            engine.backward(record.loss + 0 * record.scale.sum())
            engine.step()
    first = engine(*training.batch(0, 5, 0))
    second = engine(*training.batch(0, 5, 1))
    engine.backward(first.loss)
    engine.step()
    engine(*training.batch(0, 5, 2))
    try:
        engine.backward(second.loss)
    except RuntimeError as error:
        return str(error)
    finally:
        engine.destroy()
    return "no error"


def test_what_a_module_returns(ranks):
    assert "weights changed" in ranks(1).run(_module_that_returns_a_parameter)[0]


def _collected_inside_a_round():
    """The garbage collector may find an engine on the worker thread of its own round."""
    import gc

    import torch.distributed as dist

    from deepspeed_acco.runtime.communicator import Communicator

    engine = training.start_engine(training.ds_config(2))
    collected = []

    def collecting(gather, _, *args, **options):
        gc.collect()
        gather(*args, **options)
        collected.append(True)

    with faults.around(Communicator, "all_gather", collecting):
        for micro_batch in range(2):
            engine.backward(engine(*training.batch(dist.get_rank(), 0, micro_batch)))
            engine.step()
        engine.itself = engine
        del engine
        gc.collect()
        deadline = time.monotonic() + 30
        while len(collected) < 2 and time.monotonic() < deadline:  # an ESTIMATE and a COMMIT
            time.sleep(0.01)
    return "reached" if len(collected) == 2 else "no round ended"


def test_an_engine_collected_inside_its_round(ranks):
    assert ranks(2).run(_collected_inside_a_round) == ["reached"] * 2


def _interrupted_wait():
    """Ctrl-C while training waits: the wait can be repeated, for a last checkpoint, say."""
    import torch.distributed as dist

    engine = training.start_engine(training.ds_config(2))
    for micro_batch in range(2):
        engine.backward(engine(*training.batch(dist.get_rank(), 0, micro_batch)))
        engine.step()

    def interrupted(*_):
        raise KeyboardInterrupt

    with faults.around(Future, "result", interrupted), pytest.raises(KeyboardInterrupt):
        engine.module.state_dict()
    weights = training.true_master_weights(engine)
    engine.destroy()
    return weights


def test_an_interrupted_wait_can_be_repeated(ranks):
    weights = ranks(2).run(_interrupted_wait)[0]
    reference = oracle.run_reference(schedule="acco", world_size=2, windows=1, n=2, a=1)
    assert oracle.distance(weights, reference["weights"]) < 1e-5


def _config_as_a_file(path):
    import deepspeed

    import deepspeed_acco  # noqa: F401

    module = training.make_network()
    try:
        deepspeed.initialize(model=module, model_parameters=training.param_groups(module, 1), config=path)
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_config_file_is_refused_like_a_dictionary(ranks, tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(training.ds_config(4) | {"amp": {"enabled": True}}))
    assert "amp.enabled = True is not allowed" in ranks(1).run(_config_as_a_file, path=str(path))[0]


def _inside_true_weights():
    import deepspeed_acco

    engine = training.start_engine(training.ds_config(2))
    try:
        with deepspeed_acco.true_weights(engine):
            engine(*training.batch(0, 0, 0))
    except RuntimeError as error:
        return str(error)
    finally:
        engine.destroy()
    return "no error"


def test_training_inside_true_weights_is_refused(ranks):
    assert "a training forward inside true_weights()" in ranks(1).run(_inside_true_weights)[0]


def _continue_from_a_checkpoint(folder, config, windows):
    """Trains, saves, goes on; then loads into a fresh engine, whose true weights are those of the save."""
    engine = training.start_engine(config)
    training.run_windows(engine, windows)
    engine.save_16bit_model(folder, "model.bin")
    engine.save_checkpoint(folder)
    saved = training.true_master_weights(engine)
    in_file = torch.load(os.path.join(folder, "model.bin"))
    names = [name for name, p in engine.module.named_parameters() if p.requires_grad]
    assert all(in_file[name].equal(tensor) for name, tensor in zip(names, saved))
    kept = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
    training.run_windows(engine, 2, first_window=windows)
    engine.destroy()
    fresh = training.start_engine(config, seed=9)
    training.run_windows(fresh, 1)
    fresh.load_checkpoint(folder)
    live, loaded = training.live_weights(fresh), training.true_master_weights(fresh)
    same = all(tensor.equal(kept[name]) for name, tensor in fresh.module.state_dict().items())
    after = training.run_windows(fresh, 3, first_window=windows)
    fresh.destroy()
    return saved, loaded, live, same, after["losses"]


@pytest.mark.parametrize("schedule", ["acco", "local", "wp", "dpu", "sync"])
def test_a_loaded_checkpoint_shows_the_true_weights(ranks, schedule, tmp_path):
    config = training.ds_config(4, schedule=schedule)
    results = ranks(2).run(_continue_from_a_checkpoint, folder=str(tmp_path), config=config, windows=4)
    reference = oracle.run_reference(schedule=schedule, world_size=2, windows=4, n=4, a=2)
    for saved, loaded, live, same, losses in results:
        assert oracle.distance(saved, reference["weights"]) < 1e-5
        assert same
        for mine, before, shown in zip(loaded, saved, live):
            assert mine.equal(before) and shown.equal(before)
        assert all(loss == loss and loss < 10 for loss in losses)
