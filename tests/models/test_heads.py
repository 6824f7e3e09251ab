import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden
from models.random_variables import random_images, random_variables, run

from jaxlab.models import (
  DINOHead,
  MLPHead,
  barlow_projector,
  byol_mlp,
  from_torch,
  moco_projector,
  module_paths,
  simsiam_predictor,
  simsiam_projector,
)


def shapes(model, x, dtype='float32'):
  tree = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, True), x)
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), tree)


def sequential(state_dict, prefix, last_norm):
  """An `nn.Sequential` (linear, norm, ReLU, linear, ...) under the names of `MLPHead`, with fresh buffers."""
  renamed = {}
  for name, value in state_dict.items():
    if not name.startswith(prefix):
      continue
    place, leaf = name.removeprefix(prefix).split('.')
    layer, part = divmod(int(place), 3)
    renamed[f'{("fc", "bn")[part]}{layer}.{leaf}'] = value
  for name, value in list(renamed.items()):
    # The plain last norm has no parameters, so its place does not show in the state dict.
    if name.startswith('fc') and name.endswith('weight'):
      norm = name.replace('fc', 'bn').removesuffix('.weight')
      if f'{norm}.weight' in renamed or last_norm:
        renamed[f'{norm}.running_mean'] = np.zeros(len(value))
        renamed[f'{norm}.running_var'] = np.ones(len(value))
  return renamed


@golden('ssl_baselines', 'simsiam_heads')
@pytest.mark.parametrize('dtype, rtol', [('float64', 1e-9), ('float32', 1e-5)])
def test_simsiam_heads_agree_with_reference_over_two_training_passes(vectors, dtype, rtol):
  state_dict = vectors.tree('param__')
  with jax.enable_x64(dtype == 'float64'):
    views = [jnp.asarray(vectors[f'in_x{i}'], dtype) for i in (1, 2)]
    hidden, features = (
      len(state_dict['encoder.fc.0.weight']),
      len(state_dict['encoder.fc.6.weight']),
    )
    projector = simsiam_projector(hidden, features)
    predictor = simsiam_predictor(len(state_dict['predictor.0.weight']), features)
    projector_vars = from_torch(
      shapes(projector, views[0], dtype), sequential(state_dict, 'encoder.fc.', last_norm=True)
    )
    z_shape = jax.ShapeDtypeStruct((len(views[0]), features), dtype)
    predictor_vars = from_torch(
      shapes(predictor, z_shape, dtype), sequential(state_dict, 'predictor.', last_norm=False)
    )
    for i, x in enumerate(views, start=1):
      z, state = run(projector, projector_vars, x, True)
      projector_vars = {**projector_vars, **state}
      p, state = run(predictor, predictor_vars, z, True)
      predictor_vars = {**predictor_vars, **state}
      # Batch norm of six rows amplifies float32's rounding.
      assert_close(z, vectors[f'out_z{i}'], rtol if dtype == 'float64' else 1e-4)
      assert_close(p, vectors[f'out_p{i}'], rtol if dtype == 'float64' else 1e-4)
    stats = projector_vars['batch_stats']['bn0']
    assert_close(stats['mean'], vectors['out_running_mean_proj_bn0_after_both'], rtol)
    assert_close(stats['var'], vectors['out_running_var_proj_bn0_after_both'], rtol)


@golden('ssl_baselines', 'dino_head')
@pytest.mark.parametrize('dtype, rtol', [('float64', 1e-9), ('float32', 1e-5)])
def test_dino_head_agrees_with_reference(vectors, dtype, rtol):
  with jax.enable_x64(dtype == 'float64'):
    x = jnp.asarray(vectors['in_x'], dtype)
    direction = jnp.asarray(vectors['param_last_layer_v'], dtype)
    layers = {
      f'fc{i}': {
        'kernel': jnp.asarray(vectors[f'param_mlp_{2 * i}_weight'].T, dtype),
        'bias': jnp.asarray(vectors[f'param_mlp_{2 * i}_bias'], dtype),
      }
      for i in range(3)
    }
    head = DINOHead(
      len(direction), hidden=len(layers['fc0']['bias']), bottleneck=direction.shape[1]
    )
    params = {'mlp': layers, 'last_layer_kernel': direction.T}
    assert jax.tree.map(np.shape, params) == jax.tree.map(
      np.shape, random_variables(head, x)['params']
    )
    assert_close(run(head, {'params': params}, x), vectors['out_logits'], rtol)


