import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from golden_vectors import assert_close, golden
from models.random_variables import call, random_images, random_variables, run_capture

from jaxlab import models
from jaxlab.models import GPT2, Swin, ViT, any_of
from jaxlab.parallel import batch_sharding, make_mesh
from jaxlab.quantizers import (
  AffineQuantizer,
  Rule,
  absmax_ptq,
  calibrate,
  edge_rules,
  fake_quantize,
  integer_network,
  largest_magnitudes,
  quantize,
  uniform_rules,
)
from jaxlab.quantizers.compensation import QwTv2, compensate

IMAGES = random_images((8, 16, 16, 3))
TOKENS = np.random.default_rng(0).integers(0, 11, (8, 8)).astype(np.int32)
NETWORKS = {
  'vit': (ViT(8, 16, 16, 2, 2, num_classes=3), IMAGES),
  'swin': (Swin(2, 16, 4, 8, (1, 1), (2, 2), num_classes=3), IMAGES),
  'gpt2': (GPT2(11, 8, 16, 2, 2, tied=False), TOKENS),
}


@golden('tweo', 'absmax_quant')
def test_layers_by_tensor_and_by_channel_agree_with_reference(vectors):
  x, weight = vectors['in_x'], vectors['in_weight_out_in']
  bits, epsilon = vectors['hp_bits'].item(), vectors['hp_eps'].item()
  top = 2 ** (bits - 1) - 1
  model = models.MLP((), num_classes=len(weight))
  params = {'fc': {'kernel': jnp.asarray(weight.T, jnp.float32), 'bias': jnp.zeros(len(weight))}}
  rows = jnp.asarray(x.reshape(-1, x.shape[-1]), jnp.float32)
  for granularity, name in (('tensor', 'w_per_tensor'), ('channel', 'w_per_channel')):
    rules = [Rule('fc', 'kernel', bits, granularity), Rule('fc', 'input', bits)]
    network = absmax_ptq(model, {'params': params}, rows, rules, epsilon=epsilon)
    found, _ = network.unbind()
    for operand, own, value, codes in (
      ('input', 'x_per_tensor', rows, vectors['out_int_x_per_tensor'].reshape(rows.shape)),
      ('kernel', name, params['fc']['kernel'], vectors[f'out_int_{name}'].T),
    ):
      constants = found['quantization']['fc'][operand]
      scale = constants['scale'] * top
      assert_close(scale, np.broadcast_to(vectors[f'out_scale_{own}'].squeeze(), scale.shape), 1e-6)
      got = np.round(value / constants['scale'])
      np.testing.assert_array_equal(got, codes)
    assert_close(found['params']['fc']['kernel'], vectors[f'out_dequant_{name}'].T, 1e-6)
    if granularity == 'tensor':
      out = call(network, rows).reshape(*x.shape[:-1], -1)
      assert_close(out, vectors['out_w8t_a8t_linear'], 1e-6)
      assert_close(integer_network(network)(rows), call(network, rows), 1e-6)


@golden('tweo', 'absmax_quant')
def test_kernels_by_channel_and_inputs_by_token_agree_with_reference(vectors):
  """By the quantizer itself, and by a rule of a network, which finds the scales at each call."""
  bits, epsilon = vectors['hp_bits'].item(), vectors['hp_eps'].item()
  x = jnp.asarray(vectors['in_x'], jnp.float32)
  weight = jnp.asarray(vectors['in_weight_out_in'], jnp.float32)
  found = {}
  for name, value in (('x_per_token', x), ('w_per_channel', weight)):
    quantizer = AffineQuantizer(bits, 'symmetric', 'token', axis=-1, narrow=True)
    params = calibrate(quantizer, value)
    assert_close(params.scale * (2 ** (bits - 1) - 1), vectors[f'out_scale_{name}'], 1e-6)
    np.testing.assert_array_equal(quantize(quantizer, value, params), vectors[f'out_int_{name}'])
    found[name] = fake_quantize(quantizer, value, params)
    assert_close(found[name], vectors[f'out_dequant_{name}'], 1e-6)
  out = found['x_per_token'] @ found['w_per_channel'].T
  assert_close(out, vectors['out_w8c_a8k_linear'], 1e-6)
  model = models.MLP((), num_classes=len(weight))
  params = {'fc': {'kernel': weight.T, 'bias': jnp.zeros(len(weight))}}
  rules = [Rule('fc', 'kernel', bits, 'channel'), Rule('fc', 'input', bits, 'token')]
  rows = x.reshape(-1, x.shape[-1])
  # Calibration data do not matter: scales are those of what is run.
  network = absmax_ptq(model, {'params': params}, 0 * rows, rules, epsilon=epsilon)
  assert_close(call(network, rows).reshape(*x.shape[:-1], -1), vectors['out_w8c_a8k_linear'], 1e-6)


