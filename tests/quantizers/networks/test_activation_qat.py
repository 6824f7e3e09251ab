import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tables
from flax import linen as nn
from golden_vectors import assert_close, golden
from models.random_variables import call, random_images, random_variables

from jaxlab import models
from jaxlab.models import GPT2, ResNet, Swin, ViT
from jaxlab.models.vit import Block
from jaxlab.quantizers import (
  Rule,
  activation_fake_quantize,
  activation_qat,
  activation_rules,
  integer_network,
  percentile_ptq,
  uniform_rules,
  weight_only_lsq,
  weight_only_ptq,
)
from jaxlab.quantizers.compensation import NBC, QwT, compensate, fits
from jaxlab.quantizers.networks.operands import affine_constants, fake_quantize_operand
from jaxlab.quantizers.numerics.affine import AffineQuantizer

IMAGES = random_images((16, 16, 16, 3))
TOKENS = np.random.default_rng(0).integers(0, 11, (8, 8)).astype(np.int32)
VIT = ViT(8, 16, 16, 2, 2, num_classes=3)
NETWORKS = {
  'vit': (VIT, IMAGES),
  'swin': (Swin(2, 16, 4, 8, (1, 1), (2, 2), num_classes=3), IMAGES),
  'gpt2': (GPT2(11, 8, 16, 2, 2), TOKENS),
  'resnet': (ResNet(stage_sizes=(1, 1), block='basic', width=8, num_classes=3), IMAGES),
}


def network(name='vit', bits=4, **options):
  model, x = NETWORKS[name]
  variables = random_variables(model, x)
  rules = activation_rules(models.anatomy(model), bits, **options)
  return activation_qat(model, variables, x, rules), variables, x


@golden('gplq', 'percentile_weight_quantizer')
@pytest.mark.parametrize('x64', [True, False])
def test_asymmetric_kernels_agree_with_reference(vectors, x64):
  rtol = 1e-9 if x64 else 5e-5
  bits = vectors['hp_bits'].item()
  with jax.enable_x64(x64):
    weight = jnp.asarray(vectors['in_weight'], float)
    for granularity in ('channel', 'tensor'):
      quantizer = AffineQuantizer(rule='asymmetric', granularity=granularity, axis=-1)
      constants = affine_constants(quantizer, weight.T, jnp.asarray(bits))
      name = f'per_{granularity}'
      assert_close(constants['scale'], vectors[f'out_delta_{name}'], rtol)
      assert_close(constants['zero_point'], vectors[f'out_zero_point_{name}'], rtol)
      assert_close(
        fake_quantize_operand(weight.T, constants).T, vectors[f'out_dequant_{name}'], rtol
      )
    model = models.MLP((), num_classes=len(weight))
    params = {'fc': {'kernel': weight.T, 'bias': jnp.zeros(len(weight))}}
    rows = jnp.ones((2, weight.shape[1]), weight.dtype)
    stage1 = activation_qat(model, {'params': params}, rows, [Rule('fc', 'input', 8, learned=True)])
    stage2 = weight_only_ptq(stage1, uniform_rules(bits), symmetric=False)
    assert_close(
      stage2.variables['params']['fc']['kernel'].T, vectors['out_dequant_per_channel'], rtol
    )


def symmetric_by_numpy(row, bits):
  best = None
  for share in (0.999, 0.9999, 0.99999):
    low, high = np.quantile(row, 1 - share), np.quantile(row, share)
    top = 2 ** (bits - 1) - 1
    step = max(abs(low), abs(high)) / top
    new = np.clip(np.round(row / step), -top - 1, top) * step
    error = np.mean((new - row) ** 2)
    if best is None or error < best[0]:
      best = error, new
  return best[1]


