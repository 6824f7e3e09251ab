import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from golden_vectors import assert_close, golden
from models.random_variables import random_images, random_variables, run

from jaxlab.models import create, module_paths
from jaxlab.models.classifier_heads import (
  Classifier,
  LearnableWeightScaling,
  Linear,
  NormedLinear,
  WeightNormHead,
  nearest_class_mean,
  tau_normalize,
)

HEADS = (NormedLinear(3), LearnableWeightScaling(3), WeightNormHead(3), Linear(3))


@golden('long_tail_protocols', 'normed_linear')
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_normed_linear_agrees_with_reference(vectors, dtype):
  with jax.enable_x64(dtype == 'float64'):
    x, kernel = (
      jnp.asarray(vectors[name], dtype)
      for name in ('in_features', 'param_weight_features_by_classes')
    )
    cosines = run(NormedLinear(kernel.shape[1]), {'params': {'kernel': kernel}}, x)
    assert cosines.dtype == dtype
    assert_close(cosines, vectors['out_cosine'], 2e-6)


@golden('acsr', 'dist_linear')
def test_weight_norm_head_agrees_with_reference_and_its_gradients(vectors):
  v = jnp.asarray(vectors['param_weight_v_classes_by_features'])
  params = {'v': v, 'g': jnp.asarray(vectors['param_weight_g'])}
  head = WeightNormHead(len(v), vectors.param('scale'), vectors.param('eps'))

  @jax.jit
  def scores_and_gradients(params, x):
    scores, pull = jax.vjp(lambda p, x: head.apply({'params': p}, x), params, x)
    return scores, pull(jnp.asarray(vectors['in_cotangent']))

  scores, (d_params, d_x) = scores_and_gradients(params, jnp.asarray(vectors['in_features']))
  assert_close(scores, vectors['out_scores'], 2e-6)
  assert_close(d_x, vectors['grad_features'], 2e-6)
  assert_close(d_params['v'], vectors['grad_weight_v'], 2e-6)
  assert_close(d_params['g'], vectors['grad_weight_g'], 2e-6)


@golden('long_tail_protocols', 'tau_normalisation')
@pytest.mark.parametrize('dtype, rtol', [('float64', 1e-12), ('float32', 2e-6)])
def test_tau_normalized_kernel_agrees_with_reference(vectors, dtype, rtol):
  with jax.enable_x64(dtype == 'float64'):
    kernel = jnp.asarray(vectors['in_classifier_weight_classes_by_features'].T, dtype)
    assert_close(tau_normalize(kernel, vectors.param('tau')).T, vectors['out_weight'], rtol)
    np.testing.assert_array_equal(tau_normalize(kernel, 0.0), kernel)


def test_a_linear_head_has_the_parameters_of_weight_scaling_but_its_factors():
  x = random_images((5, 6))
  params = random_variables(Linear(3), x)['params']
  assert {name: leaf.shape for name, leaf in params.items()} == {'kernel': (6, 3), 'bias': (3,)}
  logits = run(Linear(3), {'params': params}, x)
  assert_close(logits, x @ params['kernel'] + params['bias'], 1e-6)
  scaled = {'params': {**params, 'scale': jnp.full((3,), 2.0)}}
  assert_close(run(LearnableWeightScaling(3), scaled, x), 2 * logits, 1e-6)
  drawn = Linear(400).init(jax.random.key(0), jnp.zeros((1, 25)))['params']
  for leaf in (drawn['kernel'], drawn['bias']):  # PyTorch's: uniform within +-1/sqrt(features)
    assert 0.19 < float(jnp.abs(leaf).max()) <= 0.2
  ones = Linear(3, kernel_init=nn.initializers.ones).init(jax.random.key(0), x)
  np.testing.assert_array_equal(ones['params']['kernel'], np.ones((6, 3)))
  assert run(Linear(3, dtype=jnp.bfloat16), {'params': params}, x).dtype == jnp.bfloat16


def test_cosines_do_not_depend_on_lengths_and_weight_norm_logits_only_through_g():
  x = random_images((4, 6))
  variables = random_variables(HEADS[0], x)
  cosines = run(HEADS[0], variables, x)
  scaled = jax.tree.map(lambda a: 3 * a, variables)
  assert_close(run(HEADS[0], scaled, 7 * x), cosines, 1e-5)
  assert float(jnp.abs(cosines).max()) <= 1 + 1e-6

  params = random_variables(HEADS[2], x)['params']
  logits = run(HEADS[2], {'params': params}, x)
  other = {'v': 5 * params['v'], 'g': 2 * params['g']}
  assert_close(run(HEADS[2], {'params': other}, 7 * x), 2 * logits, 1e-5)


