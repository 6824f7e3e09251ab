import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab import models, parallel
from jaxlab.models import convolution_forms
from jaxlab.models.convolution_forms import Geometry, choose_form

NHWC = ('NHWC', 'HWIO', 'NHWC')


def arrays(seed, *shapes, dtype=jnp.float32):
  generator = np.random.default_rng(seed)
  return [jnp.asarray(generator.standard_normal(shape), dtype) for shape in shapes]


def value_and_gradients(conv, x, kernel, **options):
  """The convolution, and gradients of a curved function of it with respect to both arguments."""

  @jax.jit
  def run(x, kernel):
    def loss(x, kernel):
      return jnp.sum(jnp.sin(conv(x, kernel, **options).astype(jnp.float32)))

    return conv(x, kernel, **options), jax.grad(loss, (0, 1))(x, kernel)

  return run(x, kernel)


def padded_first(x, kernel, *, padding, lhs_dilation, **options):
  """XLA's convolution of inputs that are padded and dilated beforehand.

  Some geometries it cannot differentiate itself: their programs abort while they are compiled.
  """
  sides = [(*side, step - 1) for side, step in zip(padding, lhs_dilation, strict=True)]
  x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *sides, (0, 0, 0)])
  return lax.conv_general_dilated(x, kernel, padding='VALID', **options)


def assert_equals_plain(x, kernel, tolerance=1e-5, plain=lax.conv_general_dilated, **options):
  ours = value_and_gradients(models.conv_general_dilated, x, kernel, **options)
  plain = value_and_gradients(plain, x, kernel, **options)
  for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
    assert one.dtype == other.dtype
    scale = 1 + float(jnp.max(jnp.abs(other)))
    chex.assert_trees_all_close(one, other, rtol=0, atol=tolerance * scale)


@settings(max_examples=6, deadline=None)
@given(
  seed=st.integers(0, 1000),
  size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
  taps=st.tuples(st.integers(1, 5), st.integers(1, 3)),
  groups=st.sampled_from([1, 1, 2, 3, 6]),
  channels=st.sampled_from([1, 2]),
  multiplier=st.sampled_from([1, 2]),
  strides=st.tuples(st.integers(1, 3), st.integers(1, 2)),
  dilation=st.sampled_from([(1, 1), (2, 1), (2, 3)]),
  spacing=st.sampled_from([(1, 1), (2, 1)]),
  padding=st.sampled_from(
    [[(0, 0), (0, 0)], [(1, 1), (1, 0)], [(2, 3), (1, 1)], [(2, -1), (0, 2)]]
  ),
)
def test_every_geometry_equals_the_plain_convolution(
  seed, size, taps, groups, channels, multiplier, strides, dilation, spacing, padding
):
  geometry = Geometry(size, taps, strides, tuple(padding), dilation, spacing)
  if min(geometry.outputs) < 1:
    return
  shapes = (2, *size, groups * channels), (*taps, channels, groups * multiplier)
  assert_equals_plain(
    *arrays(seed, *shapes),
    plain=padded_first,
    window_strides=strides,
    padding=padding,
    lhs_dilation=dilation,
    rhs_dilation=spacing,
    dimension_numbers=NHWC,
    feature_group_count=groups,
  )


CASES = {
  'pointwise': ((2, 5, 5, 3), (1, 1, 3, 4), 1, 1),
  'single_window': ((2, 3, 3, 3), (1, 1, 3, 4), 1, 1),
  'by_taps': ((2, 2, 2, 3), (3, 3, 3, 4), 1, 1),
  'depthwise': ((2, 5, 5, 6), (3, 3, 1, 6), 1, 6),
  'merge_groups': ((2, 5, 5, 8), (3, 3, 2, 8), 1, 4),
}


