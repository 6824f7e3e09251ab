"""Gates that are closed in rounds: which, when, and for good."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import training


def test_the_least_open_gates_are_closed_and_of_equal_ones_the_later():
  mask, importance = np.array([1, 1, 0, 1, 1]), np.array([0.5, 0.1, 0.0, 0.1, 0.5])
  for count, expected in enumerate(([1, 1, 0, 1, 1], [1, 1, 0, 0, 1], [1, 0, 0, 0, 1])):
    found = jax.jit(training.remove_least)(mask, importance, count)
    np.testing.assert_array_equal(found, expected)
  last = training.remove_least(mask, importance, 9)
  np.testing.assert_array_equal(last, [1, 0, 0, 0, 0])


@pytest.mark.parametrize('kind', ['absolute', 'squared'])
def test_sums_begin_late_rounds_are_as_large_as_they_need_to_be_and_then_it_stays(kind):
  gates, keep, begin, end, rounds = 7, 2, 3, 9, 2
  optimizer = training.by_path([
    ('mask', training.select_gates(keep, begin=begin, end=end, rounds=rounds, kind=kind)),
    ('.*', optax.sgd(0.1)),
  ])  # fmt: skip
  rng = np.random.default_rng(0)
  params = {'mask': jnp.ones(gates), 'kernel': jnp.ones(2)}
  state, step = optimizer.init(params), jax.jit(optimizer.update)
  mask, sums = np.ones(gates), np.zeros(gates)
  for index in range(12):
    gradients = rng.normal(size=gates)
    updates, state = step({'mask': gradients, 'kernel': jnp.ones(2)}, state, params)
    params = optax.apply_updates(params, updates)
    if index >= begin:
      sums += np.abs(gradients) if kind == 'absolute' else gradients**2
    if index + 1 in (6, 9):
      alive = np.flatnonzero(mask)
      count = min(3, len(alive) - keep)  # of 5 in 2 rounds
      mask[alive[np.argsort(sums[alive])[:count]]] = 0
      sums[:] = 0
    np.testing.assert_array_equal(params['mask'], mask)
  assert mask.sum() == keep
  np.testing.assert_allclose(params['kernel'], 1 - 1.2, atol=1e-6)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'keep': 0, 'begin': 0, 'end': 5}, 'keep=0'),
    ({'keep': 1, 'begin': 5, 'end': 5}, 'begin=5, end=5'),
    ({'keep': 1, 'begin': 0, 'end': 5}, 'rounds=10: 5 steps'),
    ({'keep': 1, 'begin': 0, 'end': 20, 'kind': 'mean'}, "kind is 'mean'"),
  ],
)
def test_options_that_cannot_be_are_refused(options, message):
  keep = options.pop('keep')
  with pytest.raises(ValueError, match=message):
    training.select_gates(keep, **options)


def test_a_mask_with_too_few_gates_is_refused():
  with pytest.raises(ValueError, match='not so many gates'):
    training.select_gates(4, begin=0, end=20).init({'mask': jnp.ones(3)})
  with pytest.raises(ValueError, match=r'\[gates\]'):
    training.remove_least(jnp.ones(3), jnp.ones(4), 1)
