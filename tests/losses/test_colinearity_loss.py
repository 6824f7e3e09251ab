import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.evaluation import colinearity_index
from jaxlab.losses import colinearity_loss

KINDS = ('product', 'row_power', 'excess', 'cosine')


def pair(seed=0, heads=3, rows=6, hidden=5, out=8):
  rng = np.random.default_rng(seed)
  first, second = (
    rng.standard_normal((heads, rows, hidden)),
    rng.standard_normal((heads, hidden, out)),
  )
  second[:, :, 2] *= 9  # a channel of abnormal gain
  return first, second


def reference(first, second, kind, power=4, ratio=2):
  """Value and closed-form gradients in float64, column notation: y = B A x."""
  a, b = first.T, second.T
  product = b @ a
  gains = np.linalg.norm(product, axis=1)
  if kind == 'product':
    value, inner = (product**2).sum() / 2, product
  elif kind == 'row_power':
    value, inner = (gains**power).sum() / power, gains[:, None] ** (power - 2) * product
  elif kind == 'excess':
    over = np.maximum(gains - ratio * np.median(gains), 0)
    value = (over**2).sum() / 2
    inner = np.where(gains > 0, over / np.where(gains > 0, gains, 1), 0)[:, None] * product
  else:
    hidden, size_a, size_b = len(a), (a**2).sum(), (b**2).sum()
    value = hidden * (product**2).sum() / (size_a * size_b) / 2
    share = hidden / (size_a * size_b)
    grad_a = share * b.T @ product - 2 * value * a / size_a
    grad_b = share * product @ a.T - 2 * value * b / size_b
    return value, grad_a.T, grad_b.T
  return value, (b.T @ inner).T, (inner @ a.T).T


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('x64', [True, False])
def test_value_and_gradients_are_the_closed_forms(kind, x64):
  rtol = 1e-10 if x64 else 2e-5
  first, second = pair()
  with jax.enable_x64(x64):
    step = jax.jit(
      jax.value_and_grad(lambda *kernels: colinearity_loss(*kernels, kind).sum(), (0, 1))
    )
    value, grads = step(jnp.asarray(first, float), jnp.asarray(second, float))
    expected = [reference(a, b, kind) for a, b in zip(first, second)]
    np.testing.assert_allclose(value, sum(e[0] for e in expected), rtol=rtol)
    for i in range(2):
      wanted = np.stack([e[i + 1] for e in expected])
      np.testing.assert_allclose(grads[i], wanted, rtol=rtol, atol=rtol * np.abs(wanted).max())


def test_options_change_power_and_threshold():
  first, second = (kernel[0] for kernel in pair(1))
  for kind, options in (('row_power', {'power': 3}), ('excess', {'ratio': 1.2})):
    value = colinearity_loss(first, second, kind, **options)
    np.testing.assert_allclose(value, reference(first, second, kind, **options)[0], rtol=1e-5)


def test_the_product_is_the_weighted_sum_of_squared_alignments():
  first, second = (kernel[0] for kernel in pair(2))
  _, values, left = np.linalg.svd(first, full_matrices=False)
  expected = ((values[:, None] * (left @ second)) ** 2).sum() / 2
  np.testing.assert_allclose(colinearity_loss(first, second), expected, rtol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_zeros_have_finite_gradients(kind):
  first, second = pair()
  second[:, :, 4] = 0
  for kernels in (
    (first, second),
    (0 * first, second),
    (first, 0 * second),
    (0 * first, 0 * second),
  ):
    value, grads = jax.value_and_grad(lambda *k: colinearity_loss(*k, kind).sum(), (0, 1))(
      *(jnp.asarray(k, jnp.float32) for k in kernels)
    )
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in grads)
    if not np.any(kernels[0]) and not np.any(kernels[1]):
      assert value == 0 and not any(np.any(g) for g in grads)


@pytest.mark.parametrize('kind', KINDS)
def test_transformations_agree(kind):
  kernels = [jnp.asarray(k, jnp.float32) for k in pair()]
  each = [colinearity_loss(a, b, kind) for a, b in zip(*kernels)]
  np.testing.assert_allclose(colinearity_loss(*kernels, kind), each, rtol=1e-5)
  np.testing.assert_allclose(
    jax.vmap(lambda a, b: colinearity_loss(a, b, kind))(*kernels), each, rtol=1e-5
  )
  half = colinearity_loss(*(k.astype(jnp.bfloat16) for k in kernels), kind)
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, each, rtol=0.1)
  if kind == 'cosine':
    np.testing.assert_allclose(2 * jnp.stack(each), colinearity_index(*kernels), rtol=1e-5)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'kind': 'cubic'}, "kind='cubic'; choose 'product'"),
    ({'power': 2}, 'power must be above 2, got 2'),
    ({'ratio': 0.0}, 'ratio must be positive'),
    ({'second': jnp.ones((4, 3))}, r'must chain.*\(6, 5\) and \(4, 3\)'),
    ({'second': jnp.ones(5)}, 'must chain'),
  ],
)
def test_bad_arguments_are_named(change, message):
  given = {'first': jnp.ones((6, 5)), 'second': jnp.ones((5, 3)), **change}
  with pytest.raises(ValueError, match=message):
    colinearity_loss(**given)


@pytest.mark.parametrize('size', [1e-15, 1e12])
def test_the_cosine_does_not_depend_on_the_size_of_the_kernels(size):
  first, second = pair()
  expected = colinearity_loss(first, second, 'cosine')
  scaled = jnp.float32(size) * first
  found, slope = jax.value_and_grad(lambda k: jnp.sum(colinearity_loss(k, second, 'cosine')))(
    scaled
  )
  np.testing.assert_allclose(found, np.sum(expected), rtol=1e-5)
  plain = jax.grad(lambda k: jnp.sum(colinearity_loss(k, second, 'cosine')))(jnp.asarray(first))
  np.testing.assert_allclose(size * slope, plain, rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(colinearity_index(scaled, second), 2 * expected, rtol=1e-5)