def test_weight_norm_head_starts_as_a_linear_layer_over_unit_features():
  x = random_images((4, 100))
  params = jax.jit(WeightNormHead(50).init)(jax.random.key(0), x)['params']
  assert 0.097 < float(jnp.abs(params['v']).max()) <= 0.1  # 1 / sqrt(100)
  assert_close(params['g'][:, 0], jnp.linalg.norm(params['v'], axis=1), 1e-6)
  expected = 2 * (x / np.linalg.norm(x, axis=1, keepdims=True)) @ params['v'].T
  assert_close(WeightNormHead(50).apply({'params': params}, x), expected, 1e-5)


def test_learnable_scaling_multiplies_the_bias_too():
  x = random_images((4, 6))
  params = jax.jit(LearnableWeightScaling(3).init)(jax.random.key(0), x)['params']
  np.testing.assert_array_equal(params['scale'], 1)
  linear = x @ params['kernel'] + params['bias']
  assert_close(run(HEADS[1], {'params': params}, x), linear, 1e-6)
  scale = jnp.array([0.5, 2.0, -1.0])
  assert_close(run(HEADS[1], {'params': {**params, 'scale': scale}}, x), scale * linear, 1e-6)


@pytest.mark.parametrize('head', HEADS, ids=lambda head: type(head).__name__)
def test_heads_are_finite_at_zero_and_close_in_bfloat16(head):
  x = random_images((4, 6))
  variables = random_variables(head, x)
  dead = jax.tree.map(np.zeros_like, variables)
  for v in (variables, dead):
    gradients = jax.jit(jax.grad(lambda v, x: jnp.sum(jnp.sin(head.apply(v, x))), (0, 1)))
    for leaf in jax.tree.leaves(gradients(v, np.zeros_like(x))):
      assert np.isfinite(leaf).all()
  np.testing.assert_array_equal(run(WeightNormHead(3), random_variables(HEADS[2], x), 0 * x), 0)
  low = head.copy(dtype=jnp.bfloat16)
  assert run(low, variables, x).dtype == jnp.bfloat16
  assert_close(run(low, variables, x), run(head, variables, x), 0.02)


def test_classifier_exchanges_its_head_over_the_same_backbone():
  x = random_images((2, 4, 4, 1))
  backbone = create('mlp', num_classes=None, hidden=(5,))
  model = Classifier(backbone, LearnableWeightScaling(3))
  assert module_paths(model, x) == ['backbone', 'backbone/fc0', 'backbone/relu0', 'head']
  variables = random_variables(model, x)
  features = jax.jit(lambda v, x: model.apply(v, x, method='features'))(variables, x)
  assert features.shape == (2, 5)
  head = {'params': variables['params']['head']}
  assert_close(run(model, variables, x), run(LearnableWeightScaling(3), head, features), 1e-6)
  other = Classifier(backbone, NormedLinear(3))
  grafted = random_variables(other, x, seed=1)
  grafted['params']['backbone'] = variables['params']['backbone']
  assert_close(other.apply(grafted, x, method='features'), features, 1e-6)


def test_classifier_passes_train_mode_to_its_backbone():
  x = random_images((4, 4, 4, 1))
  model = Classifier(create('cifar_resnet20', num_classes=None, stage_sizes=(1,)), NormedLinear(3))
  variables = random_variables(model, x)
  _, state = run(model, variables, x, train=True)
  mean = variables['batch_stats']['backbone']['bn1']['mean']
  assert not np.allclose(state['batch_stats']['backbone']['bn1']['mean'], mean)


def test_nearest_class_mean_averages_directions():
  features = np.array([[3, 0], [0, 5], [0, -2], [0, -9]], np.float32)
  kernel = nearest_class_mean(features, np.array([0, 0, 2, 2]), 3)
  half = 0.5**0.5
  assert_close(kernel.T, [[half, half], [0, 0], [0, -1]], 1e-6)


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda: NormedLinear(0), 'NormedLinear: num_classes=0'),
    (lambda: LearnableWeightScaling(-1), 'LearnableWeightScaling: num_classes=-1'),
    (lambda: WeightNormHead(0), 'WeightNormHead: num_classes=0'),
    (lambda: tau_normalize(jnp.ones(3), 1.0), r'must be \[features, num_classes\]'),
    (lambda: nearest_class_mean(jnp.ones((3, 2)), jnp.zeros(2, int), 2), r'\(3, 2\) and \(2,\)'),
    (lambda: nearest_class_mean(jnp.ones((3, 2)), jnp.zeros(3, int), 0), 'num_classes=0'),
  ],
)
def test_bad_arguments_raise(call, message):
  with pytest.raises(ValueError, match=message):
    call()
