# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's ZeRO-1 optimizer with the stepping replaced: engine events become calls on rounds and the driver.

Partitioning, master weights, hp mapping and checkpoint layout are inherited (deepspeed/runtime/zero/stage_1_and_2.py).
"""

from __future__ import annotations

import dataclasses
import weakref
from contextlib import contextmanager, nullcontext

import torch
from deepspeed.constants import default_pg_timeout
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch.utils._pytree import tree_leaves

from ..algorithm.schedules import Phase, Place, Schedule, blocks_at_end, schedule_of_window
from ..algorithm.window import Limits, Position
from ..optim import native
from ..optim.adamw import AdamWHyper
from ..optim.ops import AdamWShard
from ..optimizer import ACCO, FUSED_ADAM_KEYS
from ..runtime.buffers import FlatBuffers
from ..runtime.clock import LaneTimes
from ..runtime.communicator import Communicator, max_over_ranks, sum_over_ranks
from ..runtime.driver import RoundDriver, RoundInputs
from ..runtime.lanes import make_lane
from ..runtime.layout import GroupLayout
from . import checkpoint_check as checkpoint
from .adaptive_windows import AdaptiveWindows
from .auto_fraction import Split
from .log import logger
from .monitor import EXPOSED_WAIT_TIMER, ROUND_TIMER, LaneTimer, Monitor


class AccoZeroOptimizer(DeepSpeedZeroOptimizer):
    """ZeRO-1 with ACCO's rounds. Built by the engine; takes whatever arguments its DeepSpeed version passes."""

    def __init__(self, init_optimizer: ACCO, *args, **kwargs):
        # The hooks that the parent makes report every gradient here; it makes them only with one of these options.
        kwargs["contiguous_gradients"] = True
        kwargs["overlap_comm"] = False
        self._driver: RoundDriver | None = None
        super().__init__(init_optimizer, *args, **kwargs)
        # Without this attribute the engine itself refuses coalesce_grad_reduction(), which drives the parent's buckets.
        if hasattr(self, "_coalesce_grad_reduction"):
            del self._coalesce_grad_reduction
        self._settings = init_optimizer.settings
        self._position = Position()
        self._engine = None
        self._divisor = 1.0
        self._are_gradients_clean = True
        self._are_gradients_taken = False  # p.grad is None and A has the sums: from a window's last backward on
        self._look_depth = 0
        self._monitor: Monitor | None = None
        self._adaptive: AdaptiveWindows | None = None  # None: fixed accumulation
        self._last_micro_batches = 0  # of the window that ended
        self._hooks = []

        live = self.bit16_groups_flat
        dtypes = {flat.dtype for flat in live}
        if len(dtypes) > 1:
            raise ValueError(
                f"ACCO: parameters of several dtypes {sorted(map(str, dtypes))} are not allowed; allowed: one. Convert "
                "the trainable parameters to one dtype or freeze the others"
            )
        timeout_s = self._settings.comm_timeout_s or default_pg_timeout.total_seconds()
        device = live[0].device
        native.prepare(device)  # may build the kernels, which takes longer than a collective may wait
        lane = make_lane(self._settings.lane, device)
        comm = Communicator(self.dp_process_group, device, timeout_s)
        layouts = [GroupLayout(flat.numel(), comm.world_size, comm.rank) for flat in live]
        buffers = FlatBuffers(
            live,
            layouts,
            self.gradient_accumulation_dtype,
            self.communication_data_type,
            self._settings.estimate_bits,
        )
        self._driver = RoundDriver(buffers, self._make_shards(), comm, lane)
        self._split = Split(self._settings)
        if self._settings.is_adaptive:
            self._adaptive = AdaptiveWindows(self._settings, self._driver, self._split)
        # A script that ends without engine.destroy(): finish the round and leave the group while threads still work.
        self._driver_at_exit = weakref.finalize(self, RoundDriver.close, self._driver)
        self._group_of = {id(param): i for i, group in enumerate(self.bit16_groups) for param in group}
        self._grad_views = {
            id(param): self._view_of(param, live[i], buffers.grads[i])
            for i, group in enumerate(self.bit16_groups)
            for param in group
        }
        self._attach_gradients()
        self._link_states()

    def _link_states(self):
        """``safe_get_full_*`` and ``safe_set_full_*`` (deepspeed/utils/tensor_fragment.py) find the optimizer state and
        wait for the round that writes it; what is set becomes what training stands on. Gradients they find in A."""
        self._hp_optimizer_states_linked = False
        self._lazy_init_hp_params_optimizer_state()
        optimizer = weakref.ref(self)

        def waiting(method, wait):
            def call(*args, **kwargs):
                made_by = optimizer()
                if made_by is not None and made_by._driver is not None:
                    wait(made_by._driver)
                return method(*args, **kwargs)

            return call

        def of_gradient(method, param):
            return lambda *args: method(optimizer(), param, *args)

        for group in self.bit16_groups:
            for param in group:
                param.get_full_hp_param = waiting(param.get_full_hp_param, RoundDriver.finish)
                param.set_full_hp_param = waiting(param.set_full_hp_param, RoundDriver.settle)
                param.get_full_hp_grad = of_gradient(AccoZeroOptimizer._full_gradient, param)
                param.set_full_hp_grad = of_gradient(AccoZeroOptimizer._set_full_gradient, param)

    def _link_all_hp_params(self):
        super()._link_all_hp_params()
        if self._driver is not None:  # again, after a checkpoint was loaded
            self._link_states()

    def _make_shards(self) -> list[AdamWShard]:
        shards = []
        for master in self.single_partition_of_fp32_groups:
            state = self.optimizer.state[master]
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"] = torch.zeros_like(master, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(master, requires_grad=False)
            shards.append(AdamWShard(master, state["exp_avg"], state["exp_avg_sq"], state["step"]))
        return shards

    @staticmethod
    def _view_of(param, flat, grads):
        # Padding and order inside the flat group are DeepSpeed's and changed between versions: ask the addresses.
        offset = (param.data_ptr() - flat.data_ptr()) // flat.element_size()
        return grads.narrow(0, offset, param.numel()).view(param.shape)

    # ---- attaching to the engine

    def attach(self, engine) -> None:
        """Puts the hooks on ``engine.module`` and takes over what only the engine knows. Once, by plugin.py."""
        self._engine = weakref.ref(engine)
        # Both are younger than the oldest supported DeepSpeed, which always takes the mean over all ranks.
        sequence_parallel = float(getattr(self, "sequence_parallel_size", 1))
        if self._adaptive is not None and sequence_parallel > 1:
            raise ValueError(
                f"ACCO: sequence parallelism over {sequence_parallel:g} ranks is not allowed with "
                'optimizer.params.accumulation = "adaptive"; allowed: 1, since these ranks compute every micro-batch '
                'together. Set accumulation to "fixed"'
            )
        data_parallel = self._driver.comm.world_size / sequence_parallel
        self._divisor = data_parallel if getattr(self, "gradient_average", True) else 1.0
        self._monitor = Monitor(engine.monitor, self._driver)
        self.timers.get_timers().update(  # of no effect without wall_clock_breakdown
            {
                EXPOSED_WAIT_TIMER: LaneTimer(self._driver.lane, "exposed_s"),
                ROUND_TIMER: LaneTimer(self._driver.lane, "round_s"),
            }
        )
        root = engine.module
        before_forward = torch.compiler.disable(self._as_hook(AccoZeroOptimizer._before_forward, root))
        after_forward = torch.compiler.disable(self._as_hook(AccoZeroOptimizer._after_forward, root))
        self._hooks += [
            # First of all hooks: another one may read the weights, which are installed here.
            root.register_forward_pre_hook(before_forward, prepend=True),
            root.register_forward_hook(after_forward, always_call=True),
        ]
        for part in root.modules():
            before_state_dict = self._as_hook(AccoZeroOptimizer._before_state_dict, part)
            after_state_dict = self._as_hook(AccoZeroOptimizer._after_state_dict, part)
            self._hooks += [
                part.register_state_dict_pre_hook(before_state_dict),
                part.register_state_dict_post_hook(after_state_dict),
            ]
        self._driver.comm.require_same(
            repr([(layout.padded_numel, layout.world_size) for layout in self._driver.buffers.layouts])
            + repr((self._settings, self._micro_batches_per_window(), self.clip_grad, str(self.dtype)))
            + repr((str(self.gradient_accumulation_dtype), str(self.communication_data_type)))
            + f"monitor={self._driver.measures_estimate}"
        )

    def _as_hook(self, method, owner):
        """A function and not a bound method: ``copy.deepcopy(module)`` (an averaged model, say) then copies neither
        this optimizer nor its process group, and the copy's own calls are none of our business."""
        optimizer, owner = weakref.ref(self), weakref.ref(owner)

        def hook(module, *args):
            if module is owner() and optimizer() is not None:
                method(optimizer(), module, *args)

        return hook

    @property
    def settings(self):
        """The validated :class:`~deepspeed_acco.settings.Settings`."""
        return self._settings

    @property
    def adaptive(self) -> AdaptiveWindows | None:
        """The adaptive windows; None with fixed accumulation."""
        return self._adaptive

    @property
    def window(self) -> int:
        """Number of the running window, from 0."""
        return self._position.window

    @property
    def last_micro_batches(self) -> int:
        """How many micro-batches this rank had in the window that ended last; 0 before the first."""
        return self._last_micro_batches

    @property
    def is_between_windows(self) -> bool:
        """Whether nothing of the running window was computed or sent yet."""
        return self._position.phase is Phase.A and not self._position.micro_batches

    @property
    def lane_name(self) -> str:
        """``stream``, ``thread`` or ``inline``."""
        return self._driver.lane.name

    def own_bytes(self) -> int:
        """Bytes that this rank holds beyond weights, master weights and Adam state."""
        return self._driver.buffers.own_bytes()

    def lane_times(self) -> LaneTimes:
        """How long the rounds took and how much of that training waited for, in seconds."""
        return self._driver.lane.times()

    @property
    def wire_bytes(self) -> tuple[int, int]:
        """Payload bytes that this rank (sent, received) in the finished rounds; what carries them is not counted."""
        return self._driver.wire_bytes, self._driver.wire_bytes

    @property
    def estimate_fraction(self) -> float:
        """That of the running window: as given, or what ``"auto"`` has come to."""
        return self._split.fraction

    def _micro_batches_per_window(self) -> int:
        return self._engine().gradient_accumulation_steps()

    # ---- gradients: A

    def process_gradients(self, param, i):
        """Called after each accumulation of a parameter's gradient (the parent's hook): A must have all of it."""
        if param.grad.is_sparse:
            raise ValueError(
                "ACCO: sparse gradients are not allowed; allowed: dense. Build the embedding with sparse=False"
            )
        view = self._grad_views[id(param)]
        self._are_gradients_clean = False
        if view.dtype != param.dtype or self._are_gradients_taken:
            view.add_(param.grad.detach())
            param.grad = None
        elif param.grad is not view:  # after zero_grad(set_to_none=True) or create_graph=True: it is the whole sum
            view.copy_(param.grad.detach())
            param.grad = view

    def _attach_gradients(self):
        """``p.grad`` is a view into A where the dtypes allow it, so that autograd accumulates there. A view that was
        dropped in mid-window means zero, as for every optimizer."""
        were_taken, self._are_gradients_taken = self._are_gradients_taken, False
        if self.gradient_accumulation_dtype != self.dtype:
            return
        for group in self.bit16_groups:
            for param in group:
                view = self._grad_views[id(param)]
                if param.grad is not view:
                    if param.grad is not None:
                        view.copy_(param.grad.detach())
                        self._are_gradients_clean = False
                    elif not (self._are_gradients_clean or were_taken):
                        view.zero_()
                    param.grad = view

    def _take_gradients(self):
        """As ZeRO-1 does at a window's last backward: ``p.grad`` is this rank's own sum, which nobody may take for the
        gradient of the step; ``safe_get_full_grad`` then asks :meth:`_full_gradient`. The next forward attaches."""
        self._are_gradients_taken = True
        for group in self.bit16_groups:
            for param in group:
                param.grad = None

    def _whole_gradient_view(self, param):
        if self._adaptive is not None:
            raise RuntimeError(
                'ACCO: the full gradient is not known with optimizer.params.accumulation = "adaptive": the ranks end '
                'their windows at different times. Set accumulation to "fixed" for safe_get_full_grad and '
                "safe_set_full_grad"
            )
        if not self._are_gradients_taken or self._are_gradients_clean:
            raise ValueError(
                "ACCO: the full gradient was asked for or set outside of a window's end; allowed: after the last "
                "backward of a window and before engine.step(). Move the call there"
            )
        return self._grad_views[id(param)]

    def _full_gradient(self, param):
        """The window's mean gradient (fp32, with the loss scale), for ``safe_get_full_grad``; every rank asks."""
        view = self._whole_gradient_view(param)
        self._driver.finish()  # one collective at a time on the device
        mean = view.float() / self._divisor
        sum_over_ranks(mean, self.dp_process_group)
        return mean

    def _set_full_gradient(self, param, value):
        """Makes ``value``, the same on every rank, the mean that COMMIT takes (a running ESTIMATE has its own copy)."""
        view = self._whole_gradient_view(param)
        view.copy_(value * (self._divisor / self._driver.comm.world_size))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of the window so far. The engine calls this after each step, when there are none."""
        if not self._are_gradients_clean:
            if self._adaptive is not None and self._position.phase is Phase.B:
                raise RuntimeError(
                    'ACCO: zero_grad() in phase B is not allowed with optimizer.params.accumulation = "adaptive"; '
                    'allowed: before the estimate was sent. Drop whole windows, or set accumulation to "fixed"'
                )
            self._driver.buffers.clear_gradients()
            self._are_gradients_clean = True
            if self._position.micro_batches:
                self._restart_window()

    def _restart_window(self):
        if self._position.phase is Phase.B:
            self._driver.settle()  # the estimate was made of gradients that are gone
        self._position = self._position.after_dropped_gradients()

    # ---- events of training

    def _schedule(self) -> Schedule:
        return schedule_of_window(self._settings.schedule, self._position.window, self._settings.overlap_warmup_steps)

    def _before_forward(self, module, args) -> None:
        """Every forward of the engine's module. In mid-window weights change here and nowhere else."""
        if not module.training:
            self._driver.show_true()
            return
        if self._look_depth:
            raise RuntimeError(
                "ACCO: a training forward inside true_weights() is not allowed; allowed: eval-mode forwards. Leave the "
                "block first"
            )
        self._driver.hide_true()
        if not torch.is_grad_enabled():
            return
        if self._adaptive is not None:
            self._adaptive.require_plain_loop(self._engine())
        self._attach_gradients()
        if self._position.micro_batches and self._is_phase_a_over():
            self._begin_phase_b()
        self._position = self._position.after_forward()

    def _is_phase_a_over(self) -> bool:
        schedule, n = self._schedule(), self._micro_batches_per_window()
        if schedule.at_phase_b is None:
            return False
        if self._adaptive is not None:
            limits = self._adaptive.limits(schedule, self._position, n)
            return self._position.is_phase_a_over(schedule, limits, self._driver.is_round_finished())
        wanted = self._split.phase_a(n)
        return self._position.is_phase_a_over(schedule, Limits(wanted, wanted))

    def _begin_phase_b(self):
        self._position = self._position.after_phase_a()
        in_a = self._position.micro_batches_in_a
        inputs = self._inputs(self._micro_batches_per_window() / in_a if self._adaptive is None else 1.0, in_a)
        self._driver.turn(self._schedule().at_phase_b, inputs, clears=False, blocks=False)

    def _after_forward(self, module, args, output) -> None:
        if torch.is_grad_enabled():
            self._guard(output)
            if not module.training:
                self._position = self._position.after_eval_forward()
        if not module.training and self._position.is_graph_outstanding:
            self._driver.hide_true()  # a training graph waits for its backward: it needs its weights back

    def _guard(self, output):
        """Autograd does not notice a copy into parameters: compare the weights' version when the backward comes."""
        version = self._driver.weights_version

        def check(grad):
            if self._driver.weights_version != version:
                raise RuntimeError(
                    "ACCO: the weights changed between this forward and its backward (another training forward after a "
                    "backward, a step or an evaluation came in between), so its gradient would be wrong. Run the "
                    "backward of every forward before the next forward that follows a backward, and evaluate under "
                    "torch.no_grad()"
                )

        is_record = dataclasses.is_dataclass(output) and not isinstance(output, (dict, type))
        for tensor in tree_leaves(vars(output) if is_record else output):
            # Not on a leaf, such as a parameter that the module returns: it would keep the hook.
            if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
                tensor.register_hook(check)

    def backward_prologue(self, *args, **kwargs) -> None:
        """Nothing: the parent would allocate reduction buckets here (DeepSpeed <= 0.18.2)."""

    def reduce_gradients(self, pipeline_parallel=False) -> None:
        """Nothing: the rounds reduce."""

    def backward_epilogue(self, *args, **kwargs) -> None:
        """Once after every backward, in every style of accumulation and version of DeepSpeed."""
        self._position = self._position.after_backward()
        engine = self._engine()
        if self._adaptive is not None:
            self._adaptive.require_plain_loop(engine)
            self._adaptive.after_backward(engine, self._schedule(), self._position)
        if engine.is_gradient_accumulation_boundary() and not engine.inside_no_sync_ctxt:
            self._take_gradients()

    def step(self, closure=None) -> None:
        """The end of a window: start its COMMIT and install what training goes on with.

        ``overflow`` and ``_global_grad_norm`` are set as the engine reads them right after. The norm is that of the
        newest finished COMMIT: of the previous window where rounds overlap, 0.0 at first.
        """
        driver, schedule, position, engine = self._driver, self._schedule(), self._position, self._engine()
        inputs = self._inputs(1.0, position.micro_batches)
        n, logs = engine.gradient_accumulation_steps(), engine.global_rank == 0
        self._split.at_window_end(driver, position.window, n, position.micro_batches, logs=logs)
        self.overflow = self.dtype == torch.float16 and self._has_overflow_now()
        self._update_scale(self.overflow)
        if self.overflow:
            driver.settle()
            driver.buffers.clear_gradients()
            self._global_grad_norm = float("inf")
        else:
            blocks = blocks_at_end(schedule, self._position.phase)
            following = schedule.at_window_end
            driver.turn(following, inputs, clears=True, blocks=blocks)
            self._global_grad_norm = driver.norm_or_zero()
        if not getattr(self, "compute_grad_norm", True):
            self._global_grad_norm = None
        self._take_gradients()
        self._are_gradients_clean = True
        self._last_micro_batches = self._position.micro_batches
        self._position = self._position.after_window()
        self._engine().skipped_steps += driver.take_skipped()
        self.timers.log([EXPOSED_WAIT_TIMER, ROUND_TIMER])

    def end_window_without_data(self) -> None:
        """Ends the running window with the micro-batches that this rank has of it, be it none, and waits for nothing
        but the rounds: a rank without data takes part in what the others still compute."""
        schedule = self._schedule()
        if schedule.at_phase_b is not None and self._position.phase is Phase.A:
            self._begin_phase_b()
        self._adaptive.set_boundary(self._engine(), True)
        self._engine().step()

    def around_engine_step(self):
        """A context for the engine's own counting of a step; by plugin.py."""
        return nullcontext() if self._adaptive is None else self._adaptive.own_bookkeeping(self._engine())

    def after_engine_step(self, lr_kwargs=None) -> None:
        """The engine has counted the step. By plugin.py: only now it knows ``global_samples`` and ``skipped_steps``."""
        engine, micro_batches = self._engine(), self._last_micro_batches
        if self._adaptive is not None:
            self._adaptive.count(engine)
            self._adaptive.step_scheduler(engine, lr_kwargs)
            micro_batches = sum(self._adaptive.newest.micro_batches) if self._adaptive.newest is not None else None
        self._monitor.write(engine, micro_batches)

    def finish_counting(self) -> None:
        """Waits for the running round and enters what it told; all ranks at the same step."""
        self._driver.finish()
        if self._adaptive is not None:
            self._adaptive.count(self._engine())

    def _inputs(self, renormalise: float, micro_batches: int) -> RoundInputs:
        """Captures what the round needs now, of so many micro-batches. The mean is the sum of what the backwards
        delivered over the number of ranks; fp16 divides before it sums, so that the sum cannot overflow. Adaptive
        windows divide by what all ranks computed, which only the round knows."""
        if not self.postscale_gradients or self.communication_data_type == torch.float16:
            pre_scale = 1.0 / self._divisor
        else:
            pre_scale = 1.0 / self.gradient_predivide_factor
        grad_scale = renormalise / (self._divisor * pre_scale * self.loss_scale)
        hyper = tuple(AdamWHyper.from_group(group) for group in self.optimizer.param_groups)
        share = None
        if self._adaptive is not None:
            share = self._adaptive.share(micro_batches, self._micro_batches_per_window())
        return RoundInputs(hyper, pre_scale, grad_scale, self.clip_grad, self._position.window, share)

    def _has_overflow_now(self) -> bool:
        """Whether any rank's own gradients are not finite: fp16's loss scaler must know before the step counts."""
        # The largest absolute value is NaN or inf where any element is; no temporary of the gradients' size is made.
        # What is accumulated in fp32 must also survive the cast to the dtype it is sent in.
        largest = torch.stack([torch.linalg.vector_norm(grads, float("inf")) for grads in self._driver.buffers.grads])
        limit = torch.finfo(self.communication_data_type).max
        overflow = (~(largest <= limit)).any().to(torch.uint8)
        max_over_ranks(overflow, self.dp_process_group)
        return bool(overflow)

    # ---- the true weights

    @contextmanager
    def true_weights(self):
        """The parameters hold the true weights inside; see :func:`deepspeed_acco.true_weights`."""
        was_showing = self._driver.is_showing_true
        self._driver.show_true()
        self._look_depth += 1
        try:
            yield
        finally:
            self._look_depth -= 1
            if not was_showing and not self._look_depth:
                self._driver.hide_true()

    def _before_state_dict(self, module, prefix, keep_vars) -> None:
        if not self._position.is_graph_outstanding:
            self._driver.show_true()  # until the next training forward, so that the returned references stay true

    def _after_state_dict(self, module, state_dict, prefix, local_metadata) -> None:
        if self._position.is_graph_outstanding and not self._driver.is_showing_true:
            self._put_true_copies(module, state_dict, prefix)

    def _put_true_copies(self, module, state_dict, prefix):
        """Between a forward and its backward the weights must stay: put copies of the true ones into the dictionary."""
        driver = self._driver
        driver.finish()
        place = driver.running.leaves_true_weights if driver.running is not None else Place.LIVE
        if place is Place.LIVE:
            return
        if place is Place.SHARDS:
            raise RuntimeError(
                'ACCO: with the schedule "wp" state_dict() cannot be taken between a forward and its backward, because '
                "the true weights must be gathered into the model. Take it after the backward"
            )
        for name, param in module.named_parameters(recurse=False):
            key = prefix + name
            group = self._group_of.get(id(param))
            if key in state_dict and group is not None:
                true = self._view_of(param, driver.buffers.live[group], driver.buffers.comm_weights[group])
                state_dict[key] = true.clone()

    def checkpoint_event_prologue(self) -> None:
        """The engine is about to save or load: no round in flight, the module shows the true weights."""
        self._driver.show_true()
        self.finish_counting()
        self._engine().skipped_steps += self._driver.take_skipped(waits=True)

    def checkpoint_event_epilogue(self) -> None:
        """Between the files and ``latest``, which names them: all ranks have written theirs. The true weights stay
        shown until training goes on."""
        self._driver.comm.barrier()

    def require_loadable(self, load_dir: str, tag: str | None, options: checkpoint.LoadOptions) -> None:
        """Checks all files that ``engine.load_checkpoint`` would load, on all ranks, before any of them is loaded.

        Raises:
            CheckpointRefused: on every rank, with what is wrong; the run is unchanged.
        """
        self._driver.show_true()
        self._driver.finish()
        finding = checkpoint.inspect(self._engine(), load_dir, tag, options)
        checkpoint.require_loadable(load_dir, self._driver.comm.gather_objects(finding))

    def shard_numels(self) -> list[int]:
        """Elements of this rank's shard of each parameter group, with padding."""
        return [layout.shard_numel for layout in self._driver.buffers.layouts]

    def load_state_dict(self, state_dict_list, load_optimizer_states=True, **kwargs):
        """As the parent's; training then stands where it stood when the checkpoint was saved, or, where that is not in
        the file, on the loaded true weights."""
        self._driver.finish()
        super().load_state_dict(state_dict_list, load_optimizer_states=load_optimizer_states, **kwargs)
        self._adopt_loaded()
        if not load_optimizer_states:
            return
        if state_dict_list is None:
            standing, reason = None, "a universal checkpoint holds no others"
            self._link_all_hp_params()  # DeepSpeed 0.16.9 leaves the masters' links pointing at a moment
        else:
            state = state_dict_list[self._driver.comm.rank].get(checkpoint.KEY)
            standing, reason = checkpoint.from_state(state, self._settings.schedule, self.shard_numels())
            if state is not None:
                self._position = Position(window=state["window"])
                self._split.from_state(state.get("estimate_fraction"))
            if self._adaptive is not None:
                self._adaptive.unscheduled_samples = (state or {}).get("unscheduled_samples", 0)
        if standing is not None:
            self._driver.stand_on(standing)
            self._driver.show_true()  # until training goes on, as after saving
        elif self._engine().global_rank == 0:
            logger().info(f"ACCO: training goes on at the loaded true weights: {reason}")

    def state_dict(self):
        """As the parent's, of the newest COMMIT, with the key ``acco`` (checkpoint.py)."""
        self._driver.finish()
        if self._position.micro_batches and self._engine().global_rank == 0:
            logger().warning(
                f"ACCO: saved after {self._position.micro_batches} micro-batches of a window: their gradients are not "
                "in the checkpoint. Save right after a step for a resume that is bit for bit the same"
            )
        state = super().state_dict()
        state["base_optimizer_state"] = checkpoint.without_tensor_steps(state["base_optimizer_state"])
        standing = self._driver.standing()
        state[checkpoint.KEY] = checkpoint.to_state(standing, self._settings.schedule, self._position.window)
        state[checkpoint.KEY]["estimate_fraction"] = self._split.to_state()
        if self._adaptive is not None:
            state[checkpoint.KEY]["unscheduled_samples"] = self._adaptive.unscheduled_samples
        return state

    def offload_states(self, *args, **kwargs):
        """Refused: the rounds hold the buffers that this would move.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "ACCO: offload_states() is not supported; keep the states on the device, or train with AdamW"
        )

    def _restore_from_bit16_weights(self):
        self._driver.finish()
        super()._restore_from_bit16_weights()
        self._adopt_loaded()

    def update_lp_params(self):
        """After a universal checkpoint: the live weights from the loaded masters of all ranks."""
        self._adopt_loaded()
        super().update_lp_params()

    def _adopt_loaded(self):
        driver = self._driver
        driver.adopt_live()
        driver.buffers.clear_gradients()
        self._are_gradients_clean = True
        self._position = Position(window=self._position.window)
        # torch's Optimizer.load_state_dict replaces the state tensors: point at the ones that are there now.
        for shard, master in zip(driver.shards, self.single_partition_of_fp32_groups):
            state = self.optimizer.state[master]
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=master.device).reshape(())
            shard.exp_avg, shard.exp_avg_sq, shard.step = state["exp_avg"], state["exp_avg_sq"], state["step"]
        driver.lay_out_pages()
        for group in self.optimizer.param_groups:
            for key, value in FUSED_ADAM_KEYS.items():  # the loaded groups may be another optimizer's
                group.setdefault(key, value)

    # ---- the end

    def destroy(self) -> None:
        """Leaves the true weights in the module and ends lane, group and hooks. Harmless when called again.

        With ``wp`` this gathers the weights, so every rank must call it; at the interpreter's exit it does not.
        """
        driver = self._driver
        if driver is None:
            return
        self._driver_at_exit.detach()
        for hook in self._hooks:
            hook.remove()
        try:
            if driver.comm.is_alive and not driver.lane.has_failed and not driver.lane.is_own_thread:
                driver.settle()
                if self._adaptive is not None and self._engine() is not None:
                    self._adaptive.count(self._engine())
        finally:
            self._driver = self._monitor = self._adaptive = None
            driver.close()
            for group in self.bit16_groups:
                for param in group:
                    param.grad = None
            self._grad_views.clear()
            super().destroy()


@contextmanager
def true_weights(engine):
    """``with deepspeed_acco.true_weights(engine):`` the parameters of ``engine.module`` hold the true weights, those of
    the newest COMMIT, and training goes on afterwards as if nobody had looked.

    Evaluation, ``state_dict()`` and checkpoints need no such block. With the schedule ``wp`` every rank must enter it.

    Raises:
        ValueError: when the engine does not train with ACCO.
    """
    optimizer = getattr(engine, "optimizer", None)
    if not isinstance(optimizer, AccoZeroOptimizer):
        raise ValueError(
            f"ACCO: true_weights() got an engine with {type(optimizer).__name__}; allowed: one whose optimizer.type is "
            '"ACCO". With every other optimizer the parameters are the true weights already'
        )
    with optimizer.true_weights():
        yield