@pytest.mark.parametrize(
  'dtype, tolerance', tables.first([(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
)
@pytest.mark.parametrize('form', CASES)
def test_every_form_is_chosen_and_equals_the_plain_convolution(form, dtype, tolerance, monkeypatch):
  x_shape, kernel_shape, stride, groups = CASES[form]
  used = []

  def spy(*args, **kwargs):
    chosen = choose_form(*args, **kwargs)
    used.append(chosen.__name__ if chosen else None)
    return chosen

  monkeypatch.setattr(convolution_forms, 'choose_form', spy)
  padding = 'VALID' if form in ('single_window', 'pointwise') else 'SAME'
  x, kernel = arrays(0, x_shape, kernel_shape, dtype=dtype)
  assert_equals_plain(
    x,
    kernel,
    tolerance,
    window_strides=(stride, stride),
    padding=padding,
    dimension_numbers=NHWC,
    feature_group_count=groups,
  )
  assert form in used


def test_gradient_forms_of_strided_depthwise_and_patches():
  geometry = Geometry((4, 4), (3, 3), (1, 1), ((1, 2), (1, 2)), (2, 2), (1, 1))
  assert choose_form(geometry, channels=1, features=6, groups=6) is convolution_forms.depthwise
  patches = Geometry((4, 4), (8, 8), (1, 1), ((7, 7), (7, 7)), (8, 8), (1, 1))
  assert choose_form(patches, channels=6, features=3) is convolution_forms.spread_patches
  kernel = Geometry((9, 9), (4, 4), (1, 1), ((0, 0), (0, 0)), (1, 1), (2, 2))
  chosen = choose_form(kernel, channels=2, features=6, batch_groups=6, batch=6)
  assert chosen is convolution_forms.depthwise_kernel_gradient
  options = {'dimension_numbers': NHWC, 'padding': 'VALID'}
  assert_equals_plain(*arrays(0, (2, 9, 9, 6), (3, 3, 1, 12)), window_strides=(2, 2),
                      feature_group_count=6, **options)  # fmt: skip
  assert_equals_plain(*arrays(0, (2, 18, 17, 3), (8, 8, 3, 6)), window_strides=(8, 8), **options)


def test_large_maps_keep_the_plain_convolution():
  geometry = Geometry((16, 16), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))
  assert choose_form(geometry, channels=64, features=64) is None
  assert choose_form(geometry, channels=32, features=64, groups=2) is None


def test_gradients_have_the_axes_that_eigen_takes_in_loops_too():
  x, kernel = arrays(0, (2, 16, 16, 3), (3, 3, 3, 4))
  padding, numbers = ((1, 1), (1, 1)), ('NHWC', 'HWIO', 'NHWC')

  def loss(x, kernel):
    y = models.conv_general_dilated(x, kernel, (2, 2), padding, dimension_numbers=numbers)
    return jnp.sum(jnp.tanh(y))

  text = jax.jit(jax.grad(loss, (0, 1))).lower(x, kernel).as_text()
  found = re.findall(r'dim_numbers = (.*?->\[.*?\])', text)
  assert len(found) == 3 and set(found) == {'[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]'}, found


@pytest.mark.parametrize('rank', tables.first([1, 3]))
def test_other_ranks_and_orders_of_axes(rank):
  spatial = 'DHW'[-rank:]
  shapes = (2, 4, *range(3, 3 + rank)), (4, 1, *(3,) * rank)
  assert_equals_plain(
    *arrays(0, *shapes),
    window_strides=(1,) * rank,
    padding='SAME',
    dimension_numbers=(f'NC{spatial}', f'OI{spatial}', f'NC{spatial}'),
    feature_group_count=4,
  )


def test_integers_and_preferred_types():
  x, kernel = (jnp.round(3 * a).astype(jnp.int8) for a in arrays(0, (1, 2, 2, 3), (3, 3, 3, 4)))
  options = {'window_strides': (1, 1), 'padding': 'SAME', 'dimension_numbers': NHWC}
  options['preferred_element_type'] = jnp.int32
  ours = models.conv_general_dilated(x, kernel, **options)
  np.testing.assert_array_equal(ours, lax.conv_general_dilated(x, kernel, **options))
  x, kernel = arrays(0, (1, 2, 2, 3), (3, 3, 3, 4), dtype=jnp.bfloat16)
  options['preferred_element_type'] = jnp.float32
  assert models.conv_general_dilated(x, kernel, **options).dtype == jnp.float32


DEPTHWISE = functools.partial(
  models.conv_general_dilated,
  window_strides=(1, 1),
  padding='SAME',
  dimension_numbers=NHWC,
  feature_group_count=3,
)


@pytest.mark.exhaustive
def test_derivatives_of_second_order_and_forward_mode():
  x, kernel, direction = arrays(0, (2, 4, 4, 3), (3, 3, 1, 3), (2, 4, 4, 3))
  plain = functools.partial(lax.conv_general_dilated, **DEPTHWISE.keywords)

  def second(conv):
    def loss(x, kernel):
      return jnp.sum(jnp.sin(conv(x, kernel)) ** 2)

    def along(x, kernel):
      return jnp.vdot(jax.jit(jax.grad(loss))(x, kernel), direction)

    forward = jax.jvp(lambda x: conv(x, kernel), (x,), (direction,))[1]
    return jax.jit(jax.grad(along, (0, 1)))(x, kernel), forward

  chex.assert_trees_all_close(second(DEPTHWISE), second(plain), rtol=1e-4, atol=1e-3)
  jax.test_util.check_grads(DEPTHWISE, (x, kernel), 2, atol=1e-2, rtol=1e-2)


@pytest.mark.exhaustive
def test_vmap_over_inputs_and_over_kernels_equals_a_loop():
  x, kernels = arrays(0, (3, 2, 4, 4, 4), (3, 3, 3, 4, 5))
  conv = functools.partial(models.conv_general_dilated, window_strides=(1, 1), padding='SAME')
  conv = functools.partial(conv, dimension_numbers=NHWC)

  def loss(x, kernel):
    return jnp.sum(jnp.sin(conv(x, kernel)))

  for axes in ((0, 0), (None, 0), (0, None)):
    args = [a if axis == 0 else a[0] for a, axis in zip((x, kernels), axes)]
    mapped = jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1)), axes))(*args)

    def pick(i, args=args, axes=axes):
      return [a[i] if ax == 0 else a for a, ax in zip(args, axes)]

    looped = [jax.jit(jax.value_and_grad(loss, (0, 1)))(*pick(i)) for i in range(3)]
    chex.assert_trees_all_close(
      mapped, jax.tree.map(lambda *leaves: jnp.stack(leaves), *looped), rtol=1e-4, atol=1e-4
    )


