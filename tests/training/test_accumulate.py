import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxlab.parallel import batch_sharding, make_mesh
from jaxlab.training import accumulate_gradients, cast_floating

W = jax.random.normal(jax.random.key(0), (5, 3))
BATCH = {
  'x': jax.random.normal(jax.random.key(1), (24, 5)),
  'y': jax.random.normal(jax.random.key(2), (24, 3)),
}


def loss_fn(w, state, batch):
  error = jnp.square(jnp.tanh(batch['x'] @ w) - batch['y'])
  seen = {'count': state['count'] + 1, 'last': batch['x'][0]}
  return error.mean(), (seen, {'worst': error.mean(axis=0).max(), 'mean': error.mean()})


STATE = {'count': jnp.int32(0), 'last': jnp.zeros(5)}


@pytest.mark.parametrize('n', [1, 2, 3, 8])
def test_gradients_are_those_of_the_whole_batch(n):
  whole = jax.value_and_grad(loss_fn, has_aux=True)(W, STATE, BATCH)
  (loss, (state, metrics)), gradients = jax.jit(accumulate_gradients, static_argnums=(0, 4))(
    loss_fn, W, STATE, BATCH, n
  )
  np.testing.assert_allclose(gradients, whole[1], rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(loss, whole[0][0], rtol=1e-6)
  np.testing.assert_allclose(metrics['mean'], loss, rtol=1e-6)
  assert state['count'] == n


def test_state_goes_from_microbatch_to_microbatch_in_order():
  (_, (state, metrics)), _ = accumulate_gradients(loss_fn, W, STATE, BATCH, 4)
  np.testing.assert_array_equal(state['last'], BATCH['x'][3])
  parts = [{name: x[i::4] for name, x in BATCH.items()} for i in range(4)]
  worst = [loss_fn(W, STATE, part)[1][1]['worst'] for part in parts]
  np.testing.assert_allclose(metrics['worst'], np.mean(worst), rtol=1e-6)


def test_running_statistics_of_batch_norm_are_updated_by_every_microbatch():
  bn = nn.BatchNorm(use_running_average=False, momentum=0.5, use_scale=False, use_bias=False)
  variables = jax.jit(bn.init)(jax.random.key(0), BATCH['x'])

  def loss(w, stats, batch):
    y, new = bn.apply({'batch_stats': stats}, batch['x'] + w, mutable=['batch_stats'])
    return jnp.square(y - batch['x']).mean(), (new['batch_stats'], {})

  stats = variables['batch_stats']
  (_, (found, _)), _ = accumulate_gradients(loss, jnp.zeros(5), stats, BATCH, 2)
  mean = 0.5 * (0.5 * BATCH['x'][0::2].mean(0)) + 0.5 * BATCH['x'][1::2].mean(0)
  np.testing.assert_allclose(found['mean'], mean, rtol=1e-5, atol=1e-6)


def test_microbatches_of_a_sharded_batch_move_no_example():
  batch = jax.device_put(BATCH, batch_sharding(make_mesh()))
  step = jax.jit(lambda w, b: accumulate_gradients(loss_fn, w, {**STATE}, b, 3))

  def only_sums(w, b):
    (loss, (_, metrics)), gradients = accumulate_gradients(
      lambda w, _, b: (loss_fn(w, STATE, b)[0], ({}, {})), w, {}, b, 3
    )
    return loss, metrics, gradients

  text = jax.jit(only_sums).lower(W, batch).compile().as_text()
  assert 'all-reduce' in text
  assert not any(kind in text for kind in ('all-gather', 'all-to-all', 'collective-permute'))
  chex.assert_trees_all_close(step(W, batch), step(W, BATCH), rtol=1e-5, atol=1e-6)


def test_sums_of_bfloat16_gradients_run_in_float32():
  x = jnp.ones((256, 1), jnp.bfloat16)
  x = x.at[0].set(256.0)  # 256 + 1 is not a bfloat16

  def loss(w, _, batch):
    return (w * batch).sum(), ({}, {})

  (_, _), gradient = accumulate_gradients(loss, jnp.bfloat16(1), {}, x, 256)
  assert gradient.dtype == jnp.bfloat16
  assert gradient == jnp.bfloat16((256 + 255) / 256)


@pytest.mark.parametrize('n', [0, 5])
def test_number_that_does_not_divide_the_batch_is_refused(n):
  with pytest.raises(ValueError, match=f'num_microbatches={n} .* 24 examples'):
    accumulate_gradients(loss_fn, W, STATE, BATCH, n)


def test_only_floating_point_arrays_are_cast():
  tree = {'w': jnp.ones(3), 'half': jnp.ones(2, jnp.float16), 'step': jnp.int32(3)}
  tree |= {'mask': jnp.array([True]), 'key': jax.random.key(0)}
  cast = cast_floating(tree, jnp.bfloat16)
  assert cast['w'].dtype == cast['half'].dtype == jnp.bfloat16
  for name in ('step', 'mask', 'key'):
    assert cast[name] is tree[name]


def test_gradient_through_a_cast_has_the_type_of_the_parameters():
  gradient = jax.grad(lambda w: jnp.sum(cast_floating(w, jnp.bfloat16) ** 2).astype(jnp.float32))(W)
  assert gradient.dtype == jnp.float32
  np.testing.assert_allclose(gradient, 2 * W, rtol=0.02)
