import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tables
from flax import linen as nn
from models.random_variables import call, random_images, random_variables, run_capture

from jaxlab import models
from jaxlab.quantizers import (
  Rule,
  absmax_ptq,
  activation_qat,
  activation_range,
  feature_scale,
  quantize_feature,
  range_qat,
  range_quantize,
  uniform_rules,
  weight_only_ptq,
  weight_range,
)
from jaxlab.training import by_path


class ConvNet(nn.Module):
  """Convolutions with and without bias, batch norm between them."""

  @nn.compact
  def __call__(self, x, train=False):
    for i, (width, stride) in enumerate(((8, 1), (8, 2), (8, 1))):
      x = nn.Conv(width, (3, 3), stride, use_bias=i == 2, name=f'conv{i}')(x)
      x = nn.BatchNorm(not train, name=f'bn{i}')(x)
      x = nn.relu(x)
    x = models.HookPoint(name='pool')(x.mean((1, 2)))
    return nn.Dense(4, name='fc')(x)


MODEL, IMAGES = ConvNet(), random_images((16, 8, 8, 3))
MIDDLE = 'conv[12]'


def network(bits=2, *, delta=0.0, model=MODEL, x=IMAGES, path=MIDDLE, **options):
  variables = random_variables(model, x)
  rules = uniform_rules(bits, bits, path=path, learned=True)
  return range_qat(model, variables, x, rules, delta=delta, **options), variables


def layer(x, kernel, stride):
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


def norm_relu(y, variables, name):
  bn, stats = variables['params'][name], variables['batch_stats'][name]
  return jnp.maximum(
    (y - stats['mean']) / jnp.sqrt(stats['var'] + 1e-5) * bn['scale'] + bn['bias'], 0
  )


