# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Keeps the accumulated gradient A of one rank, and what ``p.grad`` is meanwhile.

::

    CLEAN  --attach-->  OPEN  --take-->  TAKEN  --attach--> OPEN
      ^___ mark_packed, clear ___|__________|

CLEAN: A is zero. OPEN: a training forward was seen, and what autograd delivers goes into A: where the dtypes are the
same ``p.grad`` is a view of A and autograd adds to it itself, else each gradient is added to A and freed. TAKEN: A has
the window's whole sum and ``p.grad`` is None, as ZeRO-1 leaves it at a window's last backward, so that nobody takes
this rank's own sum for the gradient of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from torch import Tensor


class GradientState(Enum):
    """Says what A holds."""

    CLEAN = "clean"
    OPEN = "open"
    TAKEN = "taken"


class Gradients:
    """Owns ``p.grad`` of the parameters, and each one's view of A.

    Args:
        views: (parameter, its part of A in its shape), of the trainable parameters. ``p.grad`` gets another view of the
            same, since ``module.double()`` gives that very object another storage.
        accumulators: A, one flat tensor per parameter group.
    """

    def __init__(self, views: Sequence[tuple[Tensor, Tensor]], accumulators: Sequence[Tensor]):
        self._accumulators = list(accumulators)
        self._versions = self._current_versions()
        self._views = list(views)
        self._index_of = {id(param): index for index, (param, _) in enumerate(self._views)}
        self._given = [view.view_as(view) for _, view in self._views]
        self._addresses = [view.data_ptr() for _, view in self._views]
        self._state = GradientState.CLEAN

    @property
    def state(self) -> GradientState:
        """Returns what A holds now."""
        return self._state

    def attach(self) -> None:
        """Makes what the next backward delivers go into A; before every training forward. A ``p.grad`` that was dropped
        in mid-window means zero, as for every optimizer."""
        self.collect()
        drops_old = self._state is GradientState.OPEN
        self._state = GradientState.OPEN
        for (param, view), given in zip(self._views, self._given):
            if param.grad is None and view.dtype == param.dtype:
                if drops_old:
                    view.zero_()
                param.grad = given
        self._versions = self._current_versions()

    def _current_versions(self) -> list[int]:
        """Returns autograd's counts of in-place changes; those of a view are its base's."""
        return [grads._version for grads in self._accumulators]

    def take_whether_changed(self) -> bool:
        """Tells whether anything was added to A since the last call, by autograd or by :meth:`collect`; never waits."""
        before, self._versions = self._versions, self._current_versions()
        return self._versions != before

    def collect(self) -> None:
        """Takes over every gradient that does not lie in A yet; once after every backward."""
        for index in range(len(self._views)):
            self._collect_one(index)

    def collect_from(self, param: Tensor) -> None:
        """Takes over one parameter's gradient, by DeepSpeed's hook, where gradients must be freed one by one."""
        self._collect_one(self._index_of[id(param)])

    def _collect_one(self, index: int) -> None:
        (param, view), given = self._views[index], self._given[index]
        grad = param.grad
        if grad is None or (grad is given and grad.data_ptr() == self._addresses[index]):
            return
        if grad is given:
            given = self._given[index] = view.view_as(view)
        if grad.is_sparse:
            raise ValueError(
                "ACCO: sparse gradients are not allowed; allowed: dense. Build the embedding with sparse=False"
            )
        if view.dtype != param.dtype or self._state is GradientState.TAKEN:
            view.add_(grad.detach())
            param.grad = None
        else:  # after zero_grad(set_to_none=True) or create_graph=True: it is the whole sum
            view.copy_(grad.detach())
            param.grad = given
        if self._state is GradientState.CLEAN:
            self._state = GradientState.OPEN

    def take(self) -> None:
        """Leaves ``p.grad`` None and the sum in A: the window's last backward is over."""
        self.collect()
        if self._state is not GradientState.TAKEN:
            self._drop()
            self._state = GradientState.TAKEN

    def mark_packed(self) -> None:
        """Notes that the window's gradients were packed and A zeroed, or that A was zeroed."""
        self._drop()
        self._state = GradientState.CLEAN
        self._versions = self._current_versions()

    def _drop(self):
        for param, _ in self._views:
            param.grad = None

    def view_of_whole(self, param: Tensor) -> Tensor:
        """Returns the parameter's part of the window's sum.

        Raises:
            ValueError: outside of a window's end, where A has not the whole sum.
        """
        if self._state is not GradientState.TAKEN:
            raise ValueError(
                "ACCO: the full gradient was asked for or set outside of a window's end; allowed: after the last "
                "backward of a window and before engine.step(). Move the call there"
            )
        return self._views[self._index_of[id(param)]][1]

    def release(self) -> None:
        """Drops all views of A, so that it can be freed."""
        self._drop()
        self._views.clear()
        self._index_of.clear()
        self._given.clear()
        self._accumulators.clear()
