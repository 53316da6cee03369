"""The trainer's modules, which lie in a folder and not in a package, and a process that a run leaves as it was."""

import signal
import sys
from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState

from .tiny import ROOT


@pytest.fixture(autouse=True)
def _training_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "training"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}  # a run takes these over
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for path in (ROOT / "training").glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture(autouse=True)
def _accelerate_begins_anew() -> Iterator[None]:
    """A run's number format would stay for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
