"""What surrounds work: without what libraries print and a reader can do nothing about; stopped in order."""

import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any


@contextmanager
def quiet(*messages: str) -> Iterator[None]:
    """Inside, transformers shows no progress bars and prints errors only; its former settings return afterwards.

    Args:
        messages: regular expressions; a warning in whose text one of them is found is not shown either.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings() if messages else nullcontext():
            for message in messages:
                warnings.filterwarnings("ignore", message=f"(?s).*{message}")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def answering(handler: Callable[..., Any], *numbers: int) -> Iterator[None]:
    """Inside, `handler` is called for these signals; what is no main thread hears of none and changes nothing."""
    heard = numbers if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def interruptible() -> AbstractContextManager[None]:
    """Let SIGTERM (a batch system's stop) end what is at work as Ctrl-C does: in order, with its record written."""
    return answering(signal.default_int_handler, signal.SIGTERM)
