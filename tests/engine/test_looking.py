"""Which weights the user sees (true ones wherever somebody looks), and that looking never changes the trajectory."""

import itertools

import pytest
import torch

from tests.support import oracle, training

pytestmark = pytest.mark.timeout(300)
SCHEDULES = ("acco", "local", "wp", "dpu", "sync")
EXACT = ("losses", "norms", "replicas", "skipped")


LANES_AND_LOOKS = [
    ("acco", "fp32"),
    ("acco", "bf16"),
    ("wp", "bf16+fp32"),
    ("local", "bf16"),
    ("sync", "bf16"),
]


@pytest.mark.parametrize(
    ("schedule", "precision"),
    [
        pytest.param(*case, marks=() if case in LANES_AND_LOOKS else pytest.mark.full)
        for case in itertools.product(SCHEDULES, ("fp32", "bf16", "bf16+fp32"))
    ],
)
def test_lanes_and_looks_give_the_same_bits(ranks, schedule, precision):
    def run(lane, look):
        config = training.ds_config(4, 2.0, precision=precision, schedule=schedule, lane=lane)
        return ranks(2).run(training.train, config=config, windows=15, precision=precision, look=look)

    expected = run("inline", None)
    for lane, look in (("auto", None), ("inline", "look_in_every_way"), ("auto", "look_in_every_way")):
        for mine, theirs in zip(run(lane, look), expected):
            for key in EXACT:
                assert mine[key] == theirs[key], (lane, look, key)
            for key in ("weights", "live", "after_destroy"):
                assert all(a.equal(b) for a, b in zip(mine[key], theirs[key])), (lane, look, key)


def _watch(config, windows):
    """Records the weights that each kind of look gives at each moment."""
    import torch.distributed as dist

    import deepspeed_acco

    engine = training.start_engine(config)
    names = [name for name, p in engine.module.named_parameters() if p.requires_grad]
    dtype = next(engine.module.parameters()).dtype
    seen = []

    def evaluated():
        engine.eval()
        kept = []
        handle = engine.module.first.register_forward_pre_hook(lambda *_: kept.append(training.live_weights(engine)))
        with torch.no_grad():
            engine(*training.batch(0, 0, 0, dtype))
        handle.remove()
        engine.train()
        return kept[0]

    def in_state_dict():
        state = engine.module.state_dict()
        return [state[name].clone() for name in names]

    def in_block():
        with deepspeed_acco.true_weights(engine):
            return training.live_weights(engine)

    for window in range(windows):
        for micro_batch in range(4):
            loss = engine(*training.batch(dist.get_rank(), window, micro_batch, dtype))
            trained_on = training.live_weights(engine)
            if config["optimizer"]["params"]["schedule"] == "wp":
                looks = {"block": in_block(), "eval": evaluated()}
            else:  # between forward and backward
                looks = {"state_dict": in_state_dict(), "block": in_block(), "eval": evaluated()}
            assert all(a.equal(b) for a, b in zip(training.live_weights(engine), trained_on))
            engine.backward(loss)
            looks |= {"eval after": evaluated(), "state_dict after": in_state_dict(), "block after": in_block()}
            engine.step()
            looks |= {"eval stepped": evaluated(), "state_dict stepped": in_state_dict()}
            seen.append({"window": window, "micro_batch": micro_batch, "trained_on": trained_on, **looks})
    engine.destroy()
    return seen


@pytest.mark.parametrize(
    ("schedule", "world_size", "ranks_per_host"),
    [
        *((schedule, 2, 1) for schedule in SCHEDULES if schedule != "dpu"),
        *(pytest.param(*case, marks=pytest.mark.full) for case in (("dpu", 2, 1), ("acco", 4, 2), ("wp", 4, 2))),
    ],
)
def test_every_look_shows_the_true_weights(ranks, schedule, world_size, ranks_per_host):
    windows = 5
    config = training.ds_config(4, schedule=schedule, ranks_per_host=ranks_per_host)
    seen = ranks(world_size).run(_watch, config=config, windows=windows)[0]
    trajectory = oracle.trajectory(schedule=schedule, world_size=world_size, windows=windows, n=4, a=2)
    for moment in seen:
        window, micro_batch = moment.pop("window"), moment.pop("micro_batch")
        phase_a, phase_b, true, following = trajectory[window]
        trained_on = phase_a if micro_batch < 2 else phase_b
        expected = {"trained_on": trained_on}
        for kind in moment:
            if kind != "trained_on":
                expected[kind] = following if "stepped" in kind and micro_batch == 3 else true
        for kind, weights in moment.items():
            for mine, theirs in zip(weights, expected[kind]):
                torch.testing.assert_close(
                    mine.double(), theirs, rtol=1e-5, atol=1e-6, msg=f"{kind} {window} {micro_batch}"
                )


def _rank_zero_looks_alone(config):
    import torch.distributed as dist

    engine = training.start_engine(config)
    for window in range(3):
        for micro_batch in range(4):
            engine.backward(engine(*training.batch(dist.get_rank(), window, micro_batch)))
            engine.step()
            if dist.get_rank() == 0:
                engine.module.state_dict()
    weights = training.true_master_weights(engine)
    engine.destroy()
    return weights


