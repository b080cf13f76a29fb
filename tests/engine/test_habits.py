"""What users do to the weights and the loop, and ZeRO-1 bears: weights written into the module, replaced storages,
several passes in a micro-batch, training in eval mode or through a part of the module."""

import pytest
import torch

from tests.support import oracle, training

pytestmark = pytest.mark.timeout(240)

SCHEDULES = ("acco", "local", "wp", "sync")  # dpu rounds as local does
N = 4


def _vector(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _trainable(engine):
    return [param for param in engine.module.parameters() if param.requires_grad]


def _evaluated(engine):
    engine.eval()
    with torch.no_grad():
        loss = engine(*training.batch(77, 0, 0))
    engine.train()
    return loss.item()


def _loss_at(weights):
    """The same evaluation, of a network with these weights."""
    module = training.make_network()
    with torch.no_grad():
        for param, value in zip([p for p in module.parameters() if p.requires_grad], weights):
            param.copy_(value)
        return module(*training.batch(77, 0, 0)).item()


def _stock(n):
    config = training.ds_config(n)
    config["optimizer"] = {"type": "AdamW", "params": {**training.HYPER, "torch_adam": True}}
    return config


# ---- weights that the user writes


def _swap(config, windows, swaps, restores=True, first_look=False):
    """Trains; from window 2 on an average is swapped in after every second micro-batch, looked at and swapped out. With
    ZeRO-1, too, the looks change nothing."""
    import torch.distributed as dist

    engine = training.start_engine(config)
    average, losses, found = [p.detach().clone() for p in _trainable(engine)], [], []
    for window in range(windows):
        for micro_batch in range(N):
            loss = engine(*training.batch(dist.get_rank(), window, micro_batch))
            losses.append(loss.item())
            engine.backward(loss)
            engine.step()
            for mean, param in zip(average, _trainable(engine)):
                mean.mul_(0.9).add_(param.detach(), alpha=0.1)
            if not swaps or window < 2 or micro_batch % 2:
                continue
            if first_look:
                _evaluated(engine)
            kept = [param.detach().clone() for param in _trainable(engine)]
            for param, mean in zip(_trainable(engine), average):
                param.data.copy_(mean)
            names = [name for name, param in engine.module.named_parameters() if param.requires_grad]
            state = engine.module.state_dict()
            found.append(
                (
                    _evaluated(engine) - _loss_at(average),
                    float((_vector([state[name] for name in names]) - _vector(average)).abs().max()),
                )
            )
            if restores:
                for param, value in zip(_trainable(engine), kept):
                    param.data.copy_(value)
    weights = engine.module.state_dict()
    ended = [weights[name].tolist() for name, param in engine.module.named_parameters() if param.requires_grad]
    engine.destroy()
    return losses, found, ended


CONFIGS = [
    *((dict(schedule=schedule), 2) for schedule in SCHEDULES),
    (dict(estimate_comm="int4"), 2),
    (dict(ranks_per_host=2), 4),
]


@pytest.mark.parametrize(("params", "world_size"), CONFIGS)
@pytest.mark.parametrize("first_look", [False, True])
def test_an_average_that_is_swapped_in_is_what_looks_show_and_swapped_out_changes_nothing(
    ranks, params, world_size, first_look
):
    config = training.ds_config(N, **params)
    plain = ranks(world_size).run(_swap, config=config, windows=5, swaps=False)
    swapped = ranks(world_size).run(_swap, config=config, windows=5, swaps=True, first_look=first_look)
    for (losses, _, weights), (same_losses, found, same_weights) in zip(plain, swapped):
        assert same_losses == losses and same_weights == weights
        for evaluated, stated in found:
            assert abs(evaluated) < 1e-6 and stated == 0


@pytest.mark.parametrize("first_look", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_not_swapped_out_is_overwritten_by_the_masters(ranks, schedule, first_look):
    """As in ZeRO-1, whose losses those of sync are; the others go on and still learn."""
    arguments = dict(windows=8, swaps=True, restores=False, first_look=first_look)
    losses = ranks(2).run(_swap, config=training.ds_config(N, schedule=schedule), **arguments)[0][0]
    if schedule == "sync":
        stock = ranks(2).run(_swap, config=_stock(N), **arguments)[0][0]
        assert losses == pytest.approx(stock, rel=1e-5)
    assert sum(losses[-N:]) < 0.8 * sum(losses[:N])


# ---- storages that are replaced


def _attack_and_restore(engine, micro_batch):
    weight = engine.module.first.weight
    kept = weight.data.clone()
    weight.data.add_(0.01 * weight.data.sign())
    weight.data = kept


def _there_and_back(engine, micro_batch):
    engine.module.double()
    engine.module.float()


def _replaced(config, windows, how):
    import torch.distributed as dist

    engine, losses = training.start_engine(config), []
    for window in range(windows):
        for micro_batch in range(N):
            loss = engine(*training.batch(dist.get_rank(), window, micro_batch))
            losses.append(loss.item())
            engine.backward(loss)
            # In mid-window the gradients so far lie in a storage that is replaced as well.
            if how is not None and window == 2 and micro_batch == 1:
                globals()[how](engine, micro_batch)
            engine.step()
    weights = training.live_weights(engine)
    engine.destroy()
    return losses, [weight.tolist() for weight in weights]


@pytest.mark.parametrize("how", ["_attack_and_restore", "_there_and_back"])
@pytest.mark.parametrize(
    ("schedule", "precision"), [("acco", "fp32"), ("wp", "fp32"), ("dpu", "fp32"), ("sync", "fp32")]
)
def test_a_replaced_storage_is_bound_again(ranks, schedule, precision, how):
    """Values that are the same leave the trajectory as it is, bit for bit, but for phase B's two micro-batches of acco:
    there the replaced weights stay until the step, as in ZeRO-1."""
    config = training.ds_config(N, schedule=schedule)
    plain, replaced = (ranks(2).run(_replaced, config=config, windows=6, how=kind)[0] for kind in (None, how))
    assert replaced == plain


# ---- several passes in a micro-batch


def _passes(config, windows, passes):
    """Every micro-batch in several forwards and backwards of parts of its loss."""
    import torch.distributed as dist

    engine = training.start_engine(config)
    for window in range(windows):
        for micro_batch in range(N):
            for _ in range(passes):
                engine.backward(engine(*training.batch(dist.get_rank(), window, micro_batch)) / passes)
            engine.step()
    weights = training.true_master_weights(engine)
    engine.destroy()
    return weights


@pytest.mark.parametrize(
    "params", [dict(schedule=s) for s in SCHEDULES] + [dict(accumulation="adaptive", max_window=N)]
)
def test_passes_before_one_step_are_one_micro_batch(ranks, params):
    weights = ranks(2).run(_passes, config=training.ds_config(N, **params), windows=8, passes=2)[0]
    schedule = params.get("schedule", "acco")
    reference = oracle.run_reference(schedule=schedule, world_size=2, windows=8, n=N, a=2)
    assert oracle.distance(weights, reference["weights"]) < 1e-5


def _weights_of_both_passes(config):
    engine, pairs = training.start_engine(config), []
    for window in range(3):
        for micro_batch in range(N):
            pair = []
            for _ in range(2):
                loss = engine(*training.batch(0, window, micro_batch))
                pair.append(_vector(_trainable(engine)))
                engine.backward(loss)
            pairs.append(pair)
            engine.step()
    engine.destroy()
    return all(first.equal(second) for first, second in pairs)


@pytest.mark.parametrize("schedule", ["acco", "wp"])
def test_weights_stay_between_two_passes(ranks, schedule):
    assert ranks(1).run(_weights_of_both_passes, config=training.ds_config(N, schedule=schedule)) == [True]


def _with_saliency(config, windows, looks):
    """Gradients of an evaluation with regard to its input, between two micro-batches."""
    import torch.distributed as dist

    engine = training.start_engine(config)
    for window in range(windows):
        for micro_batch in range(N):
            engine.backward(engine(*training.batch(dist.get_rank(), window, micro_batch)))
            engine.step()
            if looks and micro_batch < 3:
                x, y = training.batch(77, window, micro_batch)
                engine.eval()
                x.requires_grad_()
                torch.autograd.grad(engine(x, y), x)
                engine.train()
    weights = training.true_master_weights(engine)
    engine.destroy()
    return [weight.tolist() for weight in weights]


@pytest.mark.parametrize("params", [dict(schedule="acco"), dict(schedule="wp")])
def test_gradients_of_an_evaluation_change_nothing(ranks, params):
    config = training.ds_config(N, **params)
    plain, looked_at = (ranks(2).run(_with_saliency, config=config, windows=5, looks=looks) for looks in (False, True))
    assert looked_at == plain


# ---- training that the root's hook does not see as such


def _loss_through_parts(module, x, y):
    """What the module's own forward gives, without a call of it."""
    h = torch.tanh(module.first(x))
    h = torch.tanh(module.again(torch.tanh(module.middle(h))) + module.frozen.sum())
    return (module.last(h) - y).square().mean()


def _train_by(config, windows, way):
    import torch.distributed as dist

    engine = training.start_engine(config)
    losses, phases = [], []
    for window in range(windows):
        for micro_batch in range(N):
            if way == "eval mode":
                engine.eval()
            x, y = training.batch(dist.get_rank(), window, micro_batch)
            loss = _loss_through_parts(engine.module, x, y) if way == "parts" else engine(x, y)
            losses.append(loss.item())
            phases.append(engine.optimizer.position.phase.name)
            engine.backward(loss)
            engine.step()
            if micro_batch == 2:  # an evaluation, after which training stands where it stood
                losses.append(_evaluated(engine))
    weights = training.true_master_weights(engine)
    steps = engine.global_steps
    engine.destroy()
    return losses, phases, steps, [weight.tolist() for weight in weights]


@pytest.mark.parametrize("way", ["eval mode", "parts"])
@pytest.mark.parametrize(
    "params",
    [dict(schedule="acco"), dict(schedule="wp"), dict(schedule="dpu"), dict(accumulation="adaptive", max_window=N)],
)
def test_training_in_eval_mode_or_through_parts_is_training(ranks, params, way):
    config = training.ds_config(N, **params)
    plain, other = (ranks(2).run(_train_by, config=config, windows=5, way=kind)[0] for kind in ("plain", way))
    assert other == plain
    assert plain[2] == 5
    assert ("B" in plain[1]) == (params.get("schedule", "acco") == "acco"), "rounds must have run behind two phases"


# ---- sync and ZeRO-1


def _train_with(config, habit):
    """Six windows with a habit in each; returns the losses, the module's weights at the end and the skipped steps."""
    import torch.distributed as dist

    engine, losses = training.start_engine(config), []
    for window in range(6):
        for micro_batch in range(N):
            x, y = training.batch(dist.get_rank(), window, micro_batch)
            if habit == "eval mode":
                engine.eval()
            passes = 2 if habit == "two passes" else 1
            for number in range(passes):
                loss = _loss_through_parts(engine.module, x, y) if habit == "parts" else engine(x, y)
                if number == 0:
                    losses.append(loss.item())
                is_spoiled = habit == "NaN" and (window, micro_batch) == (2, 1)
                engine.backward(loss * float("nan") if is_spoiled else loss / passes)
            if habit in globals() and (window, micro_batch) == (2, 1):
                globals()[habit](engine, micro_batch)
            engine.step()
            if habit == "saliency":
                probe = training.batch(77, window, micro_batch)[0].requires_grad_()
                engine.eval()
                torch.autograd.grad(engine(probe, y), probe)
                engine.train()
    losses.append(_evaluated(engine))
    return losses, _vector(_trainable(engine)), engine.skipped_steps


@pytest.mark.parametrize(
    "habit", ["_attack_and_restore", "_there_and_back", "two passes", "eval mode", "parts", "saliency", "NaN"]
)
def test_sync_is_as_zero_1(ranks, habit):
    """Where DeepSpeed's own reduces once for every backward at the end of a window, and so some gradients twice, sync
    is as ZeRO-1 without the habit: neither changes the sum of the gradients."""
    ours = ranks(2).run(_train_with, config=training.ds_config(N, schedule="sync"), habit=habit)[0]
    is_doubled_there = habit in ("two passes", "saliency")
    stock = ranks(2).run(_train_with, config=_stock(N), habit=None if is_doubled_there else habit)[0]
    assert ours[0] == pytest.approx(stock[0], rel=1e-5)
    assert (ours[1] - stock[1]).norm() < 1e-5 * stock[1].norm()
    assert ours[2] == stock[2] == (habit == "NaN")


# ---- a second engine on the same module


def _trained_twice(config, following, destroys):
    """Trains a module, gives it its first weights back and trains it with another engine, as for the next fold."""
    import deepspeed
    import torch.distributed as dist

    def engine_of(settings):
        return deepspeed.initialize(model=module, model_parameters=training.param_groups(module, 1), config=settings)[0]

    module = training.make_network()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    former = None
    if destroys is not None:
        former = engine_of(config)
        training.run_windows(former, 3)
        if destroys:
            former.destroy()
        module.load_state_dict(start)
    engine = engine_of(following)
    losses = training.run_windows(engine, 4)["losses"]
    end = {name: value.tolist() for name, value in engine.module.state_dict().items()}
    engine.destroy()
    if former is not None:
        former.destroy()
    dist.barrier()
    return losses, end


@pytest.mark.parametrize("following", ["ACCO", "AdamW"])
@pytest.mark.parametrize("schedule", ["acco", "wp"])
def test_an_engine_that_was_not_destroyed_does_nothing_to_the_next(ranks, schedule, following):
    config = training.ds_config(N, schedule=schedule)
    next_config = config if following == "ACCO" else _stock(N)
    fresh, *others = (
        ranks(2).run(_trained_twice, config=config, following=next_config, destroys=destroys)
        for destroys in (None, True, False)
    )
    for other in others:
        assert other == fresh
