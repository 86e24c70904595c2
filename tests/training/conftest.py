"""What all training tests share."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def _what_was_imported_is_no_garbage():
    """Every `train()` collects garbage, and looking through all that was imported costs more than these runs."""
    gc.freeze()
    yield
    gc.unfreeze()
