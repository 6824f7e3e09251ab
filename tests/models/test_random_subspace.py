import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_vectors import assert_close, golden
from models.random_variables import run_capture

from jaxlab import models


def own_variables(vectors):
  """Returns the official network's arrays under our names, with its sizes."""
  params, stats = {'nrs': {}, 'head': {}}, {'nrs': {}, 'head': {}}

  def norm(part, name, source):
    params[part][name] = {'scale': vectors[f'{source}weight'], 'bias': vectors[f'{source}bias']}
    found = vectors[f'{source}running_mean'], vectors[f'{source}running_var']
    stats[part][name] = dict(zip(('mean', 'var'), found, strict=True))

  for number, block in ((1, 'nrs'), (2, 'nrs2')):
    prefix = f'param_nrs_layer__{block}__'
    if f'{prefix}0__weight' in vectors:
      kernel = vectors[f'{prefix}0__weight'].transpose(2, 3, 1, 0)
      bias = vectors[f'{prefix}0__bias']
      params['nrs'][f'conv{number}'] = {'kernel': kernel, 'bias': bias}
      norm('nrs', f'bn{number}', f'{prefix}1__')
  hidden, linear = [], [i for i in (0, 3, 6) if f'param_dense__{i}__weight' in vectors]
  for number, place in enumerate(linear):
    weight = vectors[f'param_dense__{place}__weight']
    bias = vectors[f'param_dense__{place}__bias']
    params['head'][f'fc{number}'] = {'kernel': weight.T, 'bias': bias}
    if place != linear[-1]:
      hidden.append(len(weight))
      norm('head', f'bn{number}', f'param_dense__{place + 1}__')
  stats = {name: tree for name, tree in stats.items() if tree}
  constants = {'nrs': {'index': vectors['param_nrs_layer__mask']}}
  variables = {'params': params, 'batch_stats': stats, 'constants': constants}
  sizes = {'patch': vectors.param('patch'), 'n_mul': vectors.param('n_mul')}
  model = models.nrs_net(len(bias), hidden, n_per=vectors.param('n_per_group'), **sizes)
  as_arrays = lambda x: jnp.asarray(x, jnp.int32 if x.dtype.kind == 'i' else jnp.float32)  # noqa: E731
  return model, jax.tree.map(as_arrays, variables)


@golden('nrs', 'tabular_net')
def test_networks_agree_with_the_official_code(vectors):
  model, variables = own_variables(vectors)
  x = jnp.asarray(vectors['in_features'], jnp.float32)
  logits, parts = run_capture(model, variables, ['nrs'], x)
  assert_close(parts['nrs'], vectors['out_nrs_eval'])
  assert_close(logits, vectors['out_logits_eval'])

  def loss(params, x):
    logits, changed = model.apply({**variables, 'params': params}, x, True, mutable=['batch_stats'])
    values = optax.softmax_cross_entropy_with_integer_labels(logits, vectors['in_labels'])
    return values.mean(), (logits, changed['batch_stats'])

  step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  (value, (logits, stats)), (params, features) = step(variables['params'], x)
  assert_close(logits, vectors['out_logits_train'], 2e-5)
  assert_close(value, vectors['out_loss_train'])
  assert_close(features, vectors['grad_features_train'], 5e-5)
  kernel = params['nrs']['conv1']['kernel'].transpose(3, 2, 0, 1)
  assert_close(kernel, vectors['grad_nrs_conv1_weight_train'], 5e-5)
  assert_close(stats['nrs']['bn1']['mean'], vectors['out_bn1_running_mean_after'])
  assert_close(stats['nrs']['bn1']['var'], vectors['out_bn1_running_var_after'])


@golden('nrs', 'perm_mask')
def test_the_index_has_the_official_structure(vectors):
  dim, patch, n_mul = (vectors.param(name) for name in ('dim', 'height', 'n_mul'))
  assert patch == vectors.param('width')
  drawn = models.random_subspace_index(jax.random.key(0), dim, patch, n_mul)
  for index in (np.asarray(drawn), vectors['out_mask']):
    assert index.shape == vectors['out_mask'].shape and index.dtype == np.int32
    rows = index.reshape(-1, dim)
    np.testing.assert_array_equal(np.sort(rows, 1), np.tile(np.arange(dim), (len(rows), 1)))
    assert len({tuple(row) for row in rows}) > 1
  other = models.random_subspace_index(jax.random.key(1), dim, patch, n_mul)
  assert np.any(drawn != other)


def test_patches_are_consecutive_entries_of_the_index():
  rng = np.random.default_rng(0)
  x, index = rng.normal(size=(2, 4)).astype('f'), rng.integers(0, 4, 3 * 9)
  z = models.expand_subspaces(x, index, 3)
  assert z.shape == (2, 3, 3, 3)
  for c in range(3):
    for i in range(3):
      np.testing.assert_array_equal(z[:, i, :, c], x[:, index[9 * c + 3 * i : 9 * c + 3 * i + 3]])
  assert models.expand_subspaces(np.ones((2, 4), int), index).dtype == jnp.float32


