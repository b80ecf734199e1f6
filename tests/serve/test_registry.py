"""Which experts take no part is not forgotten when the registry, or a group too, begins anew."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from serve import registry as module
from serve.registry import ExpertRegistry


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """In most of these tests nobody reports after a change."""
    monkeypatch.setattr(module, "TOLD_S", 0.0)


def run(test: Callable[[Any], Awaitable[None]]) -> None:
    async def begin() -> None:
        await test(ExpertRegistry.func_or_class())

    asyncio.run(begin())


async def report(registry: Any, disabled: set[int] | None, replica: str = "a") -> set[int] | None:
    """What a group's replica is told that has been told these, or nothing."""
    answer: set[int] | None = await registry.report(replica, Counter(), Counter(), disabled)
    return answer


def test_experts_leave_and_come_back_but_for_the_last() -> None:
    async def test(registry: Any) -> None:
        assert await report(registry, None) is None
        assert await report(registry, set()) == set()
        assert await registry.set_active(1, False, 2)
        assert await report(registry, None) == {1}
        assert await registry.set_active(0, False, 2) is False
        assert await registry.set_active(1, True, 2)
        assert await report(registry, {1}) == set()

    run(test)


def test_a_new_roster_changes_nothing_before_it_knows() -> None:
    async def test(registry: Any) -> None:
        assert await registry.set_active(0, False, 2) is None
        assert await report(registry, {1}) == {1}
        assert await registry.set_active(0, False, 2) is False
        assert (await registry.stats())[2] == {1}

    run(test)


def test_a_group_that_is_new_too_makes_it_forget_nothing() -> None:
    async def test(registry: Any) -> None:
        assert await report(registry, None) is None
        assert await report(registry, {1}) == {1}
        assert await report(registry, None) == {1}

    run(test)


def test_a_change_is_done_when_all_replicas_have_heard_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is gone is waited for once."""

    async def test(registry: Any) -> None:
        for replica in ("a", "b", "gone"):
            await report(registry, set(), replica)
        assert await registry.set_active(0, False, 3)
        monkeypatch.setattr(module, "TOLD_S", 60.0)
        for replica in ("a", "b"):
            await report(registry, {0}, replica)
        change = asyncio.create_task(registry.set_active(1, False, 3))
        for replica in ("a", "b"):
            await asyncio.sleep(0.01)
            assert not change.done()
            assert await report(registry, {0}, replica) == {0, 1}
        assert await change

    run(test)
