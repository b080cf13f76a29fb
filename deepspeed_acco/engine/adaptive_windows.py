# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Says how long adaptive windows may be, counts what they had, and ends training with them on all ranks at once.

The rule itself is in algorithm/window.py (``Limits``); the counts travel in the rounds' own small all-reduce
(runtime/round.py). What all ranks do alike (scheduler, samples, the end) follows from the counts of the COMMIT that
the window's end has waited for, which every rank knows at the same optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..algorithm.schedules import Phase, Schedule
from ..algorithm.window import Limits, Position
from ..runtime.communicator import Communicator
from ..runtime.driver import RoundDriver
from ..runtime.lanes import InlineLane
from ..runtime.round_inputs import Contribution
from ..settings import Settings, max_window_micro_batches
from .auto_fraction import AutoFraction
from .deepspeed_engine import Engine
from .fixed_windows import FixedWindows
from .log import logger

GROWTH_TO_WARN_OF = 2  # nominal batches


@dataclass(frozen=True)
class WindowCounts:
    """Holds the micro-batches of one finished window, of each data-parallel rank in their order.

    Attributes:
        window: number of the optimizer step, from 0.
        micro_batches: of the whole window.
        in_phase_a: those of them that the estimate was made of; empty where there was none.
    """

    window: int
    micro_batches: tuple[int, ...]
    in_phase_a: tuple[int, ...] = ()


