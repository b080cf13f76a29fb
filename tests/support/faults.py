"""Puts something in the place of a public method while training runs, in the rank that asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock


def _patch(owner: type, name: str, replacement: Callable):
    original = getattr(owner, name)

    def method(self, *arguments, **options):
        return replacement(lambda *others, **more: original(self, *others, **more), self, *arguments, **options)

    return mock.patch.object(owner, name, method)


@contextmanager
def around(owner: type, name: str, replacement: Callable) -> Iterator[None]:
    """Calls ``replacement(original, self, *arguments)`` inside the block wherever ``owner``'s method is called."""
    with _patch(owner, name, replacement):
        yield


def from_now_on(owner: type, name: str, replacement: Callable) -> None:
    """Does the same until the process ends, in a rank that nobody uses again."""
    _patch(owner, name, replacement).start()
