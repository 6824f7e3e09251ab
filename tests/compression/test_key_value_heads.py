import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab import compression
from jaxlab.models.attention import attention_scores, softmax, weighted_values


def _attention(hidden, layers, width):
  """Causal grouped-query attention; `layers` are (kernel, bias) of query, key, value and output."""
  query, key, value = (
    (hidden @ kernel + bias).reshape(*hidden.shape[:2], -1, width) for kernel, bias in layers[:3]
  )
  causal = jnp.tril(jnp.ones((hidden.shape[1],) * 2, bool))
  scores = jnp.where(causal, attention_scores(query, key), -jnp.inf)
  kernel, bias = layers[3]
  return weighted_values(softmax(scores), value) @ kernel + bias


def check_singular_values(gram, singular, rtol):
  """Compares a Gram matrix with the singular values of caches, of fewer rows than columns, too."""
  values = np.linalg.eigvalsh(gram)[:, ::-1]
  found = np.sqrt(np.maximum(values, 0))
  missing = found.shape[1] - singular.shape[1]
  singular = np.pad(singular, ((0, 0), (0, missing)))
  # Squares lose half the digits: eigenvalues of nothing are rounding errors of about 1e-16 of the largest.
  largest = singular.max()
  small = singular < 1e-5 * largest
  assert_close(found, singular, rtol, where=~small)
  assert_close(found, singular, 0, max(rtol, 1e-7) * largest, where=small)
  shares = np.cumsum(singular**2, 1) / np.sum(singular**2, 1, keepdims=True)
  assert_close(compression.energy_shares(gram), shares, rtol)


@pytest.mark.parametrize('shape, rank', [((9, 12), 9), ((30, 12), 5)])
def test_caches_of_few_rows_or_of_low_rank_are_compared(shape, rank):
  rng = np.random.default_rng(0)
  cache = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
  gram = compression.group_gram(cache.reshape(1, shape[0], 2, -1), 2)
  singular = np.linalg.svd(cache, compute_uv=False)[None]
  check_singular_values(gram, singular, 1e-9)
  with pytest.raises(AssertionError):
    check_singular_values(gram, singular * (1 + 1e-8), 1e-9)


