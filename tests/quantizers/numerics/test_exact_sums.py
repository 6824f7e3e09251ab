"""Integer sums by float32 products on a CPU: exact at the bounds, and what is compiled where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxlab.quantizers.numerics.exact_sums import EXACT_TERMS, conv_sums, dot_sums

RNG = np.random.default_rng(0)


def extreme_codes(shape):
  """Codes of the largest magnitude, mostly of one sign: sums close to the bound, of all last bits."""
  return RNG.choice(np.array([-128, -128, -128, -127, 127], np.int8), shape)


@pytest.mark.parametrize('terms', [1, EXACT_TERMS, EXACT_TERMS + 1, 5 * EXACT_TERMS - 3])
@pytest.mark.parametrize('of_x', [True, False])
def test_dots_at_the_bounds_are_exact(terms, of_x):
  for x, kernel in (
    (extreme_codes((2, 3, terms)), extreme_codes((terms, 4))),
    (np.full((1, 1, terms), -128, np.int8), np.full((terms, 2), -128, np.int8)),
  ):
    sums = jax.jit(dot_sums, static_argnames='of_x')(x, kernel, of_x=of_x)
    np.testing.assert_array_equal(sums.products, x.astype(np.int64) @ kernel.astype(np.int64))
    np.testing.assert_array_equal(sums.kernel, kernel.sum(0, dtype=np.int64))
    assert (sums.x is not None) == of_x
    if of_x:
      np.testing.assert_array_equal(sums.x, x.sum(-1, dtype=np.int64, keepdims=True))
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(sums))


@pytest.mark.parametrize(
  ('channels', 'size', 'groups'),
  [(3, (3, 3), 1), (240, (3, 3), 1), (240, (3, 3), 2), (6, (3, 2), 6), (2, (33, 32), 1)],
)
def test_convolutions_at_the_bounds_are_exact(channels, size, groups):
  x = extreme_codes((2, 34, 33, channels) if size[0] > 30 else (2, 5, 6, channels))
  kernel = extreme_codes((*size, channels // groups, 2 * groups))
  options = {'strides': (2, 1), 'dilation': (1, 1), 'groups': groups}
  sums = conv_sums(x, kernel, **options, of_x=True)
  numbers = {'dimension_numbers': ('NHWC', 'HWIO', 'NHWC'), 'feature_group_count': groups}

  def exact(kernel):
    return jax.lax.conv_general_dilated(
      x.astype(np.int32), kernel.astype(np.int32), (2, 1), 'VALID', **numbers
    )

  ones = np.ones((*size, channels // groups, groups), np.int8)
  np.testing.assert_array_equal(sums.products, exact(kernel))
  np.testing.assert_array_equal(sums.x, exact(ones))
  np.testing.assert_array_equal(sums.kernel, kernel.sum((0, 1, 2), dtype=np.int64))
  assert conv_sums(x, kernel, **options, of_x=False).x is None


def test_sums_under_vmap_are_those_of_each():
  x, kernel = extreme_codes((3, 2, 1500)), extreme_codes((3, 1500, 4))
  sums = jax.vmap(lambda x, kernel: dot_sums(x, kernel, of_x=True))(x, kernel)
  for i in range(3):
    jax.tree.map(
      np.testing.assert_array_equal,
      jax.tree.map(lambda leaf, i=i: leaf[i], sums),
      dot_sums(x[i], kernel[i], of_x=True),
    )


def dot_program(platform):
  run = jax.jit(lambda x, kernel: dot_sums(x, kernel, of_x=False).products)
  return export.export(run, platforms=[platform])(
    extreme_codes((4, 1500)), extreme_codes((1500, 3))
  )


def conv_program(platform):
  options = {'strides': (1, 1), 'dilation': (1, 1), 'groups': 1, 'of_x': False}
  run = jax.jit(lambda x, kernel: conv_sums(x, kernel, **options).products)
  return export.export(run, platforms=[platform])(
    extreme_codes((1, 5, 5, 200)), extreme_codes((3, 3, 200, 3))
  )


@pytest.mark.parametrize(
  ('program', 'operation'), [(dot_program, 'dot_general'), (conv_program, 'convolution')]
)
def test_accelerators_get_one_product_of_integers_and_cpus_exact_floats(program, operation):
  def products(platform):
    lines = program(platform).mlir_module().splitlines()
    return [line for line in lines if f'stablehlo.{operation}' in line]

  for platform in ('tpu', 'cuda'):
    (line,) = products(platform)
    assert 'xi8>' in line
    assert 'xi32>' in line
    assert 'f32' not in line
  on_cpu = products('cpu')
  assert len(on_cpu) == 2  # 1500 and 1800 terms: two parts of at most 1024
  assert all('xi8>' not in line and 'xf32>' in line for line in on_cpu)
