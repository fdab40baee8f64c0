"""The clock that compares calls: what it counts, and that it takes turns."""

from __future__ import annotations

import pytest

from maskedlinear import _timing


def test_calls_take_turns_and_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    monkeypatch.setattr(_timing.time, "perf_counter", lambda: now[0])

    def call(name: str, seconds: list[float]) -> None:
        order.append(name)
        now[0] += seconds.pop(0) if len(seconds) > 1 else seconds[0]

    slow, fast = [0.2, 0.2, 0.3, 0.1, 0.2], [0.05]
    found = _timing.median_seconds({"slow": lambda: call("slow", slow), "fast": lambda: call("fast", fast)})
    assert found == {"slow": pytest.approx(0.2), "fast": pytest.approx(0.05)}
    assert order[4:8] == ["slow", "fast", "slow", "fast"], "after one call that compiles and one that is counted, each"