@pytest.mark.parametrize('bits', [1, 2])
def test_ranges_are_measured_layer_after_layer_and_the_network_computes_the_formula(bits):
  quantized, variables = network(bits)
  params, ranges = variables['params'], quantized.variables['learned_ranges']
  x = norm_relu(layer(IMAGES, params['conv0']['kernel'], 1), variables, 'bn0')
  for name, stride in (('conv1', 2), ('conv2', 1)):
    kernel, own = params[name]['kernel'], ranges[name]
    ends = {'kernel': weight_range(kernel), 'input': activation_range(x)}
    for operand, (lower, upper) in ends.items():
      np.testing.assert_allclose(own[operand]['lower'], lower, rtol=1e-4, atol=1e-6)
      np.testing.assert_allclose(own[operand]['upper'], upper, rtol=1e-4)
    new = range_quantize(kernel, *ends['kernel'], bits, signed=True)
    y = layer(range_quantize(x, *ends['input'], bits, signed=False), new, stride)
    scale = np.abs(layer(x, kernel, stride)).mean() / np.abs(y).mean()
    np.testing.assert_allclose(own['output_scale'], scale, rtol=1e-4)
    x = norm_relu(scale * y + params[name].get('bias', 0), variables, name.replace('conv', 'bn'))
  expected = x.mean((1, 2)) @ params['fc']['kernel'] + params['fc']['bias']
  np.testing.assert_allclose(jax.jit(quantized)(IMAGES), expected, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(
    quantized.in_float()(IMAGES), jax.jit(MODEL.apply)(variables, IMAGES), rtol=1e-5
  )


def test_the_sign_of_the_output_scale_does_not_count_but_turns_its_gradient():
  quantized, _ = network()

  def total(ranges):
    return (quantized.update(learned_ranges=ranges)(IMAGES) ** 2).sum()

  ranges = quantized.variables['learned_ranges']
  turned = {
    **ranges,
    'conv1': {**ranges['conv1'], 'output_scale': -ranges['conv1']['output_scale']},
  }
  (value, grads), (again, other) = (jax.jit(jax.value_and_grad(total))(r) for r in (ranges, turned))
  np.testing.assert_allclose(value, again, rtol=1e-6)
  np.testing.assert_allclose(
    grads['conv1']['output_scale'], -other['conv1']['output_scale'], rtol=1e-4
  )
  assert min(abs(leaf) for leaf in jax.tree.leaves(grads)) > 0


def test_weights_alone_or_inputs_alone():
  variables = random_variables(MODEL, IMAGES)
  for operand, other in (('kernel', 'input'), ('input', 'kernel')):
    found = range_qat(MODEL, variables, IMAGES, [Rule(MIDDLE, operand, 4, learned=True)])
    ranges = found.variables['learned_ranges']
    assert set(ranges) == {'conv1', 'conv2'} and other not in ranges['conv1']
    error = np.mean((call(found, IMAGES) - MODEL.apply(variables, IMAGES)) ** 2)
    assert 0 < error < np.var(MODEL.apply(variables, IMAGES))
    assert found.operands() == {path: {operand: 4} for path in ('conv1', 'conv2')}


def test_training_lowers_the_loss_and_moves_ranges_and_weights():
  start, _ = network(2)
  labels = np.arange(16) % 4
  names = ('params', 'learned_ranges')
  trained = {name: start.variables[name] for name in names}
  optimizer = by_path([('learned_ranges/.*', optax.adam(1e-3)), ('.*', optax.adam(1e-2))])

  def loss(trained):
    logits = start.update(**trained)(IMAGES)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  @jax.jit
  def step(trained, state):
    value, grads = jax.value_and_grad(loss)(trained)
    updates, state = optimizer.update(grads, state, trained)
    return optax.apply_updates(trained, updates), state, value

  state, values = optimizer.init(trained), []
  for _ in range(30):
    trained, state, value = step(trained, state)
    values.append(value)
  assert values[-1] < 0.5 * values[0]
  moved = jax.tree.map(
    lambda a, b: np.abs(a - b).max(), trained, {n: start.variables[n] for n in names}
  )
  assert min(jax.tree.leaves(moved['learned_ranges'])) > 0
  assert moved['params']['conv1']['kernel'] > 0


@pytest.mark.exhaustive
def test_layers_of_a_vit_have_signed_inputs():
  model = models.ViT(8, 16, 16, 2, 2, num_classes=3)
  x = random_images((8, 16, 16, 3))
  quantized, variables = network(8, model=model, x=x, path='blocks_.*/(mlp|attention)/.*')
  ends = quantized.variables['learned_ranges']['blocks_0']['mlp']['fc1']['input']
  assert ends['lower'] == -ends['upper'] < 0
  fine, exact = jax.jit(quantized)(x), jax.jit(model.apply)(variables, x)
  assert np.mean((fine - exact) ** 2) < 0.05 * np.var(exact)


@pytest.mark.exhaustive
def test_delta_changes_gradients_alone_and_nothing_is_compiled_twice():
  (plain, _), (scaled, _) = network(2), network(2, delta=0.5)
  np.testing.assert_array_equal(plain(IMAGES), scaled(IMAGES))

  def grad(network):
    loss = lambda params: (network.update(params=params)(IMAGES) ** 2).sum()  # noqa: E731
    return jax.jit(jax.grad(loss))(network.variables['params'])['conv1']['kernel']

  assert np.any(grad(plain) != grad(scaled))
  assert network(2, delta=0.5)[0].hooks == scaled.hooks


def test_a_layer_that_is_the_model_and_one_that_is_called_twice():
  x = jax.random.normal(jax.random.key(0), (16, 4))
  dense = nn.Dense(3)
  params = jax.jit(dense.init)(jax.random.key(1), x)
  found = range_qat(dense, params, x, uniform_rules(8, 8, learned=True))
  np.testing.assert_allclose(call(found, x), jax.jit(dense.apply)(params, x), atol=0.1)

  class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
      layer = nn.Dense(4, name='layer')
      return layer(nn.relu(layer(x)))

  params = jax.jit(Twice().init)(jax.random.key(1), x)
  found = range_qat(Twice(), params, x, uniform_rules(8, 8, learned=True), signed_inputs=None)
  np.testing.assert_allclose(call(found, x), jax.jit(Twice().apply)(params, x), atol=0.15)


def test_in_training_mode_layers_are_measured_behind_the_statistics_of_the_batch():
  quantized, variables = network(2, train=True)
  x = layer(IMAGES, variables['params']['conv0']['kernel'], 1)
  own = variables['params']['bn0']
  x = (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5) * own['scale'] + own['bias']
  lower, upper = activation_range(jnp.maximum(x, 0))
  found = quantized.variables['learned_ranges']['conv1']['input']
  np.testing.assert_allclose([found['lower'], found['upper']], [lower, upper], rtol=1e-4, atol=1e-6)
  assert quantized.variables['batch_stats'] == variables['batch_stats']
  _, changed = quantized(IMAGES, mutable=['batch_stats'])
  assert np.any(changed['batch_stats']['bn0']['mean'] != variables['batch_stats']['bn0']['mean'])
  assert quantized(IMAGES, train=False).shape == (16, 4)


@pytest.mark.parametrize(('units', 'bits'), tables.cells(['feature', 'scaled'], [1, 4], 2))
def test_a_teacher_is_a_float_network_with_quantized_features(bits, units):
  variables = random_variables(MODEL, IMAGES)
  rules = [Rule('pool', 'output', bits, learned=True)]
  teacher = range_qat(MODEL, variables, IMAGES, rules, units=units)
  _, captured = run_capture(MODEL, variables, ['pool'], IMAGES)
  ends = activation_range(captured['pool'])
  own = teacher.variables['learned_ranges']['pool']['output']
  np.testing.assert_allclose([own['lower'], own['upper']], ends, rtol=1e-5)
  beta = feature_scale(captured['pool'], *ends, bits) if units == 'scaled' else None
  expected = quantize_feature(captured['pool'], *ends, bits, units=units, beta=beta)
  found, hooks = teacher.unbind()
  _, seen = models.capture(MODEL, found, ['pool'], IMAGES, hooks=hooks)
  np.testing.assert_allclose(seen['pool'], expected, rtol=1e-4, atol=1e-5)
  assert len(np.unique(np.round(seen['pool'], 4))) <= 2**bits
  fc = variables['params']['fc']
  np.testing.assert_allclose(
    call(teacher, IMAGES), expected @ fc['kernel'] + fc['bias'], rtol=1e-3, atol=1e-4
  )

  def total(ranges):
    return (teacher.update(learned_ranges=ranges)(IMAGES) ** 2).sum()

  grads = jax.grad(total)(teacher.variables['learned_ranges'])['pool']['output']
  assert set(grads) == ({'lower', 'upper', 'beta'} if units == 'scaled' else {'lower', 'upper'})
  assert all(np.isfinite(g) and g != 0 for g in grads.values())


class ByKeyword(nn.Module):
  """Calls its layers by keyword."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(8, name='fc0')(inputs=x))
    return nn.DenseGeneral((2, 3), name='fc1')(inputs=x)


@pytest.mark.exhaustive
def test_layers_may_be_called_by_keyword_and_have_outputs_of_two_axes():
  x = jax.random.normal(jax.random.key(0), (16, 4))
  variables = random_variables(ByKeyword(), x)
  exact = jax.jit(ByKeyword().apply)(variables, x)
  learned = uniform_rules(inputs=8, learned=True)
  networks = {
    'ranges': range_qat(ByKeyword(), variables, x, uniform_rules(8, 8, learned=True)),
    'absmax': absmax_ptq(ByKeyword(), variables, x, uniform_rules(8, 8)),
    'steps': weight_only_ptq(activation_qat(ByKeyword(), variables, x, learned), uniform_rules(8)),
  }
  for name, found in networks.items():
    error = np.mean((found(x) - exact) ** 2)
    assert 0 < error < 0.02 * np.var(exact), name


@pytest.mark.parametrize(
  ('rules', 'message'),
  [
    (uniform_rules(2, path='conv9', learned=True), 'conv9'),
    (uniform_rules(2), 'learned=False'),
    ([Rule('conv1', 'kernel', 2, 'channel', learned=True)], "granularity 'channel'"),
    ([Rule('tail', 'output', 2, learned=True)], 'tail'),
  ],
)
def test_wrong_rules_are_refused(rules, message):
  with pytest.raises(ValueError, match=message):
    range_qat(MODEL, random_variables(MODEL, IMAGES), IMAGES, rules)


def test_ranges_that_do_not_open_are_named():
  variables = random_variables(MODEL, IMAGES)
  variables['params']['conv2']['kernel'][:] = 0
  with pytest.raises(ValueError, match='conv2/kernel'):
    range_qat(MODEL, variables, IMAGES, uniform_rules(2, 2, path=MIDDLE, learned=True))
