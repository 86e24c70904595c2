"""Trainers that take turns: every step of one is followed by the same step of the other, and none waits for ever."""

from __future__ import annotations

import pytest

from lorakit.measure import lockstep


class Stub:
    """As much of a Trainer as a turn needs."""

    def __init__(self, name: str, said: list[str], steps: int = 4, broken: int = -1):
        self.name, self.said, self.steps, self.broken = name, said, steps, broken

    def add_callback(self, turn) -> None:
        self.turn = turn

    def train(self) -> None:
        self.turn.on_train_begin()
        for step in range(self.steps):
            if step == self.broken:
                raise RuntimeError("as it happens")
            self.said.append(f"{self.name}{step}")
            self.turn.on_step_end()


def test_each_step_of_all_comes_before_the_next_of_any_and_the_order_changes():
    said: list[str] = []
    seconds = lockstep.lockstep([Stub("a", said), Stub("b", said), Stub("c", said)], 4)
    assert said == [*("c0", "b0", "a0"), *("a1", "b1", "c1"), *("c2", "b2", "a2"), *("a3", "b3", "c3")]
    assert [len(times) for times in seconds] == [4, 4, 4] and all(time >= 0 for times in seconds for time in times)


@pytest.mark.parametrize("broken", [0, 1, 3, 4])
def test_what_ends_a_trainer_is_raised_and_nobody_waits_for_it(broken):
    said: list[str] = []
    with pytest.raises(RuntimeError, match="as it happens"):
        lockstep.lockstep([Stub("a", said), Stub("b", said, steps=6, broken=broken)], 4)
    assert len(said) <= 2 * broken + 1  # told at once, not when the others have ended


@pytest.mark.parametrize("steps", [2, 6])
def test_a_trainer_of_another_length_is_told_and_waited_for_no_longer_than_it_runs(steps):
    said: list[str] = []
    with pytest.raises(RuntimeError, match=f"^{steps} steps of a trainer, not 4"):
        lockstep.lockstep([Stub("a", said), Stub("b", said, steps=steps)], 4)
    assert said.count("a3") == said.count(f"b{steps - 1}") == 1