def test_heads_have_the_layers_of_their_papers():
  x = random_images((4, 6))

  def leaves(model):
    tree = shapes(model, x)['params']
    return {f'{module}/{leaf}' for module, own in tree.items() for leaf in own}

  norm = {'scale', 'bias'}
  hidden = {'fc0/kernel', *(f'bn0/{leaf}' for leaf in norm)}
  deeper = {'fc1/kernel', *(f'bn1/{leaf}' for leaf in norm)}
  assert leaves(simsiam_projector(8, 5)) == {*hidden, *deeper, 'fc2/kernel', 'fc2/bias'}
  assert leaves(simsiam_predictor(8, 5)) == {*hidden, 'fc1/kernel', 'fc1/bias'}
  assert leaves(byol_mlp(8, 5)) == {*hidden, 'fc0/bias', 'fc1/kernel', 'fc1/bias'}
  assert leaves(moco_projector(8, 5)) == {'fc0/kernel', 'fc0/bias', 'fc1/kernel', 'fc1/bias'}
  assert leaves(barlow_projector(8, 5)) == {*hidden, *deeper, 'fc2/kernel'}
  assert leaves(MLPHead((5,), last_norm='affine', last_bias=False)) == hidden
  assert 'batch_stats' not in shapes(moco_projector(8, 5), x)
  assert set(shapes(simsiam_projector(8, 5), x)['batch_stats']) == {'bn0', 'bn1', 'bn2'}
  paths = module_paths(simsiam_predictor(8, 5), x)
  assert paths == ['fc0', 'bn0', 'relu0', 'fc1']
  assert 'mlp/gelu1' in module_paths(DINOHead(7, hidden=8, bottleneck=4), x)


def test_frozen_bias_counts_but_gets_no_gradient():
  x = random_images((4, 6))
  frozen, free = (MLPHead((5,), last_bias=bias) for bias in ('frozen', True))
  variables = random_variables(free, x)

  def gradient(head):
    return jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(head.apply(v, x)))))(variables)['params'][
      'fc0'
    ]

  assert_close(run(frozen, variables, x), run(free, variables, x), 1e-6)
  np.testing.assert_array_equal(gradient(frozen)['bias'], 0)
  assert float(jnp.abs(gradient(free)['bias']).max()) > 0.1
  assert_close(gradient(frozen)['kernel'], gradient(free)['kernel'], 1e-5)


def test_dino_logits_ignore_the_scale_of_directions_and_features_of_zero_are_safe():
  x = random_images((4, 6))
  head = DINOHead(7, hidden=8, bottleneck=4)
  variables = random_variables(head, x)
  longer = jax.tree.map(lambda a: a, variables)
  longer['params']['last_layer_kernel'] = 3 * variables['params']['last_layer_kernel']
  assert_close(run(head, longer, x), run(head, variables, x), 1e-5)
  assert float(jnp.abs(run(head, variables, x)).max()) <= 1 + 1e-6
  dead = jax.tree.map(jnp.zeros_like, variables)
  gradient = jax.jit(jax.grad(lambda v: jnp.sum(head.apply(v, x))))(dead)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
  scaled = DINOHead(7, hidden=8, bottleneck=4, norm_last_layer=False)
  params = {**variables['params'], 'last_layer_scale': np.full(7, 2.0, np.float32)}
  assert_close(run(scaled, {'params': params}, x), 2 * run(head, variables, x), 1e-5)


def test_linear_layers_start_within_torchs_bounds():
  params = jax.jit(moco_projector(400, 5).init)(jax.random.key(0), random_images((4, 25)))['params']
  for name in ('kernel', 'bias'):
    values = params['fc0'][name]
    assert 0.19 < float(jnp.abs(values).max()) <= 0.2  # 1 / sqrt(25)
    assert abs(float(values.mean())) < 0.03


def test_bfloat16_is_close_to_float32():
  x = random_images((32, 6))
  variables = random_variables(simsiam_projector(8, 5), x)
  y, _ = run(simsiam_projector(8, 5, dtype=jnp.bfloat16), variables, x, True)
  assert y.dtype == jnp.bfloat16
  assert_close(y, run(simsiam_projector(8, 5), variables, x, True)[0], 0.1)


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'features': ()}, 'positive layer sizes'),
    ({'features': (3, 0)}, 'positive layer sizes'),
    ({'last_norm': 'batch'}, "last_norm='batch' is none of"),
    ({'last_bias': 'thawed'}, "last_bias='thawed' is none of"),
    ({'activation': 'tanh'}, "activation='tanh' is none of"),
  ],
)
def test_fields_out_of_range_raise(fields, message):
  with pytest.raises(ValueError, match=message):
    MLPHead(**{'features': (3,), **fields})


def test_a_batch_of_one_raises_in_training():
  head = simsiam_predictor(8, 5)
  variables = random_variables(head, x := random_images((1, 6)))
  with pytest.raises(ValueError, match='one value per channel'):
    head.apply(variables, x, True, mutable=['batch_stats'])
