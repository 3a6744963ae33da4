"""A stage lets go of what it has sent (its part in a schedule: `test_pipeline_engine`)."""

from __future__ import annotations

import weakref
from typing import Any

from autopar.runtime.pipeline_stage import PieceStage


class Work:
    """Of one message; waiting notes its name and which messages are still held."""

    def __init__(self, name: str, waits: list[tuple[str, int]], held: Any) -> None:
        self.name, self.waits, self.held = name, waits, held
        held.add(self)

    def wait(self) -> None:
        self.waits.append((self.name, len(self.held)))


def test_sends_are_waited_for_once_in_order_and_let_go() -> None:
    stage: Any = object.__new__(PieceStage)  # of no process group
    stage.clear_runtime_states()
    waits: list[tuple[str, int]] = []
    held: weakref.WeakSet[Work] = weakref.WeakSet()
    stage.sent.update({k: [Work(f"forward {k}", waits, held)] for k in (2, 1)})
    stage.sent_back.extend([Work(f"backward {k}", waits, held)] for k in (1, 2))
    stage.finish_sends()
    stage.finish_sends()
    # One more is held than is left: that which is waited for.
    assert waits == [("forward 1", 4), ("forward 2", 3), ("backward 1", 2), ("backward 2", 1)]
    assert not held and not stage.sent and not stage.sent_back
