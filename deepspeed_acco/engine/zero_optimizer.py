# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Replaces the stepping of DeepSpeed's ZeRO-1 optimizer: engine events become calls on windows and rounds.

Partitioning, master weights, hp mapping and checkpoint layout are inherited (deepspeed/runtime/zero/stage_1_and_2.py).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from ..algorithm.schedules import SCHEDULES, Phase, Schedule, blocks_at_end, schedule_of_window
from ..algorithm.window import Position
from ..optim import native
from ..optim.adamw import AdamWShard
from ..optimizer import ACCO
from ..runtime.buffers import FlatBuffers
from ..runtime.clock import LaneTimes
from ..runtime.driver import RoundDriver
from ..runtime.lanes import make_lane
from ..runtime.layout import GroupLayout
from ..runtime.round_inputs import RoundInputs
from ..runtime.written import Fingerprint
from . import checkpoint_check, checkpoint_layers, checkpoint_state, owners, trainers
from .adaptive_windows import AdaptiveWindows
from .agreement import require_agreement, what_must_agree
from .auto_fraction import AutoFraction
from .bound_parameters import BoundParameters
from .checkpoint_model import LoadOptions
from .checks import require_one_dtype, require_own_batches
from .deepspeed_engine import Engine
from .fixed_windows import FixedWindows
from .forwards import Forwards
from .full_values import link_full_values
from .gradients import Gradients, GradientState
from .hosts import connect
from .log import logger
from .monitor import LANE_TIMERS, Monitor, lane_timers
from .progress import Progress
from .scaling import has_overflow, hyper_of, round_inputs
from .skipped_steps import SkippedSteps
from .tensor_parallel import repeated_spans
from .true_weights import TrueWeights


