import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_vectors import assert_close, golden

from jaxlab.training.averaging import (
  average_pytrees,
  running_average,
  warm_decay,
  warm_decay_per_epoch,
)


def unstacked(vectors, dtype):
  stacked = {name: jnp.asarray(vectors[f'in_stacked_{name}'], dtype) for name in ('kernel', 'bias')}
  count = len(stacked['kernel'])
  return [{'params': jax.tree.map(lambda a, k=k: a[k], stacked)} for k in range(count)]


@golden('idmm', 'ema_warmup')
def test_a_moving_average_with_warm_decay_agrees_with_official_code(vectors):
  average, found = jnp.asarray(vectors['in_initial']), []
  for count, new in enumerate(vectors['in_param_sequence'], 1):
    share = warm_decay(vectors.param('decay'), count)
    average = optax.incremental_update(new, average, 1 - share)
    found.append(average)
  assert_close(jnp.stack(found), vectors['out_shadow_sequence'], 5e-6)


@golden('up_vits', 'finetune_pieces')
def test_an_average_that_moves_once_an_epoch_agrees_with_official_code(vectors):
  average, found = jnp.asarray(vectors['in_ema_initial']), []
  share = warm_decay_per_epoch(vectors.param('ema_decay'), 4)
  for step in range(1, 4 * len(vectors['in_ema_values']) + 1):
    new = vectors['in_ema_values'][(step - 1) // 4]
    average = optax.incremental_update(new, average, 1 - share(step))
    found.append(average)
  assert_close(jnp.stack(found[3::4]), vectors['out_ema'], 5e-6)
  assert_close(found[6], vectors['out_ema'][0], 5e-6)


def test_an_average_by_epochs_needs_a_share_and_steps():
  for decay, steps in ((1.1, 4), (0.9, 0)):
    with pytest.raises(ValueError, match=f'decay={decay}, steps_per_epoch={steps}'):
      warm_decay_per_epoch(decay, steps)


@golden('btm', 'merge_weights')
@pytest.mark.parametrize('dtype, rtol', [('float64', 1e-12), ('float32', 2e-6)])
def test_merged_networks_agree_with_reference_at_once_and_one_by_one(vectors, dtype, rtol):
  with jax.enable_x64(dtype == 'float64'):
    trees = unstacked(vectors, dtype)
    soup = jax.jit(average_pytrees)(trees)
    move = jax.jit(running_average)
    running = trees[0]
    for count, tree in enumerate(trees[1:], start=1):
      running = move(running, tree, count)
    for merged in (soup, running):
      for name in ('kernel', 'bias'):
        assert_close(merged['params'][name], vectors[f'out_merged_{name}'], rtol)
    first, second = (tree['params']['kernel'] for tree in trees[:2])
    distance = jnp.linalg.norm(first - second)
    assert_close(distance, vectors['out_l2_distance_first_second'], rtol)


def test_integers_and_keys_come_from_the_first_tree_and_dtypes_stay():
  def tree(value):
    return {
      'w': jnp.full(2, value, jnp.bfloat16),
      'steps': jnp.int32(value),
      'key': jax.random.key(value),
      'host': np.float64(value),
    }

  merged = average_pytrees([tree(1), tree(2), tree(6)])
  assert merged['w'].dtype == jnp.bfloat16 and float(merged['w'][0]) == 3
  assert float(merged['host']) == 3
  assert int(merged['steps']) == 1 and merged['key'] == jax.random.key(1)
  moved = running_average(tree(1), tree(4), 2)
  assert int(moved['steps']) == 1 and float(moved['w'][0]) == 2


def test_low_precision_trees_are_summed_in_float32():
  # In bfloat16 256 + 1 is 256: the sum would stand still.
  trees = [{'w': jnp.array([256.0], jnp.bfloat16)}] + [{'w': jnp.ones(1, jnp.bfloat16)}] * 255
  assert_close(average_pytrees(trees)['w'], [511 / 256], 4e-3)


def test_one_tree_is_its_own_average():
  tree = {'w': jnp.array([0.1, jnp.inf])}
  assert average_pytrees([tree])['w'] is tree['w']
  np.testing.assert_array_equal(
    running_average({'w': jnp.array([7.0, 7.0])}, tree, 0)['w'][0], np.float32(0.1)
  )


@pytest.mark.parametrize(
  'other, message',
  [
    ({'a': {'w': jnp.zeros((2, 3))}}, r'a/w: float32 \(2,\) and float32 \(2, 3\) \(trees\[1\]\)'),
    ({'a': {'w': jnp.zeros(2, jnp.bfloat16)}}, r'a/w: float32 \(2,\) and bfloat16'),
    ({'a': {}}, r'missing in trees\[1\]: a/w'),
    ({'a': {'w': jnp.zeros(2)}, 'b': jnp.zeros(1)}, r'only in trees\[1\]: b'),
  ],
)
def test_networks_of_another_architecture_raise_with_the_path(other, message):
  first = {'a': {'w': jnp.zeros(2)}}
  with pytest.raises(ValueError, match=message):
    average_pytrees([first, other])
  with pytest.raises(ValueError, match=message.replace(r'trees\[1\]', 'new')):
    running_average(first, other, 1)


def test_the_count_may_be_an_array_that_a_compiled_program_closes_over():
  for count in (jnp.int32(1), jnp.float32(1.0), np.int64(1)):
    moved = jax.jit(lambda old, new, count=count: running_average(old, new, count))(1.0, 2.0)
    assert float(moved) == 1.5
    with pytest.raises(ValueError, match='is negative'):
      jax.jit(lambda old, new, count=count: running_average(old, new, -2 * np.asarray(count)))(
        1.0, 2.0
      )


def test_no_trees_and_negative_counts_raise():
  with pytest.raises(ValueError, match='at least one tree'):
    average_pytrees([])
  with pytest.raises(ValueError, match='count=-1 is negative'):
    running_average(1.0, 2.0, -1)