def by_numpy(x, largest, bits):
  top = 2 ** (bits - 1) - 1
  return np.clip(np.round(np.asarray(x, np.float64) / largest * top), -top, top) * largest / top


@pytest.mark.parametrize('name', tables.few(NETWORKS, 'gpt2'))
def test_many_rules_share_a_calibration(name):
  model, x = NETWORKS[name]
  variables, parts = random_variables(model, x), models.anatomy(model)
  batches = list(x.reshape(2, 4, *x.shape[1:]))
  seen = largest_magnitudes(model, variables, batches, parts.layers, parts.stream)
  for bits in (8, 3):
    rules = [*uniform_rules(bits, bits), *uniform_rules(outputs=bits, path=any_of(parts.stream))]
    own = absmax_ptq(model, variables, batches, rules)
    # Other inputs, which are not run: the ranges are those of `seen`.
    shared = absmax_ptq(model, variables, np.zeros_like(batches[0]), rules, seen=seen)
    jax.tree.map(np.testing.assert_array_equal, shared.unbind()[0], own.unbind()[0])
  del seen[f'{parts.layers[1]}/input']
  with pytest.raises(ValueError, match=f"seen lacks '{parts.layers[1]}/input'"):
    absmax_ptq(model, variables, x, uniform_rules(8, 8), seen=seen)


@pytest.mark.parametrize('name', tables.few(NETWORKS, 'vit'))
def test_inputs_of_layers_and_the_stream_take_the_largest_magnitude_of_all_batches(name):
  model, x = NETWORKS[name]
  variables = random_variables(model, x)
  parts = models.anatomy(model)
  linear = uniform_rules(8, inputs=8)
  stream = uniform_rules(outputs=4, path=models.any_of(parts.stream))
  network = absmax_ptq(model, variables, list(x.reshape(2, 4, *x.shape[1:])), [*linear, *stream])
  constants = network.variables['quantization']
  patterns = [models.any_of(parts.stream)]
  _, captured = run_capture(model, variables, patterns, x)
  assert set(captured) == set(parts.stream)
  variables_of, hooks = network.unbind()
  _, quantized = models.capture(model, variables_of, patterns, x, hooks=hooks)
  for path in parts.stream:
    own = constants
    for key in path.split('/'):
      own = own[key]
    largest = np.abs(captured[path]).max()
    np.testing.assert_allclose(own['output']['scale'], largest / 7, rtol=1e-6)
    assert len(np.unique(np.round(quantized[path] / own['output']['scale'], 3))) <= 15
  without = absmax_ptq(model, variables, x, linear)
  assert not [
    p for p in parts.block_paths if 'output' in without.variables['quantization'].get(p, {})
  ]
  exact = jax.jit(model.apply)(variables, x)
  errors = [np.mean((run(x) - exact) ** 2) for run in (without, network)]
  assert 0 < errors[0] < errors[1]


