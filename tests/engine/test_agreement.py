"""Ranks that would not train the same are an error on all of them, with the name of what differs and both values."""

import os
from unittest import mock

import pytest

from tests.support import training
from tests.support.ranks import RankPool

pytestmark = pytest.mark.timeout(240)

PLAIN = training.ds_config(4)


def _start(config, changes=None, kernels=None, version=None, groups=1, rename=False):
    """Starts an engine with what the JSON and the arguments say; returns the error."""
    import deepspeed

    import deepspeed_acco

    config = {**config, **(changes or {})}
    module = training.make_network()
    if rename:
        module.last, module.end = None, module.last
    environment = {} if kernels is None else {"DEEPSPEED_ACCO_KERNELS": kernels}
    with mock.patch.dict(os.environ, environment), mock.patch.object(deepspeed_acco, "__version__", version or "1"):
        try:
            deepspeed.initialize(model=module, model_parameters=training.param_groups(module, groups), config=config)
        except RuntimeError as error:
            return str(error)
    return "no error"


def _params(**params):
    return {"optimizer": {"type": "ACCO", "params": {**training.HYPER, **params}}}


DIFFERENCES = {  # name in the error: what one rank has otherwise
    "parameter group 0": dict(changes=_params(lr=3e-3)),
    "parameter group 0 ": dict(changes=_params(betas=[0.8, 0.9])),
    " parameter group 0": dict(changes=_params(weight_decay=0.2)),
    "optimizer.params": dict(changes=_params(estimate_fraction=0.75)),
    "optimizer.params.ranks_per_host": dict(changes=_params(ranks_per_host=1)),
    "train_micro_batch_size_per_gpu": dict(changes={"train_micro_batch_size_per_gpu": 2}),
    "gradient_accumulation_steps": dict(changes={"gradient_accumulation_steps": 2}),
    "gradient_clipping": dict(changes={"gradient_clipping": 0.5}),
    "prescale_gradients": dict(changes={"prescale_gradients": True}),
    "gradient_predivide_factor": dict(changes={"gradient_predivide_factor": 2.0}),
    "round_robin_gradients": dict(changes={"zero_optimization": {"stage": 1, "round_robin_gradients": True}}),
    "scheduler": dict(changes={"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}}}),
    "versions": dict(version="2"),
    "parameters of group 0": dict(rename=True),
    "parameter group 1": dict(groups=2),
}
# From a JSON in which every rank predicts for itself: nothing is sent before the ranks were compared.
DIFFERENCES_OF_LOCAL = {
    "optimizer.params": dict(changes={"gradient_accumulation_steps": 2}),  # "auto" is another schedule there
    "parameter group 1": dict(groups=2),
}


@pytest.mark.distributed
def test_what_one_rank_has_otherwise_is_named():
    pool = RankPool(3)
    try:
        local, cases = training.ds_config(1), [(PLAIN, *case) for case in DIFFERENCES.items()]
        assert {*pool.run(_start, config=PLAIN), *pool.run(_start, config=local)} == {"no error"}
        for config, name, difference in [*cases, *((local, *case) for case in DIFFERENCES_OF_LOCAL.items())]:
            messages = pool.run(_start, config=config, per_rank=[{}, difference, {}])
            for message in messages:
                assert "ACCO: the data-parallel ranks differ" in message, (name, message)
                assert f"\n  {name.strip()}: " in message, (name, message)
                assert " on ranks 0, 2; " in message and " on ranks 1" in message, (name, message)
    finally:
        pool.close()


@pytest.mark.distributed
def test_another_choice_of_kernels_is_named(native):
    pool = RankPool(2)
    try:
        for message in pool.run(_start, config=PLAIN, per_rank=[{"kernels": "torch"}, {"kernels": "native"}]):
            assert "\n  kernels: 'torch' on ranks 0; 'native' on ranks 1" in message
    finally:
        pool.close()


def _train_with_other_rate(config, factor):
    """The rate is changed behind the optimizer's back after two steps, as a scheduler of one rank would."""
    import torch.distributed as dist

    from deepspeed_acco.runtime.lanes import RoundFailed

    engine = training.start_engine(config)
    try:
        for window in range(6):
            for micro_batch in range(2):
                engine.backward(engine(*training.batch(dist.get_rank(), window, micro_batch)))
                engine.step()
            if window == 1:
                engine.optimizer.param_groups[0]["lr"] *= factor
    except RoundFailed as error:
        return window, str(error)
    return "no error"


@pytest.mark.distributed
def test_a_learning_rate_that_differs_later_is_an_error():
    pool = RankPool(2)
    try:
        config = training.ds_config(2, comm_timeout_s=6)
        pool.start(_train_with_other_rate, config=config, per_rank=[{"factor": 1.0}, {"factor": 1.5}])
        for window, message in pool.collect(limit_s=60):
            assert window in (2, 3) and "their learning rates or other hyper-parameters differ" in message
    finally:
        pool.close()