@pytest.mark.parametrize('side', [3, 5])
@pytest.mark.parametrize('per_group', [1, 3])
def test_the_product_is_the_grouped_convolution(per_group, side):
  rng = np.random.default_rng(0)
  z, kernel, cotangent = (
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in ((4, side, side, 6), (3, 3, per_group, 6), (4, side - 2, side - 2, 6))
  )

  def plain(z, kernel):
    numbers = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(
      z, kernel, (1, 1), 'VALID', dimension_numbers=numbers, feature_group_count=6 // per_group
    )

  found, pull = jax.vjp(models.subspace_convolution, z, kernel)
  expected, pull_plain = jax.vjp(plain, z, kernel)
  assert_close(found, expected)
  for a, b in zip(pull(cotangent), pull_plain(cotangent), strict=True):
    assert_close(a, b)
  text = str(jax.make_jaxpr(models.subspace_convolution)(z, kernel))
  assert ('feature_group_count' in text) == (side == 5)


@pytest.mark.exhaustive
def test_bfloat16_and_jit_change_little():
  layer = models.NRSLayer(n_mul=2, n_per=4)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 12)), jnp.float32)
  variables = jax.jit(layer.init)(jax.random.key(0), x)
  expected = jax.jit(layer.apply)(variables, x)
  assert expected.shape == (8, 24)
  assert_close(jax.jit(layer.apply)(variables, x), expected)
  half = jax.jit(layer.clone(dtype=jnp.bfloat16).apply)(variables, x)
  assert half.dtype == jnp.bfloat16
  assert_close(half.astype(jnp.float32), expected, 3e-2)


@pytest.mark.exhaustive
def test_a_head_behind_a_network_is_told_that_it_trains():
  model = models.Classifier(
    models.MLP((16,)), models.NRSHead(models.MLPHead((3,)), n_mul=2, n_per=8)
  )
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)
  variables = jax.jit(model.init)(jax.random.key(0), x)
  assert variables['constants']['head']['nrs']['index'].shape == (16 * 2 * 9,)
  logits, changed = model.apply(variables, x, train=True, mutable=['batch_stats'])
  assert logits.shape == (4, 3)
  old, new = variables['batch_stats']['head'], changed['batch_stats']['head']
  assert np.any(old['nrs']['bn1']['mean'] != new['nrs']['bn1']['mean'])


def test_the_perceptron_has_one_layer_more():
  params = jax.eval_shape(models.mlp_baseline(3, 8).init, jax.random.key(0), jnp.zeros((2, 5)))
  widths = [layer['kernel'].shape for name, layer in params['params'].items() if 'fc' in name]
  assert sorted(widths) == [(5, 8), (8, 3), (8, 8), (8, 8)]


def drawn(dim, **sizes):
  layer = models.NRSLayer(**sizes)
  return layer, layer.init(jax.random.key(0), jnp.zeros((2, dim)))


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: models.NRSLayer(patch=4), 'patch=4: expected 3'),
    (lambda: models.NRSLayer(n_per=0), 'n_per=0'),
    (lambda: models.random_subspace_index(jax.random.key(0), 0), 'dim=0'),
    (lambda: models.random_subspace_index(jax.random.key(0), 4, 7), 'patch=7'),
    (lambda: models.expand_subspaces(jnp.ones(4), jnp.zeros(9, int)), r'x must be \[batch, dim\]'),
    (lambda: models.expand_subspaces(jnp.ones((2, 4)), jnp.zeros(10, int)), r'channels \* 9'),
    (lambda: models.expand_subspaces(jnp.ones((2, 4)), jnp.full(9, 4)), 'index must lie in 0 to 3'),
    (lambda: models.expand_subspaces(np.full((2, 4), np.nan), np.zeros(9, int)), 'NaN'),
    (lambda: models.subspace_convolution(jnp.ones((1, 3, 3, 4)), jnp.ones((3, 3, 3, 4))), 'groups'),
    (lambda: drawn(10, n_mul=1, n_per=4), r'do not divide into groups of n_per=4'),
    (lambda: drawn(10)[0].apply(drawn(10)[1], jnp.ones((2, 11))), 'drawn for 10'),
    (lambda: drawn(10)[0].apply(drawn(10)[1], jnp.ones((2, 2, 10))), r'features \[batch, dim\]'),
    (
      lambda: drawn(10)[0].apply(drawn(10)[1], jnp.ones((1, 10)), True, mutable=['batch_stats']),
      'larger batch',
    ),
  ],
)
def test_impossible_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.exhaustive
def test_few_features_occur_several_times_in_a_patch_and_that_is_said():
  with pytest.warns(UserWarning, match='4 features do not fill a patch of 9'):
    layer, variables = drawn(4)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    jax.jit(layer.apply)(variables, jnp.ones((2, 4)))
    drawn(9)
