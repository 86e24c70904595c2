"""Trainers in one process taking turns step by step, so that a slow moment of the machine falls on both."""

import threading
import time
from collections.abc import Sequence

import torch
from transformers import Trainer, TrainerCallback

FOR_EVER = 10**6  # turns: a trainer that ends early is not waited for, one that goes on may


class _Turns(TrainerCallback):
    """Lets its trainer run one step at a time, when told, and keeps the seconds each took.

    Added last, a turn ends after every other callback's `on_step_end`; logging falls into the next turn.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.thread = threading.Thread(target=self._train, args=(trainer,), daemon=True)
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.seconds: list[float] = []
        self.error: BaseException | None = None
        self._start = 0.0

    def on_train_begin(self, *_, **__) -> None:
        self._rest()

    def on_step_end(self, *_, **__) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)
        self._rest()

    def wait(self) -> None:
        """Until it is told to rest, or has ended."""
        self.done.acquire()
        if self.error:
            raise self.error

    def _rest(self) -> None:
        self.done.release()
        self.go.acquire()
        self._start = time.perf_counter()

    def _train(self, trainer: Trainer) -> None:
        trainer.add_callback(self)
        try:
            trainer.train()
        except BaseException as error:
            self.error = error
        finally:
            self.done.release(FOR_EVER)


def lockstep(trainers: Sequence[Trainer], steps: int) -> list[list[float]]:
    """Seconds of every step of every trainer; each must be set to run `steps` steps, neither more nor fewer.

    What ends one of them is raised at once; the others are left waiting, in threads that end with the program.
    """
    turns = [_Turns(trainer) for trainer in trainers]
    for turn in turns:  # one at a time: setting up is not thread-safe
        turn.thread.start()
        turn.wait()
    for step in range(steps):
        for turn in turns if step % 2 else turns[::-1]:
            turn.go.release()
            turn.wait()
    for turn in turns:
        turn.go.release(FOR_EVER)
        turn.thread.join()
        turn.wait()
        if len(turn.seconds) != steps:
            raise RuntimeError(f"{len(turn.seconds)} steps of a trainer, not {steps}")
    return [turn.seconds for turn in turns]