def test_the_formula_saturates_and_leaves_zeros_zero():
  model = models.MLP((3,), num_classes=2)
  x = jax.random.normal(jax.random.key(0), (16, 4))
  params = random_variables(model, x)['params']
  params['fc0']['kernel'][:, 1] = 0
  params['fc0']['bias'] = jnp.array([0.1, 0.0, -50.0])
  for granularity in ('tensor', 'channel'):
    rules = [Rule('.*', 'kernel', 3, granularity), *uniform_rules(inputs=3)]
    network = absmax_ptq(model, {'params': params}, x, rules)
    wide = 3 * x
    kernels = {n: np.asarray(params[n]['kernel'], np.float64) for n in ('fc0', 'fc')}
    axis = 0 if granularity == 'channel' else None
    new = {n: by_numpy(k, np.abs(k).max(axis, keepdims=True) + 1e-8, 3) for n, k in kernels.items()}
    hidden = np.maximum(x @ kernels['fc0'] + params['fc0']['bias'], 0)
    top = np.abs(x).max(), hidden.max()
    h = by_numpy(wide, top[0], 3) @ new['fc0'] + params['fc0']['bias']
    y = by_numpy(np.maximum(h, 0), top[1], 3) @ new['fc'] + params['fc']['bias']
    np.testing.assert_allclose(jax.jit(network)(wide), y, rtol=1e-4, atol=1e-5)
  dead = absmax_ptq(model, {'params': params}, 0 * x, uniform_rules(8, inputs=8))
  assert np.all(np.isfinite(call(dead, x))) and np.all(np.isfinite(call(dead, 0 * x)))


def test_each_token_is_quantized_by_its_own_maximum_at_run_time():
  """In float64 NumPy: a layer's input and a block's output, tokens of very different size, one of them 0."""
  model = models.MLP((3,), num_classes=2)
  x = jax.random.normal(jax.random.key(0), (16, 4)) * jnp.geomspace(1e-3, 1e3, 16)[:, None]
  x = x.at[5].set(0)
  params = random_variables(model, x)['params']
  rules = [Rule('.*', 'input', 3, 'token'), Rule('fc', 'output', 4, 'token')]
  network = absmax_ptq(model, {'params': params}, x[:2], rules)
  each = lambda x, bits: by_numpy(x, np.abs(x).max(-1, keepdims=True) + 1e-8, bits)  # noqa: E731
  kernels = {n: np.asarray(params[n]['kernel'], np.float64) for n in ('fc0', 'fc')}
  hidden = np.maximum(each(x, 3) @ kernels['fc0'] + params['fc0']['bias'], 0)
  expected = each(each(hidden, 3) @ kernels['fc'] + params['fc']['bias'], 4)
  found = jax.jit(network)(x)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
  for row in (0, 5, 15):  # whatever else is in the batch
    np.testing.assert_allclose(
      call(network, x[row : row + 1])[0], expected[row], rtol=1e-4, atol=1e-6
    )
  assert network.operands() == {'fc0': {'input': 3}, 'fc': {'input': 3, 'output': 4}}
  slope = jax.jit(jax.grad(lambda x: network(x).sum()))(x)
  assert np.all(np.isfinite(slope)) and np.any(slope)
  with pytest.raises(ValueError, match='found in float at each call'):
    integer_network(absmax_ptq(model, {'params': params}, x, [Rule('.*', 'kernel', 8), *rules]))


@pytest.mark.exhaustive
@pytest.mark.parametrize('name', tables.few(NETWORKS, 'gpt2'))
def test_tokens_of_their_own_scale_lose_less_where_one_is_huge(name):
  """W8(C)A8(K) with the stream quantized, and W8(C)A8(T) of the same network."""
  model, x = NETWORKS[name]
  variables = random_variables(model, x)
  parts = models.anatomy(model)
  layers = models.any_of(path for block in parts.blocks for path in block.layers)
  outlier = parts.block_paths[0]

  def error(granularity):
    rules = [
      Rule('.*', 'kernel', 8, 'channel'),
      Rule(layers, 'input', 4, granularity),
      Rule(models.any_of(parts.stream), 'output', 4, granularity),
    ]
    network = absmax_ptq(model, variables, x, rules)
    run, hooks = network.unbind()
    patterns = [models.any_of(parts.block_paths)]
    exact, found = (
      models.capture(model, own, patterns, x, hooks=h)[1][outlier]
      for own, h in ((variables, ()), (run, hooks))
    )
    return np.mean((found - exact) ** 2)

  by_token, by_tensor = error('token'), error('tensor')
  assert 0 < by_token < by_tensor


