import signal

import pytest

from jaxlab.training import catch_signals


def test_a_signal_waits_for_the_step_and_the_second_interrupt_does_not():
  before = signal.getsignal(signal.SIGINT)
  with catch_signals() as stopping:
    assert not stopping.after(1)
    signal.raise_signal(signal.SIGINT)
    assert stopping.after(2)
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
    with pytest.raises(SystemExit):
      stopping.finish()
  assert signal.getsignal(signal.SIGINT) is before


def test_where_nothing_is_lost_a_signal_ends_at_once():
  with catch_signals() as stopping:
    with pytest.raises(SystemExit) as stop, stopping.at_once():
      signal.raise_signal(signal.SIGTERM)
      pytest.fail('the signal was not answered')
    assert stop.value.code == 0
  with catch_signals() as stopping:
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit), stopping.at_once():
      pytest.fail('the signal came before')


def test_signals_can_be_left_alone():
  before = signal.getsignal(signal.SIGTERM)
  with catch_signals(False):
    assert signal.getsignal(signal.SIGTERM) is before