@golden('kv_heads', 'svd_gqa_no_rope')
@pytest.mark.parametrize('x64', [True, False])
def test_folded_heads_agree_with_reference(vectors, x64):
  rtol = 1e-9 if x64 else 1e-5
  dtype = np.float64 if x64 else np.float32
  size, heads = vectors.param('group_size'), vectors.param('num_heads')
  hidden = vectors['in_hidden'].astype(dtype)
  kernels = {name: kernel.astype(dtype) for name, kernel in vectors.tree('param_w_').items()}
  width = kernels['key'].shape[1] // heads
  with jax.enable_x64(x64):
    plain = [(kernels[name], 0) for name in ('query', 'key', 'value', 'output')]
    original = _attention(hidden, plain, width)
    assert_close(original.reshape(-1, original.shape[-1]), vectors['out_attention_original'], rtol)
    for method in ('svd_a', 'svd_w'):
      bases = {}
      for name in ('key', 'value'):
        cache = (hidden @ kernels[name]).reshape(*hidden.shape[:2], heads, width)
        source = cache if method == 'svd_a' else kernels[name].reshape(-1, heads, width)
        gram = compression.group_gram(source, size)
        bases[name] = compression.group_basis(gram, width)
        groups = cache.reshape(-1, heads // size, size * width).swapaxes(0, 1)
        projected = groups @ bases[name] @ bases[name].swapaxes(1, 2)
        rows = projected.swapaxes(0, 1).reshape(-1, heads * width)
        assert_close(rows, vectors[f'out_{name}_rank_projected_{method}'], rtol)
        if method == 'svd_a':
          singular = vectors[f'out_{name}_singular_values_per_group']
          check_singular_values(gram, singular, rtol)
      keys = compression.fold_keys(kernels['query'], kernels['key'], bases['key'], width)
      values = compression.fold_values(kernels['value'], kernels['output'], bases['value'], width)
      assert keys.cached.shape[1] * size == kernels['key'].shape[1]
      assert keys.partner.dtype == values.cached.dtype == dtype
      layers = [(k, 0) for k in (keys.partner, keys.cached, values.cached, values.partner)]
      folded = _attention(hidden, layers, width)
      assert_close(folded.reshape(-1, folded.shape[-1]), vectors[f'out_attention_{method}'], rtol)


def _layers(kv_heads: int, heads: int, width: int, dim: int = 10):
  """Random layers with biases, and hidden states."""
  rng = np.random.default_rng(0)
  shapes = [(dim, heads * width), *[(dim, kv_heads * width)] * 2, (heads * width, dim)]
  layers = [(rng.standard_normal(shape), rng.standard_normal(shape[1])) for shape in shapes]
  return layers, rng.standard_normal((2, 30, dim))


def _folded(layers, hidden, kv_heads: int, width: int, size: int):
  (query, query_bias), (key, key_bias), (value, value_bias), (output, output_bias) = layers
  caches = [
    (hidden @ kernel + bias).reshape(*hidden.shape[:2], kv_heads, width)
    for kernel, bias in layers[1:3]
  ]
  bases = [compression.group_basis(compression.group_gram(c, size), width) for c in caches]
  keys = compression.fold_keys(
    query, key, bases[0], width, query_bias=query_bias, key_bias=key_bias
  )
  values = compression.fold_values(value, output, bases[1], width, value_bias=value_bias)
  return [
    (keys.partner, keys.partner_bias),
    (keys.cached, keys.cached_bias),
    (values.cached, values.cached_bias),
    (values.partner, output_bias),
  ]


@pytest.mark.parametrize('kv_heads', [4, 2])
def test_groups_of_one_head_change_nothing(kv_heads):
  layers, hidden = _layers(kv_heads, heads=4, width=3)
  with jax.enable_x64(True):
    expected = _attention(hidden, layers, 3)
    got = _attention(hidden, _folded(layers, hidden, kv_heads, 3, size=1), 3)
  assert_close(got, expected, 1e-9)


def test_caches_of_low_rank_are_kept_whole_in_grouped_heads_too():
  """Two key-value heads of four queries each that are one head, turned: nothing is lost by one head."""
  width = 3
  layers, hidden = _layers(2, heads=8, width=width)
  turn = np.linalg.qr(np.random.default_rng(1).standard_normal((width, width)))[0]
  for index in (1, 2):
    kernel, bias = layers[index]
    one, first = kernel[:, :width], bias[:width]
    layers[index] = np.hstack([one, one @ turn]), np.concatenate([first, first @ turn])
  with jax.enable_x64(True):
    expected = _attention(hidden, layers, width)
    got = _attention(hidden, _folded(layers, hidden, 2, width, size=2), width)
  assert_close(got, expected, 1e-9)


def test_padding_does_not_count_and_batches_add_up():
  rng = np.random.default_rng(0)
  cache = rng.standard_normal((2, 5, 4, 3))
  mask = np.arange(5) < np.array([[5], [2]])
  expected = compression.group_gram(cache[0], 2) + compression.group_gram(cache[1, :2], 2)
  np.testing.assert_allclose(compression.group_gram(cache, 2, mask), expected, rtol=1e-12)


def test_the_basis_is_orthonormal_of_fixed_signs_and_warns_of_too_few_tokens():
  cache = np.random.default_rng(0).standard_normal((40, 4, 3))
  gram = compression.group_gram(cache, 2)
  basis = compression.group_basis(gram, 3)
  np.testing.assert_allclose(basis.swapaxes(1, 2) @ basis, np.stack([np.eye(3)] * 2), atol=1e-12)
  assert np.all(basis.max(axis=1) == np.abs(basis).max(axis=1))
  with pytest.warns(UserWarning, match='rank 2 and is asked for 3 directions'):
    compression.group_basis(compression.group_gram(cache[:2], 2), 3)


def test_mean_pooling_is_the_mean_of_consecutive_heads():
  kernel = np.random.default_rng(0).standard_normal((5, 12))
  pooled = compression.mean_pool_heads(kernel, head_width=3, group_size=2)
  expected = np.hstack([(kernel[:, :3] + kernel[:, 3:6]) / 2, (kernel[:, 6:9] + kernel[:, 9:]) / 2])
  np.testing.assert_allclose(pooled, expected)


def test_bad_input_is_named():
  cache, basis, kernel = np.ones((6, 4, 3)), np.ones((2, 6, 3)), np.ones((5, 12))
  fails = lambda match: pytest.raises(ValueError, match=match)  # noqa: E731
  with fails('group_size=3 does not divide the 4 heads'):
    compression.group_gram(cache, 3)
  with fails(r'cache must be \[..., kv_heads, head_width\]'):
    compression.group_gram(np.ones((4, 3)), 2)
  with fails('cache has values that are not finite'):
    compression.group_gram(np.inf * cache, 2)
  with fails(r'mask must be \(6,\)'):
    compression.group_gram(cache, 2, np.ones(5))
  with fails('head_width=7: expected 1 to 6'):
    compression.group_basis(compression.group_gram(cache, 2), 7)
  with fails(r'gram must be \[groups, n, n\]'):
    compression.group_basis(np.ones((6, 6)), 3)
  with fails('value_kernel must have 12 channels of heads'):
    compression.fold_values(np.ones((5, 9)), kernel.T, basis, 3)
  with fails('output_kernel must have a multiple of 4 heads of 3 channels'):
    compression.fold_values(kernel, np.ones((9, 5)), basis, 3)
  with fails('query_kernel must have a multiple of 4 heads'):
    compression.fold_keys(np.ones((5, 9)), kernel, basis, 3)
  with fails(r'key_bias must be \(12,\)'):
    compression.fold_keys(kernel, kernel, basis, 3, key_bias=np.ones(3))
  with fails('basis must be'):
    compression.fold_keys(kernel, kernel, np.ones((2, 5, 3)), 3)
  with fails('basis has 2 directions a group, a head 3 channels'):
    compression.fold_keys(kernel, kernel, basis[..., :2], 3)
  with fails('groups of 3 heads of 3 channels'):
    compression.mean_pool_heads(kernel, 3, 3)