@pytest.mark.exhaustive
def test_symmetric_kernels_are_those_of_the_best_percentile():
  stage1, variables, _ = network()
  stage2 = weight_only_ptq(stage1, uniform_rules(3))
  for path in (('blocks_0', 'mlp', 'fc1'), ('head',)):
    kernel, new = variables['params'], stage2.variables['params']
    for key in path:
      kernel, new = kernel[key], new[key]
    expected = [symmetric_by_numpy(row.astype(np.float64), 3) for row in kernel['kernel'].T]
    np.testing.assert_allclose(new['kernel'].T, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive
def test_learned_kernels_lie_behind_the_activations_with_lsq_steps():
  stage1, variables, x = network()
  stage2 = weight_only_lsq(stage1, uniform_rules(3, learned=True))
  assert stage2.operands()['blocks_0/mlp/fc1'] == {'input': 4, 'kernel': 3}
  bound, _ = stage2.unbind()
  for path in (('blocks_0', 'mlp', 'fc1'), ('patch_embed', 'proj')):
    kernel, new = variables['params'], bound['params']
    for key in path:
      kernel, new = kernel[key], new[key]
    w = np.asarray(kernel['kernel'], np.float64).reshape(-1, kernel['kernel'].shape[-1])
    step = 2 * np.abs(w).mean(0) / np.sqrt(3)
    expected = np.clip(np.round(w / step), -4, 3) * step
    np.testing.assert_allclose(
      np.reshape(new['kernel'], expected.shape), expected, rtol=1e-5, atol=1e-6
    )
  steps = stage2.variables['activation_steps'], stage1.variables['activation_steps']
  jax.tree.map(np.testing.assert_array_equal, *steps)
  exact = stage2.in_float()  # what compensation compares with: quantized activations, float kernels
  np.testing.assert_array_equal(call(exact, x), stage1(x))
  assert np.any(call(stage2, x) != stage1(x))
  with pytest.raises(ValueError, match='quantized already'):
    weight_only_lsq(stage2, uniform_rules(3, learned=True))
  with pytest.raises(ValueError, match='learned'):
    weight_only_lsq(stage1, uniform_rules(3))
  with pytest.raises(ValueError, match='weight_only_lsq takes a Quantized'):
    weight_only_lsq(variables, uniform_rules(3, learned=True))


@pytest.mark.parametrize('name', tables.few(NETWORKS, 'vit', 'resnet'))
def test_steps_are_those_of_the_float_network_and_the_rules_name_all_inputs(name):
  quantized, variables, x = network(name)
  model = quantized.model
  steps = quantized.variables['activation_steps']
  flat = {
    '/'.join(p.key for p in path[:-1]): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(steps)
  }
  parts = models.anatomy(model)
  attention = [b.output for block in parts.blocks for b in block.branches if b.kind == 'attention']
  points = [f'{path}/{p}' for path in attention for p in ('query', 'key', 'value', 'softmax')]
  assert set(flat) == {*parts.layers, *points}
  bits = {p: 8 if p in parts.edges else 4 for p in flat}
  seen = {}

  def keep(site, call, *args, **kwargs):
    seen[site.path] = args[0] if args else None
    return call(*args, **kwargs)

  models.apply(model, variables, x, hooks=[models.Hook('.*', call=keep)])
  for path, step in flat.items():
    values = np.asarray(seen[path], np.float64)
    top = 2 ** (bits[path] - 1) - 1
    if path in points:
      expected = np.abs(np.quantile(values, [0.01, 0.99])).max() / top
    else:
      expected = np.abs(values).reshape(-1, values.shape[-1]).max(0) / top
    np.testing.assert_allclose(step, np.maximum(expected, 1e-8), rtol=2e-4)


def test_several_batches_are_taken_as_one():
  """Percentiles are those of all values, whatever batches they come in."""
  variables = random_variables(VIT, IMAGES)
  rules = activation_rules(models.anatomy(VIT))
  whole, parts = (
    activation_qat(VIT, variables, batches, rules).variables['activation_steps']
    for batches in (IMAGES, [IMAGES[:3], IMAGES[3:]])
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, parts)


class Heads(nn.Module):
  """Brings two heads together by sums over both of their axes."""

  @nn.compact
  def __call__(self, x):
    x = nn.DenseGeneral((2, 3), name='split')(x)
    y = nn.DenseGeneral(4, axis=(-2, -1), name='joined')(x)
    return y + nn.Einsum((2, 3, 4), 'bhc,hco->bo', name='einsum')(x)


def test_channels_are_all_entries_of_what_a_layer_sums_over():
  x = jax.random.normal(jax.random.key(0), (32, 5))
  variables = random_variables(Heads(), x)
  rules = uniform_rules(inputs=3, learned=True)
  quantized = activation_qat(Heads(), variables, x, rules)
  own = variables['params']
  split = x @ own['split']['kernel'].reshape(5, 6) + own['split']['bias'].reshape(6)
  steps = quantized.variables['activation_steps']
  for name in ('joined', 'einsum'):
    np.testing.assert_allclose(steps[name]['input'], np.abs(split).max(0) / 3, rtol=1e-5)
  step = np.abs(x).max(0) / 3
  inner = np.clip(np.round(x / step), -4, 3) * step
  inner = inner @ own['split']['kernel'].reshape(5, 6) + own['split']['bias'].reshape(6)
  step = np.asarray(steps['joined']['input'])
  inner = np.clip(np.round(inner / step), -4, 3) * step
  kernel = own['joined']['kernel'].reshape(6, 4) + own['einsum']['kernel'].reshape(6, 4)
  expected = inner @ kernel + own['joined']['bias'] + own['einsum']['bias']
  np.testing.assert_allclose(call(quantized, x), expected, rtol=1e-4, atol=1e-5)


def test_the_network_computes_with_quantized_inputs_and_float_kernels():
  quantized, variables, x = network('vit', attention=False, granularity='tensor')
  steps = quantized.variables['activation_steps']
  assert steps['blocks_0']['mlp']['fc1']['input'].shape == ()
  assert 'query' not in steps['blocks_0']['attention']
  bits = quantized.operands()
  assert bits['blocks_0/mlp/fc1'] == {'input': 4} and bits['head'] == {'input': 8}
  _, captured = models.capture(
    VIT, quantized.unbind()[0], ['pool', 'head'], x, hooks=quantized.hooks
  )
  head = variables['params']['head']
  pooled = activation_fake_quantize(captured['pool'], steps['head']['input'], 8)
  np.testing.assert_allclose(
    captured['head'], pooled @ head['kernel'] + head['bias'], rtol=1e-4, atol=1e-5
  )


def test_both_stages_with_compensation():
  stage1, _, x = network('vit', 4)
  trained = {name: stage1.variables[name] for name in ('params', 'activation_steps')}
  optimizer = optax.adamw(1e-3, weight_decay=0.0)
  labels = np.arange(len(x)) % 3

  @jax.jit
  def step(trained, state):
    def loss(trained):
      logits = stage1.update(**trained)(x)
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, grads = jax.value_and_grad(loss)(trained)
    updates, state = optimizer.update(grads, state, trained)
    return optax.apply_updates(trained, updates), state, value

  state, values = optimizer.init(trained), []
  for _ in range(20):
    trained, state, value = step(trained, state)
    values.append(value)
  assert values[-1] < 0.7 * values[0]
  steps = jax.tree.map(
    lambda a, b: np.abs(a - b).max(),
    trained['activation_steps'],
    stage1.variables['activation_steps'],
  )
  assert min(jax.tree.leaves(steps)) > 0
  stage1 = stage1.update(**trained)
  stage2 = weight_only_ptq(stage1, uniform_rules(3))
  # What compensation compares with: trained float kernels behind quantized activations.
  np.testing.assert_allclose(stage2.in_float()(x), call(stage1, x), rtol=1e-5, atol=1e-6)
  assert np.any(call(stage2, x) != call(stage1, x))
  better = compensate(stage2, x, dtype=jnp.float32)
  assert np.all(better.report.error_after <= better.report.error_before * (1 + 1e-5))
  assert np.mean((call(better, x) - call(stage1, x)) ** 2) < np.mean(
    (call(stage2, x) - call(stage1, x)) ** 2
  )
  with pytest.raises(ValueError, match='inputs of layers are not quantized here'):
    integer_network(stage1)


@pytest.mark.exhaustive
def test_the_ridge_may_be_relative_and_spare_the_bias():
  """The first block's compensation, by normal equations in float64 on centered rows."""
  stage1, _, x = network()
  stage2 = weight_only_ptq(stage1, uniform_rules(2))
  better = compensate(stage2, x, QwT(ridge=0.3, relative=True), dtype=jnp.float32)
  seen = {}

  def keep(site, call, x, *args):
    seen['x'], seen['y'] = x, call(x, *args)
    return seen['y']

  outputs = []
  for quantized in (stage1, stage2):
    variables, hooks = quantized.unbind()
    models.apply(VIT, variables, x, hooks=[*hooks, models.Hook('blocks_0', call=keep)])
    outputs.append(np.asarray(seen['y'], np.float64).reshape(-1, 16))
    if quantized is stage1:
      rows_of_stage1 = seen['x']
  # The patch embedding of the second stage is quantized: its block sees other rows.
  rows = np.asarray(seen['x'], np.float64).reshape(-1, 16)
  assert np.any(rows_of_stage1 != seen['x'])
  variables, hooks = stage1.unbind()
  block = {name: tree.get('blocks_0', {}) for name, tree in variables.items()}
  exact = models.apply(Block(2), block, seen['x'], hooks=hooks, prefix='blocks_0')
  error = np.asarray(exact, np.float64).reshape(-1, 16) - outputs[1]
  a, b = rows - rows.mean(0), error - error.mean(0)
  ridge = 0.3 * np.trace(a.T @ a) / 16
  weight = np.linalg.solve(a.T @ a + ridge * np.eye(16), a.T @ b)
  own = better.variables['compensation']['blocks_0']
  np.testing.assert_allclose(own['weight'], weight, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(
    own['bias'], error.mean(0) - rows.mean(0) @ weight, rtol=1e-3, atol=1e-4
  )
  with pytest.raises(ValueError, match='relative=True is about a ridge of the linear form'):
    QwT(relative=True)
  for method in (QwT, NBC):
    with pytest.raises(ValueError, match='ridge=-1: expected a number of at least 0'):
      method(ridge=-1)


@pytest.mark.exhaustive
def test_a_relative_ridge_of_convolutions_is_refused_before_any_work(monkeypatch):
  model, x = NETWORKS['resnet']
  quantized = percentile_ptq(model, random_variables(model, x), x, uniform_rules(4, 4))
  monkeypatch.setattr(fits, 'first_pass', pytest.fail)
  with pytest.raises(ValueError, match='relative=True is about the linear form'):
    compensate(quantized, x, QwT(ridge=0.1, relative=True))


@pytest.mark.parametrize(
  ('rules', 'message'),
  [
    ([Rule('blocks_9/.*', 'input', 4, learned=True)], 'blocks_9'),
    ([Rule('head', 'input', 4)], 'learned=False'),
    ([Rule('head', 'kernel', 4, learned=True)], "operand 'kernel'"),
    ([Rule('head', 'input', 9, learned=True)], r'must lie in \[2, 8\]; got 9'),
    ([Rule('.*/query', 'input', 4, 'channel', learned=True)], "one of the 'tensor'"),
  ],
)
def test_wrong_rules_are_refused(rules, message):
  with pytest.raises(ValueError, match=message):
    activation_qat(VIT, random_variables(VIT, IMAGES), IMAGES, rules)


def test_what_cannot_be_quantized_is_named():
  stage1, variables, x = network()
  with pytest.raises(ValueError, match='batches is empty'):
    activation_qat(VIT, variables, [], activation_rules(models.anatomy(VIT)))
  with pytest.raises(ValueError, match=r'patch_embed/proj: .*not finite'):
    activation_qat(VIT, variables, x * np.nan, activation_rules(models.anatomy(VIT)))
  with pytest.raises(ValueError, match='quantized already'):
    weight_only_ptq(percentile_ptq(VIT, variables, x, uniform_rules(4, 4)), uniform_rules(4))
  with pytest.raises(ValueError, match='tail'):
    weight_only_ptq(stage1, uniform_rules(4, path='tail'))
  with pytest.raises(ValueError, match='takes a Quantized'):
    weight_only_ptq(variables, uniform_rules(4))