class AdaptiveWindows(FixedWindows):
    """Says how long this rank's windows are, and keeps the books of the finished ones.

    Attributes:
        has_data: whether this rank goes on after the window; told with its gradients.
        unscheduled_samples: of the windows finished that the learning-rate scheduler has not followed yet.
        newest: the newest finished window, or None.
    """

    def __init__(
        self, settings: Settings, driver: RoundDriver, comm: Communicator, lane: InlineLane, fraction: AutoFraction
    ):
        super().__init__(fraction)
        self.has_data = True
        self.unscheduled_samples = 0
        self.newest: WindowCounts | None = None
        self._settings = settings
        self._driver = driver
        self._comm = comm
        self._lane = lane
        self._outcomes = driver.outcomes
        self._reports = self._outcomes.reader()
        self._is_setting_boundary = False
        self._listeners: list[Callable[[WindowCounts], None]] = []
        self._to_replay: dict[int, WindowCounts] = {}
        self._in_phase_a: tuple[int, ...] = ()
        self._ends: dict[int, int] = {}
        self._windows, self._samples = 0, 0  # of this process
        self._warned: set[str] = set()

    # ---- how long a window is

    def limits(self, schedule: Schedule, position: Position, n: int) -> Limits:
        """Returns the micro-batches of the phase that training is in, with windows of ``n`` at least."""
        given = self._to_replay.get(position.window)
        if given is not None:
            own, rank = given.micro_batches, self._comm.rank
            count = own[rank]
            if schedule.has_two_phases:
                in_a = given.in_phase_a[rank]
                count = in_a if position.phase is Phase.A else count - in_a
            return Limits(count, count)
        most = max_window_micro_batches(n, self._settings.max_window)
        if not schedule.has_two_phases:
            return Limits(n, most)
        least_a, most_a = self._fraction.phase_a(n), self._fraction.phase_a(most)
        return Limits(least_a, most_a) if position.phase is Phase.A else Limits(n - least_a, most - most_a)

    def after_backward(self, engine: Engine, schedule: Schedule, position: Position) -> None:
        """Tells the engine whether its window ends with the micro-batch that was just computed."""
        limits = self.limits(schedule, position, engine.gradient_accumulation_steps())
        self._lane.pace(decides=position.started_in_phase >= limits.least)
        self.set_boundary(engine, position.is_window_over(schedule, limits, self._driver.is_round_finished()))

    def set_boundary(self, engine: Engine, is_boundary: bool) -> None:
        """Calls ``engine.set_gradient_accumulation_boundary``, which is ours alone here (:meth:`refuse_boundary`)."""
        self._is_setting_boundary = True
        try:
            engine.set_gradient_accumulation_boundary(is_boundary)
        finally:
            self._is_setting_boundary = False

    def refuse_boundary(self, is_boundary: bool) -> None:
        """Raises ValueError when somebody else sets the boundary: HF Trainer, Accelerate or the user's own loop."""
        if not self._is_setting_boundary:
            raise _not_ours(f"engine.set_gradient_accumulation_boundary({is_boundary})")

    def require_plain_loop(self, engine: Engine) -> None:
        """Raises ValueError inside ``engine.no_sync()``, which says where a window ends, too."""
        if engine.inside_no_sync_ctxt:
            raise _not_ours("engine.no_sync()")

    def require_droppable(self, phase: Phase) -> None:
        """Raises RuntimeError for ``zero_grad()`` behind the estimate, which holds this rank's count already."""
        if phase is Phase.B:
            raise RuntimeError(
                'ACCO: zero_grad() in phase B is not allowed with optimizer.params.accumulation = "adaptive"; '
                'allowed: before the estimate was sent. Drop whole windows, or set accumulation to "fixed"'
            )

    def require_known_sum(self) -> None:
        """Raises RuntimeError for a full gradient, which no rank knows before all have ended their windows."""
        raise RuntimeError(
            'ACCO: the full gradient is not known with optimizer.params.accumulation = "adaptive": the ranks end their '
            'windows at different times. Set accumulation to "fixed" for safe_get_full_grad and safe_set_full_grad'
        )

    def replay(self, windows: Iterable[WindowCounts]) -> None:
        """Gives the windows of these numbers these counts, whatever is finished when."""
        ranks = self._comm.world_size
        for counts in windows:
            if len(counts.micro_batches) != ranks:
                raise ValueError(
                    f"ACCO: replay_windows() got counts of {len(counts.micro_batches)} ranks for window "
                    f"{counts.window}; allowed: of {ranks}, as many as train here. Start that number of ranks"
                )
            self._to_replay[counts.window] = counts

    # ---- what is counted

    def renormalize(self, micro_batches: int, n: int) -> float:
        """Returns 1: the round divides by what all ranks computed."""
        return 1.0

    def contribution(self, micro_batches: int, n: int) -> Contribution:
        """Returns what this rank reports in a round of so many of its micro-batches."""
        return Contribution(micro_batches, n * self._comm.world_size, not self.has_data)

    def listen(self, fn: Callable[[WindowCounts], None]) -> None:
        """Calls ``fn`` with every finished window, in order."""
        self._listeners.append(fn)

    @contextmanager
    def own_bookkeeping(self, engine: Engine):
        """Returns a context around the engine's step, which counts a nominal batch and moves the scheduler by one;
        :meth:`count` and :meth:`step_scheduler` do both by what was computed."""
        samples, scheduler = engine.global_samples, engine.lr_scheduler
        if self._settings.lr_follows == "samples":
            engine.lr_scheduler = None
        try:
            yield
        finally:
            engine.global_samples, engine.lr_scheduler = samples, scheduler

    def count(self, engine: Engine) -> None:
        """Enters the windows whose COMMITs were waited for since the last call; on all ranks at the same step."""
        for reported in self._reports.take_counts():
            counts = tuple(reported.micro_batches())
            if not reported.round.writes_state:
                self._in_phase_a = counts
                continue
            self.newest, self._in_phase_a = WindowCounts(reported.window, counts, self._in_phase_a), ()
            samples = sum(counts) * engine.train_micro_batch_size_per_gpu()
            engine.global_samples += samples
            self.unscheduled_samples += samples
            self._ends[reported.window] = engine.global_samples
            self._windows, self._samples = self._windows + 1, self._samples + samples
            engine.tput_timer.batch_size = self._samples / self._windows  # it divides by the mean time of a step
            self._warn_of_growth(engine, counts, samples)
            for listener in self._listeners:
                listener(self.newest)

    def end_window_without_data(self, engine: Engine) -> None:
        """Ends the running window with the micro-batches that this rank has of it, be it none, and waits for nothing
        but the rounds: a rank without data takes part in what the others still compute."""
        engine.optimizer.begin_phase_b_without_data()
        self.set_boundary(engine, True)
        engine.step()

    def take_ends(self, engine: Engine, ended: int | None = None) -> dict[int, int]:
        """Returns the ends of the windows whose counts were entered since the last call."""
        ends, self._ends = self._ends, {}
        return ends

    def micro_batches_to_tell(self, own: int) -> int | None:
        """Returns those of all ranks in the newest window that they reported, for the monitor; None before the
        first."""
        return None if self.newest is None else sum(self.newest.micro_batches)

    def to_state(self) -> dict[str, int]:
        """Returns what a checkpoint keeps of the counts."""
        return {"unscheduled_samples": self.unscheduled_samples}

    def from_state(self, state) -> None:
        """Does the inverse of :meth:`to_state`; a checkpoint of fixed windows, or of another optimizer, has none."""
        self.unscheduled_samples = (state or {}).get("unscheduled_samples", 0)

    def step_scheduler(self, engine: Engine, lr_kwargs) -> None:
        """Moves the scheduler by whole steps for the samples entered since the last call."""
        entered, self.unscheduled_samples = self.unscheduled_samples, 0
        if self._settings.lr_follows == "steps" or engine.lr_scheduler is None:
            return
        batch = engine.train_batch_size()
        due = engine.global_samples // batch - (engine.global_samples - entered) // batch
        for _ in range(due):
            engine.lr_scheduler.step(**(lr_kwargs or {}))

    def _warn_of_growth(self, engine, counts, samples):
        if engine.global_rank != 0:
            return
        n, nominal = engine.gradient_accumulation_steps(), engine.train_batch_size()
        most = max_window_micro_batches(n, self._settings.max_window)
        figures = (
            f"{samples} samples in one step, {samples / nominal:.1f} times train_batch_size = {nominal} (micro-batches "
            f"of the ranks: {', '.join(map(str, counts))}; gradient_accumulation_steps = {n}, max_window = {most})"
        )
        if max(counts) >= most > n:
            self._warn("max_window", f"a rank had as many micro-batches as max_window allows and waited: {figures}")
        if samples > GROWTH_TO_WARN_OF * nominal:
            self._warn(
                "growth",
                f"{figures}. Lower gradient_accumulation_steps so that the slowest rank's rounds are just hidden, "
                "choose the learning rate for this batch, or set max_window",
            )

    def _warn(self, kind, text):
        if kind not in self._warned:
            self._warned.add(kind)
            logger().warning(f"ACCO: adaptive windows: {text}. This is said once")

    def is_data_over(self) -> bool:
        """Tells whether no rank had data after the newest round, which is waited for."""
        self._driver.finish()
        reported = self._outcomes.last_counts
        return reported is not None and reported.ranks_without_data() == self._comm.world_size


