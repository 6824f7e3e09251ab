import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab.evaluation import channel_colinearity, channel_gains, colinearity_index


@golden('tweo', 'mlp_colinearity_terms')
@pytest.mark.parametrize('x64', [True, False])
def test_terms_of_a_channel_agree_with_reference(vectors, x64):
  rtol = 1e-9 if x64 else 1e-6
  with jax.enable_x64(x64):
    up, down, x = (
      jnp.asarray(vectors[name], float) for name in ('in_up_weight_A', 'in_down_weight_B', 'in_x')
    )
    channel = vectors['in_row_k'].item()
    got = jax.jit(channel_colinearity)(up.T, down.T, x, channel)
    assert_close(got.singular_values, vectors['out_singular_values'], rtol)
    assert_close(got.terms, vectors['out_terms'], rtol)
    assert_close(got.linear, vectors['out_y_k'], rtol)
    assert_close(got.cosines, vectors['out_abs_cosine_row_u'], rtol)
    length = np.linalg.norm(vectors['in_down_weight_B'][channel])
    assert_close(got.alignments, length * vectors['out_abs_cosine_row_u'], rtol)
    sizes = np.abs(vectors['out_terms'])
    assert_close(got.top_share, sizes.max() / sizes.sum(), rtol)
    assert_close(got.singular_values * got.alignments * got.projections, sizes, rtol)


def test_the_top_term_alone_makes_an_aligned_outlier():
  """An MLP of rank one: its one direction gives the output, also through the activation."""
  rng = np.random.default_rng(0)
  u, v = rng.standard_normal(12), rng.standard_normal(5)
  first, second, x = np.outer(v, u), rng.standard_normal((12, 7)), rng.standard_normal(5)
  got = channel_colinearity(first, second, x, 3, activation=lambda h: jnp.maximum(h, 0))
  hidden = x @ first
  np.testing.assert_allclose(got.top_term, np.maximum(hidden, 0) @ second[:, 3], rtol=1e-4)
  np.testing.assert_allclose(got.linear, hidden @ second[:, 3], rtol=1e-4)
  np.testing.assert_allclose(got.top_share, 1, rtol=1e-4)
  nothing = channel_colinearity(first, 0 * second, 0 * x, 3)
  assert all(np.all(np.isfinite(value)) for value in nothing)


def test_gains_and_index_are_the_formulas_of_every_head():
  rng = np.random.default_rng(1)
  first, second = rng.standard_normal((3, 6, 4)), rng.standard_normal((3, 4, 8))
  product = first @ second
  np.testing.assert_allclose(
    jax.jit(channel_gains)(first, second), np.sqrt((product**2).sum(1)), rtol=1e-5
  )
  square = lambda x: (x**2).sum((1, 2))  # noqa: E731
  expected = 4 * square(product) / (square(first) * square(second))
  np.testing.assert_allclose(jax.jit(colinearity_index)(first, second), expected, rtol=1e-5)
  mapped = jax.vmap(colinearity_index)(first, second)
  np.testing.assert_allclose(mapped, expected, rtol=1e-5)
  half = colinearity_index(first.astype(jnp.bfloat16), second.astype(jnp.bfloat16))
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, expected, rtol=2e-2)


@pytest.mark.exhaustive
def test_the_index_tells_random_from_aligned_and_is_zero_for_zeros():
  keys = jax.random.split(jax.random.key(0))
  random = [jax.random.normal(key, shape) for key, shape in zip(keys, ((64, 96), (96, 64)))]
  np.testing.assert_allclose(colinearity_index(*random), 1, atol=0.2)
  aligned = jnp.outer(jnp.ones(64), random[1][:, 0])
  np.testing.assert_allclose(colinearity_index(aligned, aligned.T), 96, rtol=1e-4)
  assert colinearity_index(jnp.zeros((3, 4)), jnp.ones((4, 2))) == 0
  grads = jax.jit(jax.grad(colinearity_index, (0, 1)))(jnp.zeros((3, 4)), jnp.ones((4, 2)))
  assert all(np.all(np.isfinite(g)) for g in grads)


def test_kernels_that_do_not_chain_are_named():
  with pytest.raises(ValueError, match=r'must chain.*\(3, 4\) and \(5, 4\)'):
    colinearity_index(jnp.ones((3, 4)), jnp.ones((5, 4)))
  with pytest.raises(ValueError, match=r'x \[in\], got \(3, 4\), \(4, 2\) and \(4,\)'):
    channel_colinearity(jnp.ones((3, 4)), jnp.ones((4, 2)), jnp.ones(4), 0)


def test_gains_of_zero_have_a_gradient_of_zero():
  rng = np.random.default_rng(2)
  first, second = rng.standard_normal((5, 4)), rng.standard_normal((4, 3))
  second[:, 1] = 0
  grads = jax.jit(jax.grad(lambda *k: channel_gains(*k).sum(), (0, 1)))(first, second)
  product = first @ second
  unit = product / np.where(np.arange(3) == 1, 1, np.linalg.norm(product, axis=0))
  np.testing.assert_allclose(grads[0], unit @ second.T, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(grads[1], first.T @ unit, rtol=1e-4, atol=1e-5)


def test_a_channel_that_does_not_exist_is_named():
  kernels = jnp.ones((3, 4)), jnp.ones((4, 2))
  for channel in (2, -1):
    with pytest.raises(ValueError, match=f'channel={channel}: expected one of 2, from 0 to 1'):
      channel_colinearity(*kernels, jnp.ones(3), channel)
    traced = jax.jit(lambda i: channel_colinearity(*kernels, jnp.ones(3), i))(channel)
    assert np.isnan(traced.linear)
  assert channel_colinearity(*kernels, jnp.ones(3), 1).linear > 0