@pytest.mark.exhaustive
def test_scan_remat_and_a_sharded_batch():
  x, kernel = arrays(0, (8, 4, 4, 3), (3, 3, 1, 3))

  def loss(x, kernel):
    layer = jax.checkpoint(lambda carry, _: (jnp.tanh(DEPTHWISE(carry, kernel)), None))
    return jnp.sum(jax.lax.scan(layer, x, None, 3)[0])

  gradient = jax.jit(jax.grad(loss, 1))
  expected = gradient(x, kernel)
  mesh = parallel.make_mesh()
  sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec('data')))
  chex.assert_trees_all_close(gradient(sharded, kernel), expected, rtol=1e-5, atol=1e-4)

  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=(PartitionSpec('data'), PartitionSpec()),
    out_specs=PartitionSpec(),
  )  # fmt: skip
  def total(x, kernel):
    return jax.lax.psum(
      jax.jit(jax.grad(lambda k: jnp.sum(DEPTHWISE(x, k) ** 2)))(kernel), 'data'
    ) * 0 + (jax.lax.psum(jnp.sum(DEPTHWISE(x, kernel)), 'data'))

  assert np.allclose(jax.jit(total)(sharded, kernel), jnp.sum(DEPTHWISE(x, kernel)), rtol=1e-4)


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_other_platforms_get_the_plain_program(platform):
  x, kernel = arrays(0, (2, 4, 4, 3), (3, 3, 1, 3))

  def lowered(conv):
    def conv_step(x, kernel):
      return jax.value_and_grad(lambda *args: jnp.sum(conv(*args) ** 2), (0, 1))(x, kernel)

    traced = jax.jit(conv_step).trace(x, kernel)
    return traced.lower(lowering_platforms=(platform,)).as_text()

  ours = lowered(DEPTHWISE)
  assert ours.count('stablehlo.convolution') == 3
  plain = lowered(functools.partial(lax.conv_general_dilated, **DEPTHWISE.keywords))

  def operations(text):
    return sorted(word for word in text.replace('"', ' ').split() if word.startswith('stablehlo.'))

  assert operations(ours) == operations(plain)


def test_a_users_own_network_under_fast_convolutions():
  class Own(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.remat(nn.Conv)(6, (3, 3), feature_group_count=3, name='a')(x)
      return nn.Conv(2, (3, 3), name='b')(x)

  model, x = Own(), arrays(0, (2, 5, 5, 3))[0]
  variables = jax.jit(model.init)(jax.random.key(0), x)

  def run(variables, x):
    with models.fast_convolutions():
      return model.apply(variables, x)

  def primitives(fn):
    return str(jax.make_jaxpr(fn)(variables, x))

  assert 'conv_general_dilated' in primitives(model.apply)
  assert 'conv_general_dilated' not in primitives(run)
  chex.assert_trees_all_close(
    jax.jit(run)(variables, x), jax.jit(model.apply)(variables, x), atol=1e-5
  )


def test_wrong_arguments_raise_as_in_jax():
  x, kernel = arrays(0, (2, 4, 4, 3), (3, 3, 2, 3))
  with pytest.raises((TypeError, ValueError), match='feature'):
    models.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=NHWC)