class AccoZeroOptimizer(DeepSpeedZeroOptimizer):
    """Trains as ZeRO-1 with ACCO's rounds. The engine builds it, with whatever arguments its DeepSpeed version passes.

    Attributes:
        settings: the validated :class:`~deepspeed_acco.settings.Settings`.
        windows: how long windows are, and what is counted of them; gone once destroyed.
        driver, looks: the rounds, and the looks at the true weights; gone once destroyed.
        gradients: the accumulated ones.
        divisor: by what the sum over the ranks is divided: their number, or 1 where sums are wanted.
        progress: where training stands in its window.
        lane: where the rounds run; its ``name`` is ``stream``, ``thread`` or ``inline``.
        levels: which data-parallel ranks share a host.
        origin: names run and rank in checkpoints.
        last_micro_batches: how many micro-batches this rank had in the window that ended last; 0 before the first.
    """

    _global_grad_norm: Any

    def __init__(self, init_optimizer: ACCO, *args, **kwargs):
        # The hooks that the parent makes report gradients here; it makes them only with one of these options.
        kwargs["contiguous_gradients"] = True
        kwargs["overlap_comm"] = False
        self._is_built = False
        super().__init__(init_optimizer, *args, **kwargs)
        # Without this attribute the engine itself refuses coalesce_grad_reduction(), which drives the parent's buckets.
        if hasattr(self, "_coalesce_grad_reduction"):
            del self._coalesce_grad_reduction
        self.torch_autocast_gradscaler = None  # another engine's: DeepSpeed keeps autocast's dtype for the process
        self.settings = init_optimizer.settings
        self.last_micro_batches = 0
        self.progress = Progress()
        self.divisor = 1.0

        live = self.bit16_groups_flat
        require_one_dtype(live)
        device = live[0].device
        native.prepare(device)  # may build the kernels, which takes longer than a collective may wait
        self.lane = make_lane(self.settings.lane, device)
        self._comm = connect(self, self.settings, device)
        self.levels = self._comm.levels
        self._buffers = FlatBuffers(
            live,
            [GroupLayout(flat.numel(), self.levels, self._comm.rank) for flat in live],
            self.gradient_accumulation_dtype,
            self.communication_data_type,
            self.settings.wire,
            SCHEDULES[self.settings.schedule].predicts_locally,
        )
        masters = self.single_partition_of_fp32_groups
        self._shards = [AdamWShard.fresh(master, self.optimizer.state[master]) for master in masters]
        self._bound = BoundParameters(self.bit16_groups, live)
        fingerprint = Fingerprint(live, self._bound.sampled_places(), sums=bool(self.settings.wire.commit.change))
        repeated = repeated_spans(self, self._bound, self._buffers.layouts)
        self.driver = RoundDriver(self._buffers, self._shards, self._comm, self.lane, fingerprint, repeated)
        self.driver.take_state(hyper_of(self), is_loaded=False)
        self._skips = SkippedSteps(self.driver.outcomes)
        self._fraction = AutoFraction(self.settings, self.driver, self._comm, self.lane)
        self.windows = (
            AdaptiveWindows(self.settings, self.driver, self._comm, self.lane, self._fraction)
            if self.settings.is_adaptive
            else FixedWindows(self._fraction)
        )
        # A script that ends without engine.destroy(): finish the round and leave the group while threads still work.
        self._at_exit = weakref.finalize(self, RoundDriver.close, self.driver)
        self.gradients = Gradients(self._bound.views_in(self._buffers.grads), self._buffers.grads)
        self.gradients.attach()
        self.looks = TrueWeights(self.driver, self._bound, lambda: self.position.is_graph_outstanding)
        self._is_built = True
        self._link_states()

    def _link_states(self):
        self._hp_optimizer_states_linked = False
        self._lazy_init_hp_params_optimizer_state()
        link_full_values(self, [param for group in self.bit16_groups for param in group])

    def _link_all_hp_params(self):
        super()._link_all_hp_params()
        if self._is_built:  # again, after a checkpoint was loaded
            self._link_states()

    # ---- attaching to the engine

    def attach(self, engine: Engine) -> None:
        """Puts the hooks on ``engine.module`` and takes over what only the engine knows; patches.py calls it once."""
        self._engine_ref = weakref.ref(engine)
        # Both are younger than the oldest supported DeepSpeed, which always takes the mean over all ranks.
        sequence_parallel = float(getattr(self, "sequence_parallel_size", 1))
        require_own_batches(self.settings, sequence_parallel)
        self.divisor = self._comm.world_size / sequence_parallel if getattr(self, "gradient_average", True) else 1.0
        self._monitor = Monitor(engine.monitor, self.driver.outcomes, self.lane)
        self.driver.measures_estimate = engine.monitor.enabled
        self.timers.get_timers().update(lane_timers(self.lane))  # of no effect without wall_clock_breakdown
        self._forwards = Forwards(
            engine.module, self.looks, self.progress, self._prepare_training_forward, engine.global_rank == 0
        )
        require_agreement(self._comm, what_must_agree(engine, self))
        owners.add(self)
        self.origin = checkpoint_state.origin(self._comm)

    def trains_any(self, parameters: list[torch.Tensor]) -> bool:
        """Tells whether any of these is one of its trainable parameters."""
        return self._is_built and any(map(self._bound.has, parameters))

    def _engine(self) -> Engine:
        engine = self._engine_ref()
        assert engine is not None, "only the engine calls what asks for it"
        return engine

    def own_bytes(self) -> int:
        """Returns the bytes that this rank holds beyond weights, master weights and Adam state."""
        return self._buffers.own_bytes()

    def lane_times(self) -> LaneTimes:
        """Returns how long the rounds took and how much of that training waited for, in seconds."""
        return self.lane.times()

    @property
    def wire_bytes(self) -> tuple[int, int]:
        """Returns the payload bytes that this rank (sent, received) in the finished rounds; what carries them is not
        counted."""
        return (self.driver.outcomes.wire_bytes,) * 2

    @property
    def estimate_fraction(self) -> float:
        """Returns the running window's fraction of phase A: as given, or what ``"auto"`` has come to."""
        return self._fraction.fraction

    # ---- gradients

    def create_gradient_handling_hooks(self):
        """Makes the parent's hook of every parameter only where it has something to do: where ``p.grad`` is a view of A
        autograd adds to A itself, and one check after the backward finds what was dropped.

        DeepSpeed versions that count these hooks to know when a backward has ended still get them.
        """
        is_view = self.gradient_accumulation_dtype == self.dtype
        if is_view and hasattr(DeepSpeedZeroOptimizer, "queue_post_backward_callback"):
            self._remaining_grad_acc_hooks = 0
        else:
            super().create_gradient_handling_hooks()

    def process_gradients(self, param, i):
        """Takes over a parameter's gradient, called by the parent's hook after each accumulation."""
        self.gradients.collect_from(param)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of the window so far. The engine calls this after each step, when there are none."""
        if self.gradients.state is GradientState.CLEAN:
            return
        self.windows.require_droppable(self.position.phase)
        self._clear_gradients()
        if not self.position.is_between_windows:
            if self.position.phase is Phase.B:
                self.driver.drain()  # the estimate was made of gradients that are gone
            self.progress.position = self.position.after_dropped_gradients()

    def _clear_gradients(self):
        self._buffers.clear_gradients()
        self.gradients.mark_packed()

    # ---- events of training

    @property
    def position(self) -> Position:
        """Returns where training stands in its window."""
        return self.progress.position

    def _schedule(self) -> Schedule:
        return schedule_of_window(self.settings.schedule, self.position.window, self.settings.overlap_warmup_steps)

    def _prepare_training_forward(self) -> None:
        """Comes before every forward that trains. In mid-window weights change here and nowhere else."""
        engine = self._engine()
        self.windows.require_plain_loop(engine)
        self.gradients.attach()
        self.progress.before_training_forward(engine)
        if self.position.micro_batches and self._is_phase_a_over():
            self._begin_phase_b()
        self.progress.position = self.position.after_forward()

    def _is_phase_a_over(self) -> bool:
        schedule, n = self._schedule(), self._engine().gradient_accumulation_steps()
        if not schedule.has_two_phases:
            return False
        limits = self.windows.limits(schedule, self.position, n)
        return self.position.is_phase_a_over(schedule, limits, self.driver.is_round_finished())

    def _begin_phase_b(self):
        self.progress.position = self.position.after_phase_a()
        in_a = self.position.micro_batches_in_a
        n = self._engine().gradient_accumulation_steps()
        inputs = self._inputs(self.windows.renormalize(in_a, n), in_a)
        self.driver.advance(self._schedule().at_phase_b, inputs, clears=False, blocks=False)
        self._bound.bind_again()

    def backward_prologue(self, *args, **kwargs) -> None:
        """Does nothing: the parent would allocate reduction buckets here (DeepSpeed <= 0.18.2)."""

    def reduce_gradients(self, pipeline_parallel=False) -> None:
        """Does nothing: rounds reduce."""

    def backward_epilogue(self, *args, **kwargs) -> None:
        """Notes a backward; called once after each, in every style of accumulation and version of DeepSpeed."""
        engine = self._engine()
        self.gradients.collect()
        brought_gradients = self.gradients.take_whether_changed()
        self._forwards.after_backward(self.position.is_graph_outstanding, brought_gradients)
        self.progress.after_backward(engine, brought_gradients)
        self.windows.require_plain_loop(engine)
        self.windows.after_backward(engine, self._schedule(), self.position)
        if engine.is_gradient_accumulation_boundary() and not engine.inside_no_sync_ctxt:
            self.gradients.take()

    def step(self, closure=None) -> None:
        """Ends a window: starts its COMMIT and installs what training goes on with.

        The engine reads ``overflow`` and ``_global_grad_norm`` right after. The norm is the newest finished COMMIT's.
        """
        driver, engine = self.driver, self._engine()
        self.progress.count_steps(engine)
        schedule, position = self._schedule(), self.position
        micro_batches = position.started_micro_batches
        self.gradients.take()
        inputs = self._inputs(1.0, micro_batches)
        n, logs = engine.gradient_accumulation_steps(), engine.global_rank == 0
        self._fraction.at_window_end(position.window, n, micro_batches, logs=logs)
        self.overflow = self.dtype == torch.float16 and has_overflow(self, self._buffers.grads)
        self._update_scale(self.overflow)
        blocks = blocks_at_end(schedule, position.phase)
        if self.overflow:
            driver.drain()
            self._buffers.clear_gradients()
            self._monitor.note_no_commit()
            self._global_grad_norm = float("inf")
        else:
            driver.advance(schedule.at_window_end, inputs, clears=True, blocks=blocks)
            self._global_grad_norm = trainers.norm_to_tell(driver)
        self._bound.bind_again()
        self.gradients.mark_packed()
        if self._skips.at_step(engine, blocks and not self.overflow):
            self.overflow, self._global_grad_norm = True, float("inf")
        if not getattr(self, "compute_grad_norm", True):
            self._global_grad_norm = None
        self.last_micro_batches = micro_batches
        self.progress.after_window(engine)
        self.timers.log(LANE_TIMERS)

    def begin_phase_b_without_data(self) -> None:
        """Sends the estimate of the micro-batches that this rank has of the window, be it none."""
        self.progress.count_steps(self._engine())
        if self._schedule().has_two_phases and self.position.phase is Phase.A:
            self._begin_phase_b()

    def after_engine_step(self, lr_kwargs=None) -> None:
        """Writes the monitor's events once the engine has counted the step, by patches.py: only now it knows
        ``global_samples`` and ``skipped_steps``."""
        engine = self._engine()
        self.windows.count(engine)
        self.windows.step_scheduler(engine, lr_kwargs)
        ends = self.windows.take_ends(engine, ended=self.position.window - 1)
        self._monitor.write(engine, ends, self.windows.micro_batches_to_tell(self.last_micro_batches))

    def finish_counting(self) -> None:
        """Waits for the running round and enters what it reported; all ranks at the same step."""
        engine = self._engine()
        self.driver.finish()
        self.windows.count(engine)
        self._monitor.finish(engine, self.windows.take_ends(engine))

    def _inputs(self, renormalize: float, micro_batches: int) -> RoundInputs:
        contribution = self.windows.contribution(micro_batches, self._engine().gradient_accumulation_steps())
        return round_inputs(self, renormalize, self.position.window, contribution)

    # ---- checkpoints

    def checkpoint_event_prologue(self) -> None:
        """Prepares for the engine's saving or loading: no round in flight, the module shows the true weights."""
        self.driver.show_true()
        self.finish_counting()
        self._skips.wait(self._engine())

    def checkpoint_event_epilogue(self) -> None:
        """Waits for all ranks. The true weights stay shown until training goes on."""
        self.gather_objects(None, "at the end of a checkpoint")

    def require_loadable(self, load_dir: str, tag: str | None, options: LoadOptions) -> None:
        """Raises CheckpointRefused on every rank unless all ranks could load all their files; the run is unchanged."""
        self.driver.show_true()
        finding = checkpoint_check.inspect(self._engine(), load_dir, tag, options)
        checkpoint_check.require_loadable(load_dir, self.gather_objects(finding, "behind its check of a checkpoint"))

    def gather_objects(self, value: Any, place: str) -> list:
        """Returns what all ranks passed, in their order; an error says that they are at ``place``."""
        self.driver.finish()
        self._comm.whereabouts.note(place)
        return self._comm.gather_from_all(value)

    def shard_numels(self) -> list[int]:
        """Returns the elements of this rank's shard of each parameter group, with padding."""
        return [shard.numel() for shard in self._buffers.live_shards]

    def load_state_dict(self, state_dict_list, load_optimizer_states=True, **kwargs):
        """Loads as the parent does; training then stands where it stood when the checkpoint was saved, or, where that
        is not in the file, on the loaded true weights."""
        self.driver.finish()
        super().load_state_dict(state_dict_list, load_optimizer_states=load_optimizer_states, **kwargs)
        checkpoint_layers.fill_unsaved(self._engine(), load_optimizer_states)
        self._adopt_loaded()
        if not load_optimizer_states:
            return
        if state_dict_list is None:
            self._link_all_hp_params()  # DeepSpeed 0.16.9 leaves the masters' links pointing at a moment
            resume, reason = None, "a universal checkpoint holds no others"
        else:
            state, ranks = state_dict_list[self._comm.rank].get(checkpoint_state.KEY), self._comm.world_size
            resume, reason = checkpoint_state.from_state(state, self.settings, self.shard_numels(), ranks)
            if state is not None:
                self.progress.restart(state["window"])
                self._fraction.from_state(state.get("estimate_fraction"))
                self._skips.scheduler_ahead = state.get("scheduler_ahead", 0)
            self.windows.from_state(state)
        if resume is not None:
            self.driver.restore(resume)
            self.driver.show_true()  # until training goes on, as after saving
        elif self._engine().global_rank == 0:
            logger().info(f"ACCO: training goes on at the loaded true weights: {reason}")

    def state_dict(self):
        """Returns the parent's state, of the newest COMMIT, with the key ``acco`` (checkpoint_state.py)."""
        self.driver.finish()
        if self.position.started_micro_batches and self._engine().global_rank == 0:
            logger().warning(
                f"ACCO: saved after {self.position.started_micro_batches} micro-batches of a window: their gradients "
                "are not in the checkpoint. Save right after a step for a resume that is bit for bit the same"
            )
        state = super().state_dict()
        state["base_optimizer_state"] = checkpoint_state.without_tensor_steps(state["base_optimizer_state"])
        own = checkpoint_state.to_state(self.driver.resume_state(), self.settings, self.position.window)
        own |= {"estimate_fraction": self._fraction.to_state(), "scheduler_ahead": self._skips.scheduler_ahead}
        own |= self.origin | {"global_steps": self._engine().global_steps}
        state[checkpoint_state.KEY] = own | self.windows.to_state()
        return state

    def offload_states(self, *args, **kwargs):
        """Refuses to move the states: the rounds hold the buffers.

        Raises:
            RuntimeError: always.
        """
        refusal = "ACCO: offload_states() is not supported; keep the states on the device, or train with AdamW"
        raise RuntimeError(refusal)

    def _restore_from_bit16_weights(self):
        self.driver.finish()
        super()._restore_from_bit16_weights()
        self._adopt_loaded()
        self.driver.spread_masters()

    def update_lp_params(self):
        """Makes the live weights, after a universal checkpoint, from the loaded masters of all ranks."""
        self._adopt_loaded()
        super().update_lp_params()
        self.driver.adopt_live()

    def _adopt_loaded(self):
        self.driver.adopt_weights()
        self._clear_gradients()
        self.progress.restart(self.position.window)
        # torch's Optimizer.load_state_dict replaces the state tensors: point at the ones that are there now.
        for shard, master in zip(self._shards, self.single_partition_of_fp32_groups):
            shard.adopt(self.optimizer.state[master])
        self.driver.take_state(hyper_of(self), is_loaded=True)
        self.optimizer.complete_groups()

    # ---- the end

    def destroy(self) -> None:
        """Leaves the true weights in the module and ends lane, group and hooks. Harmless when called again.

        With ``wp`` this gathers the weights, so every rank must call it; at the interpreter's exit it does not.
        """
        if not self._is_built:
            return
        self._is_built = False
        owners.remove(self)
        self._at_exit.detach()
        self._forwards.release()
        try:
            if self._comm.is_alive and not self.lane.has_failed and not self.lane.is_own_thread:
                self.driver.finish()
                self.driver.show_true()
                engine = self._engine_ref()
                if engine is not None:
                    self.windows.count(engine)
        finally:
            self.driver.close()
            self.gradients.release()
            for large in "driver looks windows _monitor _fraction _buffers _shards _skips _bound _comm".split():
                delattr(self, large)
            super().destroy()
