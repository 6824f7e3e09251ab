import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.losses import tweo_loss
from jaxlab.parallel import make_mesh
from jaxlab.training import make_schedule


def blocks(seed=0):
  rng = np.random.default_rng(seed)
  shapes = (8, 6, 4), (8, 3, 2, 8), (8, 3, 2, 8)
  return [jnp.asarray(5 * rng.standard_normal(shape), jnp.float32) for shape in shapes]


def reference(outputs, tau=3.0, power=4, epsilon=1e-6):
  outputs = [np.asarray(y, np.float64) for y in outputs]
  return np.mean([np.mean((np.abs(y) / (tau + epsilon)) ** power) for y in outputs])


@golden('tweo', 'tweo_loss')
@pytest.mark.parametrize('x64', [True, False])
def test_tweo_loss_and_gradient_agree_with_reference(vectors, x64):
  options = {
    'tau': vectors['hp_tau'].item(),
    'power': vectors['hp_power'].item(),
    'epsilon': vectors['hp_eps'].item(),
  }
  rtol = 1e-9 if x64 else 1e-6
  with jax.enable_x64(x64):
    outputs = jnp.asarray(vectors['in_block_outputs'], float)
    for given in (outputs, list(outputs)):
      step = jax.jit(jax.value_and_grad(lambda y: tweo_loss(y, **options)))
      value, grad = step(given)
      assert_close(value, vectors['out_loss'], rtol)
      assert_close(
        jnp.stack(grad) if isinstance(grad, list) else grad, vectors['grad_block_outputs'], rtol
      )
    each = [tweo_loss([y], **options) for y in outputs]
    assert_close(jnp.stack(each), vectors['out_loss_per_block'], rtol)


@pytest.mark.parametrize('power', [1, 1.5, 2, 3, 4, 6])
def test_every_power_is_the_formula_and_has_no_gradient_at_zero(power):
  outputs = blocks()
  value = tweo_loss(outputs, power=power, tau=2.0)
  np.testing.assert_allclose(value, reference(outputs, 2.0, power), rtol=1e-5)
  grad = jax.grad(lambda y: tweo_loss([y], power=power))(jnp.array([[0.0, 3.0, -3.0]]))
  np.testing.assert_allclose(grad, [[0, power / 9, -power / 9]], rtol=1e-5)


def test_half_precisions_neither_overflow_nor_lose_the_sum():
  # Powers of two, whose sum in float32 is exact in whatever order a compiler takes it.
  outputs = [jnp.full((2, 64, 64), 1024.0, dtype) for dtype in (jnp.float16, jnp.bfloat16)]
  assert tweo_loss(outputs, tau=4.0, epsilon=0.0) == reference(outputs, 4.0, epsilon=0.0) == 2**32
  grads = jax.grad(lambda y: 1e-3 * tweo_loss(y))(outputs)
  assert [g.dtype for g in grads] == [jnp.float16, jnp.bfloat16]
  assert all(np.all(np.isfinite(g)) for g in grads)


def test_padding_is_left_out():
  outputs = [y.reshape(8, 6, -1) for y in blocks()]
  mask = np.arange(6) < np.arange(8)[:, None] % 6 + 1
  expected = np.mean([np.mean((np.abs(np.asarray(y)[mask]) / 3) ** 4) for y in outputs])
  np.testing.assert_allclose(tweo_loss(outputs, mask=mask, epsilon=0), expected, rtol=1e-5)
  same = [outputs[1], 2 * outputs[1]]
  np.testing.assert_allclose(
    tweo_loss(jnp.stack(same), mask=mask), tweo_loss(same, mask=mask), rtol=1e-6
  )
  assert tweo_loss(outputs, mask=np.zeros((8, 6))) == 0


@pytest.mark.exhaustive
def test_transformations_agree():
  outputs = blocks()
  eager, compiled = tweo_loss(outputs), jax.jit(tweo_loss)(outputs)
  np.testing.assert_allclose(eager, compiled, rtol=1e-6)
  loop = [tweo_loss([y[i : i + 1] for y in outputs]) for i in range(8)]
  mapped = jax.vmap(lambda ys: tweo_loss([y[None] for y in ys]))(outputs)
  np.testing.assert_allclose(mapped, jnp.stack(loop), rtol=1e-6)
  sharding = NamedSharding(make_mesh(), PartitionSpec('data'))
  value, grads = jax.jit(jax.value_and_grad(tweo_loss))(jax.device_put(outputs, sharding))
  np.testing.assert_allclose(value, eager, rtol=1e-6)
  for got, expected in zip(grads, jax.grad(tweo_loss)(outputs), strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_its_weight_falls_as_a_cosine():
  schedule = make_schedule('cosine', 0.01, epochs=1, steps_per_epoch=50)
  steps = np.arange(51)
  expected = 0.01 * 0.5 * (1 + np.cos(np.pi * steps / 50))
  np.testing.assert_allclose(jax.vmap(schedule)(steps), expected, atol=1e-8)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'tau': 0.0}, 'tau must be positive, got 0.0'),
    ({'tau': -1.0}, 'tau must be positive'),
    ({'power': 0.5}, 'power must be at least 1, got 0.5'),
    ({'epsilon': -1.0}, 'epsilon must not be negative'),
    ({'block_outputs': []}, 'holds no block'),
    ({'block_outputs': jnp.zeros((0, 2, 3))}, 'holds no block'),
    ({'block_outputs': [jnp.zeros((2, 3), int)]}, 'must be floats, got int32'),
    (
      {'mask': jnp.ones((8, 5))},
      r'mask must be \[batch, time\] of the block outputs, got \(8, 5\)',
    ),
  ],
)
def test_bad_arguments_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    tweo_loss(**{'block_outputs': blocks(), **change})


def test_padding_that_is_not_finite_has_no_value_and_no_slope():
  y = jnp.array([[[1.0, -5.0], [jnp.inf, jnp.nan]]])
  mask = jnp.array([[True, False]])
  value, slope = jax.value_and_grad(lambda y: tweo_loss([y], mask=mask))(y)
  expected = np.mean((np.array([1.0, -5.0]) / (3 + 1e-6)) ** 4)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  assert np.all(np.isfinite(slope)) and not np.any(slope[0, 1])
