import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.parallel import make_mesh
from jaxlab.quantizers import (
  activation_fake_quantize,
  lsq_fake_quantize,
  step_of_percentiles,
  step_of_range,
)

X = jax.random.normal(jax.random.key(0), (8, 5, 6))
STEP = jnp.linspace(0.05, 0.8, 6)


@golden('gplq', 'lsq_activation')
@pytest.mark.parametrize('x64', [True, False])
def test_steps_by_channel_and_by_tensor_agree_with_reference(vectors, x64):
  rtol = 1e-9 if x64 else 5e-6
  bits = vectors['hp_bits'].item()
  with jax.enable_x64(x64):
    for suffix in ('', '_tensor'):
      x, step, cotangent = (
        jnp.asarray(vectors[name], float)
        for name in ('in_x', f'param_scale{suffix}', 'grad_cotangent')
      )

      @jax.jit
      def both(x, step, cotangent, factor=None):
        y, pull_back = jax.vjp(
          lambda x, s: activation_fake_quantize(x, s, bits, grad_factor=factor), x, step
        )
        return y, *pull_back(cotangent)

      y, grad_x, grad_step = both(x, step, cotangent)
      assert_close(y, vectors[f'out_dequant{suffix}'], rtol)
      assert_close(grad_x, vectors[f'grad_x{suffix}'], rtol)
      assert_close(grad_step, vectors[f'grad_scale{suffix}'], rtol)
      *_, unscaled = both(x, step, cotangent, 1.0)
      name = 'grad_scale_tensor_unscaled' if suffix else 'grad_scale_unscaled'
      assert_close(unscaled, vectors[name], rtol)
      assert_close(
        grad_step / unscaled, np.full(step.shape, vectors[f'hp_grad_scale{suffix}']), 1e-5
      )


def test_at_the_bounds_both_get_a_gradient_and_zero_is_inside():
  x = jnp.array([-2.0, -2.1, 0.0, 1.0, 1.2, 0.4])  # two bits: codes -2 to 1
  grad = jax.grad(lambda x, s: activation_fake_quantize(x, s, 2, grad_factor=1.0).sum(), (0, 1))
  np.testing.assert_allclose(grad(x, jnp.float32(1))[0], [1, 0, 1, 1, 0, 1])
  np.testing.assert_allclose(grad(x, jnp.float32(1))[1], -2 - 2 + 0 + 1 + 1 - 0.4, rtol=1e-6)
  other = jax.grad(lambda s: lsq_fake_quantize(x, s, -2.0, 1.0, grad_factor=1.0).sum())(
    jnp.float32(1)
  )
  np.testing.assert_allclose(other, 0 - 2 + 0 + 0 + 1 - 0.4, rtol=1e-6)


@pytest.mark.exhaustive
def test_the_default_factor_counts_the_elements_of_a_step():
  def grads(**options):
    return jax.grad(lambda s: (activation_fake_quantize(X, s, 3, **options) * X).sum())

  plain = grads(grad_factor=1.0)
  np.testing.assert_allclose(grads()(STEP), plain(STEP) / np.sqrt(40 * 3), rtol=1e-5)
  one = jnp.float32(0.3)
  np.testing.assert_allclose(grads()(one), plain(one) / np.sqrt(240 * 3), rtol=1e-5)


def test_channels_may_lie_on_any_axis_and_count_alone():
  expected = jnp.stack([activation_fake_quantize(X[..., c], STEP[c], 4) for c in range(6)], -1)
  np.testing.assert_array_equal(activation_fake_quantize(X, STEP, 4), expected)
  moved = activation_fake_quantize(jnp.moveaxis(X, -1, 1), STEP, 4, axis=1)
  np.testing.assert_array_equal(jnp.moveaxis(moved, 1, -1), expected)


@pytest.mark.exhaustive
def test_transformations_agree():
  loss = lambda x, s: (activation_fake_quantize(x, s, 4) * x).sum()  # noqa: E731
  expected = jax.grad(loss, (0, 1))(X, STEP)
  split = jax.device_put(X, NamedSharding(make_mesh(), PartitionSpec('data')))
  for given in (X, split):
    for got, wanted in zip(jax.jit(jax.grad(loss, (0, 1)))(given, STEP), expected, strict=True):
      np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
  mapped = jax.vmap(lambda x: activation_fake_quantize(x, STEP, 4))(X)
  np.testing.assert_array_equal(mapped, activation_fake_quantize(X, STEP, 4))
  half = activation_fake_quantize(X.astype(jnp.bfloat16), STEP, 4)
  assert half.dtype == jnp.bfloat16
  traced = jax.jit(lambda bits: activation_fake_quantize(X, STEP, bits))(4.0)
  np.testing.assert_allclose(traced, activation_fake_quantize(X, STEP, 4), rtol=1e-5)


def test_steps_that_sank_are_lifted_and_get_no_gradient():
  for step in (-0.5, 0.0, 1e-9):
    value, grad = jax.value_and_grad(lambda s: activation_fake_quantize(X, s, 4).sum())(step)
    assert np.isfinite(value) and grad == 0


def test_first_steps():
  np.testing.assert_allclose(step_of_range(-3.0, 2.0, 4), 3 / 7, rtol=1e-6)
  dead = step_of_range(jnp.array([0.0, -1.0]), jnp.array([0.0, 0.5]), 3)
  np.testing.assert_allclose(dead, [1e-8, 1 / 3], rtol=1e-6)
  x = jnp.linspace(-1, 3, 401)
  np.testing.assert_allclose(step_of_percentiles(x, 4), np.quantile(x, 0.99) / 7, rtol=1e-5)
  np.testing.assert_allclose(
    step_of_percentiles(-x, 4, lower=0.1, upper=0.9), -np.quantile(-x, 0.1) / 7, rtol=1e-5
  )


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: activation_fake_quantize(X, STEP, 1), 'bits must lie in'),
    (lambda: activation_fake_quantize(X, STEP, 9), r'bits must lie in \[2, 8\]; got 9'),
    (lambda: activation_fake_quantize(X, STEP[:5], 4), r'step \(5,\).*axis -1 of x \(8, 5, 6\)'),
    (lambda: activation_fake_quantize(X, STEP, 4, axis=3), r'axis 3 of x'),
    (lambda: step_of_range(0.0, jnp.nan, 4), 'not finite'),
    (lambda: step_of_percentiles(jnp.zeros((0, 3)), 4), 'no values'),
  ],
)
def test_bad_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
