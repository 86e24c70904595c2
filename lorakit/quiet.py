"""Without what libraries print and a reader can do nothing about: notebooks compare what a cell prints."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext


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