@pytest.mark.parametrize("schedule", ["acco", "dpu", "sync"])
def test_one_rank_may_look_alone(ranks, schedule):
    weights = ranks(2).run(_rank_zero_looks_alone, config=training.ds_config(4, schedule=schedule))[0]
    reference = oracle.run_reference(schedule=schedule, world_size=2, windows=3, n=4, a=2)
    assert oracle.distance(weights, reference["weights"]) < 1e-5


def test_one_rank_alone_in_wp_gets_an_error_that_says_so(ranks):
    from tests.support.ranks import RankPool

    pool = RankPool(2)
    config = training.ds_config(4, schedule="wp", comm_timeout_s=5)
    pool.start(_rank_zero_looks_alone, config=config)
    with pytest.raises(AssertionError, match="(?s)wp.*on every rank") as raised:
        pool.collect(limit_s=120)
    # The other rank is not killed by a message of another size: it, too, has a Python error.
    assert "died" not in str(raised.value)
    assert "another rank has ended, or did not answer" in str(raised.value).partition("rank 1: ")[2]


def _change_between_forward_and_backward():
    """Two forwards, one backward, a step and a forward that closes phase A, then the backward of the second graph."""
    engine = training.start_engine(training.ds_config(2))
    for window in range(2):
        for micro_batch in range(2):
            engine.backward(engine(*training.batch(0, window, micro_batch)))
            engine.step()
    first = engine(*training.batch(0, 2, 0))
    second = engine(*training.batch(0, 2, 1))
    engine.backward(first)
    engine.step()
    engine(*training.batch(0, 2, 2))  # phase A is over: the true weights are installed here
    try:
        engine.backward(second)
    except RuntimeError as error:
        return str(error)
    finally:
        engine.destroy()
    return "no error"


def test_weights_changed_under_a_graph_is_an_error(ranks):
    for message in ranks(1).run(_change_between_forward_and_backward):
        assert "weights changed between this forward and its backward" in message


def _two_backwards_of_one_forward(windows):
    import torch.distributed as dist

    engine = training.start_engine(training.ds_config(4))
    for window in range(windows):
        for micro_batch in range(4):
            loss = engine(*training.batch(dist.get_rank(), window, micro_batch))
            engine.backward(loss * 0.25, retain_graph=True)
            engine.backward(loss * 0.75)
            engine.step()
    weights = training.true_master_weights(engine)
    engine.destroy()
    return weights


def test_two_backwards_of_one_forward_count_once(ranks):
    weights = ranks(2).run(_two_backwards_of_one_forward, windows=8)[0]
    reference = oracle.run_reference(schedule="acco", world_size=2, windows=8, n=4, a=2)
    assert oracle.distance(weights, reference["weights"]) < 1e-5


def _two_engines():
    """Two engines in one process, their steps interleaved; a copy of one model is none of the engines' business."""
    import copy

    import torch.distributed as dist

    engines = [training.start_engine(training.ds_config(4, schedule=s), seed=5) for s in ("acco", "wp")]
    for window in range(5):
        for micro_batch in range(4):
            for engine in engines:
                engine.backward(engine(*training.batch(dist.get_rank(), window, micro_batch)))
                engine.step()
        average = copy.deepcopy(engines[0].module).eval()
        average(*training.batch(0, 0, 0))
        average.state_dict()
    weights = [training.true_master_weights(engine) for engine in engines]
    for engine in engines:
        engine.destroy()
        engine.destroy()
    return weights


def test_two_engines_in_one_process(ranks):
    acco, wp = ranks(2).run(_two_engines)[0]
    for weights, schedule in ((acco, "acco"), (wp, "wp")):
        reference = oracle.run_reference(schedule=schedule, world_size=2, windows=5, n=4, a=2)
        assert oracle.distance(weights, reference["weights"]) < 1e-5


def _user_zeroes_gradients(style, windows):
    """zero_grad by the user or a trainer drops the views into the accumulator; it must change nothing between windows,
    and in mid-window it drops what was accumulated."""
    import torch.distributed as dist

    engine = training.start_engine(training.ds_config(4))
    for window in range(windows):
        if style == "between":
            engine.module.zero_grad(set_to_none=True)
            engine.zero_grad()
        for micro_batch in range(4):
            loss = engine(*training.batch(dist.get_rank(), window, micro_batch))
            if style == "create_graph":  # autograd then accumulates out of place and replaces p.grad
                loss.backward(create_graph=True)
            else:
                engine.backward(loss)
            engine.step()
            if style == "mid" and micro_batch == 0:
                engine.zero_grad()
    weights = training.true_master_weights(engine)
    engine.destroy()
    return weights


@pytest.mark.parametrize("style", ["between", "create_graph"])
def test_dropped_views_change_nothing(ranks, style):
    weights = ranks(2).run(_user_zeroes_gradients, style=style, windows=6)[0]
    reference = oracle.run_reference(schedule="acco", world_size=2, windows=6, n=4, a=2)
    assert oracle.distance(weights, reference["weights"]) < 1e-5


def test_zero_grad_in_mid_window_drops_the_gradients(ranks):
    weights = ranks(2).run(_user_zeroes_gradients, style="mid", windows=6)[0]
    reference = oracle.run_reference(
        schedule="acco", world_size=2, windows=6, n=4, a=2, drop=lambda micro_batch: micro_batch == 0
    )
    assert oracle.distance(weights, reference["weights"]) < 1e-5
