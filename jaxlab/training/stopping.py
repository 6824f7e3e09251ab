"""SIGTERM and Ctrl-C: they end a run where nothing gets lost."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


class Stopping:
  """What `catch_signals` yields: whether a signal has come, and where it may act at once."""

  def __init__(self) -> None:
    """No signal has come yet."""
    self._received = self._at_once = False

  def after(self, step: int) -> bool:
    """Returns whether to save and stop after `step`; the same in all processes."""
    if jax.process_count() > 1:
      # All must stop after the same step: jax's preemption service listens to SIGTERM and agrees on one.
      return multihost_utils.reached_preemption_sync_point(step)
    return self._received

  def finish(self) -> None:
    """Ends the process, with status 0, if a signal has come."""
    if self._received:
      raise SystemExit(0)

  @contextlib.contextmanager
  def at_once(self) -> Iterator[None]:
    """Inside, a signal ends the process at once by `SystemExit(0)`: for work that can be done again."""
    self.finish()
    self._at_once = True
    try:
      yield
    finally:
      self._at_once = False

  def receive(self, number: int, _: Any) -> None:
    """Takes a signal; the second Ctrl-C interrupts whatever goes on."""
    if self._received and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._received = True
    if self._at_once:
      raise SystemExit(0)


@contextlib.contextmanager
def catch_signals(catch: bool = True) -> Iterator[Stopping]:
  """Takes SIGTERM and Ctrl-C for the time of a `with` block, and gives them back as they were.

  Outside of the main thread signals cannot be taken, and with several processes they are jax's: there
  `Stopping.after` alone says when to stop.

  Args:
    catch: with False signals are left alone.
  """
  stopping, previous = Stopping(), {}
  if catch and jax.process_count() == 1:
    with contextlib.suppress(ValueError):  # not in the main thread
      for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, stopping.receive)
  try:
    yield stopping
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
