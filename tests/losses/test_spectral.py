import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.losses import top_singular_loss


@pytest.mark.parametrize(('power', 'count'), [(2, 3), (1, 2), (3, 9)])
@pytest.mark.parametrize('x64', [True, False])
def test_value_and_gradient_are_those_of_the_decomposition(power, count, x64):
  rtol = 1e-9 if x64 else 2e-5
  kernels = np.random.default_rng(0).standard_normal((2, 5, 7))
  left, values, right = np.linalg.svd(kernels, full_matrices=False)
  kept = np.arange(5) < count
  expected = (values**power * kept).sum(-1)
  slope = (left * (power * values ** (power - 1) * kept)[:, None]) @ right
  with jax.enable_x64(x64):
    given = jnp.asarray(kernels, float)
    found = jax.jit(lambda k: top_singular_loss(k, power, count))(given)
    np.testing.assert_allclose(found, expected, rtol=rtol)
    grads = jax.grad(lambda k: top_singular_loss(k, power, count).sum())(given)
    np.testing.assert_allclose(grads, slope, rtol=rtol, atol=rtol * np.abs(slope).max())
    each = jax.vmap(lambda k: top_singular_loss(k, power, count))(given)
    np.testing.assert_allclose(each, expected, rtol=rtol)


def test_gradients_are_finite_at_zeros_and_equal_values():
  for kernel in (jnp.zeros((3, 4)), jnp.eye(4), jnp.ones((3, 3))):
    assert np.all(np.isfinite(jax.grad(top_singular_loss)(kernel)))
  half = top_singular_loss(jnp.eye(3, dtype=jnp.bfloat16))
  assert half.dtype == jnp.float32 and half == 3


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'power': 0.5}, 'power must be at least 1, got 0.5'),
    ({'count': 0}, 'count must be a positive whole number, got 0'),
    ({'kernel': jnp.ones(3)}, r'kernel must be \[..., in, out\], got \(3,\)'),
  ],
)
def test_bad_arguments_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    top_singular_loss(**{'kernel': jnp.ones((2, 3)), **change})