@pytest.mark.exhaustive
def test_a_network_with_scales_a_token_is_compensated():
  model, x = NETWORKS['vit']
  layers = models.any_of(path for b in models.anatomy(model).blocks for path in b.layers)
  rules = [Rule('.*', 'kernel', 3, 'channel'), Rule(layers, 'input', 3, 'token')]
  network = absmax_ptq(model, random_variables(model, x), x, rules)
  found = compensate(network, x, QwTv2(), dtype=jnp.float32)
  assert np.sum(found.report.error_after) < np.sum(found.report.error_before)
  assert found.operands() == network.operands()


@pytest.mark.exhaustive
def test_bits_may_be_traced_and_batches_sharded():
  model, x = NETWORKS['vit']
  variables = random_variables(model, x)
  run = jax.jit(lambda bits: absmax_ptq(model, variables, x, uniform_rules(bits, inputs=bits))(x))
  expected = absmax_ptq(model, variables, x, uniform_rules(4, inputs=4))(x)
  np.testing.assert_allclose(run(4.0), expected, rtol=1e-4, atol=1e-5)
  split = jax.device_put(x, batch_sharding(make_mesh()))
  sharded = absmax_ptq(model, variables, split, uniform_rules(4, inputs=4))
  np.testing.assert_allclose(call(sharded, split), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.exhaustive
def test_the_network_is_compensated_and_run_in_integers():
  model, x = NETWORKS['vit']
  variables = random_variables(model, x)
  network = absmax_ptq(model, variables, x, edge_rules(4, 4))
  found = compensate(network, x, dtype=jnp.float32)
  assert np.all(found.report.error_after <= found.report.error_before * (1 + 1e-5))
  integers = integer_network(found)
  assert not integers.skipped
  np.testing.assert_allclose(call(integers, x), call(found, x), rtol=1e-3, atol=1e-3)


def test_hook_points_of_attention_are_outputs():
  model, x = NETWORKS['vit']
  variables = random_variables(model, x)
  rules = uniform_rules(outputs=2, path='.*/(query|key|value|softmax)')
  network = absmax_ptq(model, variables, x, rules)
  assert np.any(call(network, x) != model.apply(variables, x))


@pytest.mark.parametrize(
  ('rules', 'options', 'message'),
  [
    ([Rule('blocks_9', 'output', 8)], {}, 'blocks_9'),
    ([Rule('.*/gelu', 'input', 8)], {}, 'gelu'),
    ([Rule('head', 'kernel', 1)], {}, r'must lie in \[2, 8\]; got 1'),
    ([Rule('head', 'input', 8, 'channel')], {}, "granularity 'channel'"),
    (
      [Rule('.*', 'input', 8, 'token')],
      {},
      r"'patch_embed/proj' \(Conv, kernel \(8, 8, 3, 16\)\) cannot have a scale a 'token'",
    ),
    ([Rule('head', 'kernel', 8, learned=True)], {}, 'learned=True'),
    ([Rule('head', 'kernel', 8)], {'epsilon': -1.0}, 'epsilon must not be negative'),
    ([Rule('head', 'input', 8)], {'batches': []}, 'batches is empty'),
    (
      [Rule('head', 'input', 8)],
      {'batches': jnp.full((2, 16, 16, 3), jnp.nan)},
      "'head/input' is not finite",
    ),
  ],
)
def test_what_cannot_be_done_is_named(rules, options, message):
  model, x = NETWORKS['vit']
  variables = random_variables(model, x)
  with pytest.raises(ValueError, match=message):
    absmax_ptq(model, variables, **{'batches': x, 'rules': rules, **options})


def test_stacked_blocks_are_refused_and_constants_are_asked_for():
  model, x = NETWORKS['vit']
  scanned = model.clone(scan=True)
  with pytest.raises(ValueError, match='stacked'):
    absmax_ptq(scanned, random_variables(scanned, x), x, uniform_rules(8))
  variables = random_variables(model, x)
  network = absmax_ptq(model, variables, x, uniform_rules(8, inputs=8))
  with pytest.raises(ValueError, match='nothing would be quantized'):
    models.apply(model, variables, x, hooks=network.hooks)
