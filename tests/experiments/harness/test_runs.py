import pytest

from experiments.harness import runs


@pytest.mark.parametrize(
  'losses, falls',
  [
    ([2.3, 2.3, 2.2999], False),
    ([2.3, 2.0, 2.4], True),
    ([-0.1, -0.5, -0.9], True),
    ([-0.5, -0.5, -0.4], False),
    ([2.3, 2.3], True),
  ],
)
def test_a_loss_that_does_not_fall_is_said(losses, falls):
  said = runs.not_falling([{'step': step, 'loss': loss} for step, loss in enumerate(losses)])
  assert (said == '') == falls
  assert falls or 'did not fall' in said