def _not_ours(given: str) -> ValueError:
    return ValueError(
        f'ACCO: {given} is not allowed with optimizer.params.accumulation = "adaptive"; allowed: a plain loop of '
        "engine(x), engine.backward(loss) and engine.step() for every micro-batch, in which ACCO decides where windows "
        'end. Set accumulation to "fixed"; HF Trainer and Accelerate need it, since they end the windows themselves'
    )


def _windows_of(engine, asked_for: str) -> AdaptiveWindows:
    windows = getattr(getattr(engine, "optimizer", None), "windows", None)
    if not isinstance(windows, AdaptiveWindows):
        raise ValueError(
            f"ACCO: {asked_for}() got an engine without adaptive windows; allowed: one whose optimizer.type is "
            '"ACCO" and whose optimizer.params.accumulation is "adaptive". With fixed windows every step has '
            "gradient_accumulation_steps micro-batches on every rank: use a plain loop"
        )
    return windows


def on_window(engine, fn: Callable[[WindowCounts], None]) -> None:
    """Calls ``fn`` with the :class:`WindowCounts` of every finished window, in order and on every rank: inside the
    ``engine.step()`` that ends the window after it, and of the last one at the end of :func:`train_samples`, in
    ``save_checkpoint()`` or in ``engine.destroy()``. Written to a file, they are what :func:`replay_windows` takes.

    Raises:
        ValueError: when the engine's windows are not adaptive.
    """
    _windows_of(engine, "on_window").listen(fn)


def replay_windows(engine, windows: Iterable[WindowCounts]) -> None:
    """Gives the windows of these numbers the counts that they once had, so that a run with the same data and number of
    ranks has the same bits again. Later windows are adaptive. Every rank must call it, before training.

    Raises:
        ValueError: for counts of another number of ranks, or when the engine's windows are not adaptive.
    """
    _windows_of(engine, "replay_windows").replay(windows)


def train_samples(engine, loader: Iterable, total: int | None = None) -> Iterator:
    """Yields the batches of this rank's ``loader`` until all ranks together have trained ``total`` samples, or until no
    rank has any left; training then ends on all ranks at the same optimizer step::

        for batch in deepspeed_acco.train_samples(engine, loader, total=1_000_000):
            engine.backward(engine(**batch))
            engine.step()

    Every rank must run this loop to its end. A rank whose data end first takes part in the steps of the others with
    what it has, so that every micro-batch computed is in exactly one step. Samples are micro-batches times
    ``train_micro_batch_size_per_gpu``; what a step had is known one step later, so up to two steps more than ``total``
    are trained.

    Args:
        loader: this rank's batches, one micro-batch each; one batch is fetched ahead of its use.
        total: compared with ``engine.global_samples``, which goes on where a checkpoint was. None: all data.

    Raises:
        ValueError: for a total that is no whole number above 0, or when the engine's windows are not adaptive.
    """
    windows = _windows_of(engine, "train_samples")
    if total is not None and (not isinstance(total, int) or isinstance(total, bool) or total < 1):
        raise ValueError(f"ACCO: train_samples(total={total!r}) is not allowed; allowed: a whole number >= 1, or None")
    return _until_all_end(engine, windows, iter(loader), total)


_END = object()


def _until_all_end(engine, windows, batches, total):
    optimizer = engine.optimizer
    first_window = optimizer.position.window

    def is_total_reached():  # changes only where a window ends, on every rank at the same one
        return total is not None and engine.global_samples >= total

    def is_data_over():
        at = optimizer.position
        return at.window > first_window and at.is_between_windows and windows.is_data_over()

    following = _END if is_total_reached() else next(batches, _END)
    try:
        while following is not _END and not is_total_reached():
            batch, following = following, next(batches, _END)
            windows.has_data = following is not _END
            yield batch
        windows.has_data = False
        while not is_total_reached() and not is_data_over():
            windows.end_window_without_data(engine)
    finally:
        windows.has_data = True
    optimizer.finish_counting()
