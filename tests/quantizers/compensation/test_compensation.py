import functools

import compilations
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from flax import linen as nn
from golden_vectors import assert_close, golden
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from models.random_variables import random_images, random_variables
from quantizers.reference_vit import nhwc, vit_of

from jaxlab.models import (
  Anatomy,
  Block,
  Branch,
  Hook,
  MobileNetV2,
  ResNet,
  Swin,
  ViT,
  apply,
  blockwise,
)
from jaxlab.quantizers import Quantized, Rule, edge_rules, ptq
from jaxlab.quantizers.compensation import conv, fits, walk
from jaxlab.quantizers.compensation.cost import bipolar_cost, channel_affine_cost, linear_cost
from jaxlab.quantizers.compensation.driver import compensate
from jaxlab.quantizers.compensation.hook import COLLECTION, compensation_hook
from jaxlab.quantizers.compensation.methods import NBC, QwT, QwTv2
from jaxlab.quantizers.networks.repq import repq

VIT = {'patch_size': 4, 'image_size': 8, 'width': 8, 'num_heads': 2, 'num_classes': 3}
X = random_images((32, 8, 8, 3))
BATCHES = list(X.reshape(4, 8, 8, 8, 3))
RULES = [
  Rule('(blocks|layer).*', 'kernel', 3), Rule('.*(gelu|softmax|relu1|merge)', 'output', 4)
]  # fmt: skip
FLOAT = {'dtype': jnp.float32}
run = jax.jit(lambda network, x: network(x))


def quantize(model, x=X):
  """The float variables of `model`, and its quantized network."""
  variables = random_variables(model, x)
  return variables, ptq(model, variables, x, RULES)


@functools.cache
def small_vit(depth=2):
  model = ViT(**VIT, depth=depth)
  return quantize(model)


def logit_error(variables, network, x=X):
  return float(jnp.mean((jax.jit(network.model.apply)(variables, x) - run(network, x)) ** 2))


@golden('qwt', 'tiny_vit_pipeline')
def test_pipeline_agrees_with_reference(vectors):
  with jax.enable_x64(True):
    images = nhwc(vectors['in_calibration_images'])
    model, variables = vit_of(vectors.tree('init_'), vectors.param('num_heads'), images)
    bits = vectors.param('weight_bits'), vectors.param('act_bits')
    few = images[: vectors.param('num_quant_calibration')]
    quantized = repq(model, variables, few, edge_rules(*bits))
    half = len(images) // 2
    batches = [images[:half], images[half : 2 * half]]
    result = compensate(quantized, batches, dtype=jnp.float64)
    for i, path in enumerate(result.report.paths):
      own = result.variables[COLLECTION][path]
      assert_close(own['weight'], vectors[f'comp_weight_{i}'], 1e-9)
      assert_close(own['bias'], vectors[f'comp_bias_{i}'], 1e-9)
      assert_close(result.report.r2[i], vectors[f'comp_r2_{i}'], 1e-9)
      before = np.mean(vectors[f'comp_error_{i}'] ** 2)
      assert_close(result.report.error_before[i], before, 1e-9)
    logits = run(result, nhwc(vectors['in_test_images']))
    assert_close(logits, vectors['out_logits_qwt'], 1e-9)


METHODS = {
  'qwt': QwT(),
  'linear': QwTv2(),
  'branch': QwTv2('branch'),
  'block': QwTv2('block'),
  'nbc': NBC(),
}


@pytest.mark.parametrize(('method', 'target'), tables.cells(list(METHODS), ['local', 'global'], 4))
def test_errors_on_calibration_data_never_grow_and_the_network_gets_closer(method, target):
  variables, quantized = small_vit()
  result = compensate(quantized, BATCHES, METHODS[method], target=target, **FLOAT)
  report = result.report
  assert np.all(report.error_after <= report.error_before * (1 + 1e-6))
  assert np.all(report.error_after < 0.95 * report.error_before) and not np.any(report.skipped)
  assert logit_error(variables, result) < logit_error(variables, quantized)


class Merging(nn.Module):
  """Blocks of two widths with a merging layer between, a mask made of the input, and a pair returned."""

  @nn.compact
  def __call__(self, x, scale: float = 1.0):
    mask = (x[..., :1] > 0).astype(x.dtype)
    x = nn.Dense(6, name='embed')(x)
    for i in range(4):
      if i == 2:
        x = x.reshape(x.shape[0], -1, 12)
        x = nn.Dense(8, name='merge')(nn.LayerNorm(name='norm')(x))
        mask = mask[:, ::2]
      x, mask = Masked(name=f'blocks_{i}')(x, mask=mask, scale=scale)
    return nn.Dense(3, name='head')(x.mean(1))


MERGING = Anatomy(['embed'], [f'blocks_{i}' for i in range(4)], head=['head'])


class Masked(nn.Module):
  @nn.compact
  def __call__(self, x, mask, scale):
    y = nn.Dense(x.shape[-1], name='fc')(x) * mask
    return x + scale * jnp.tanh(y), mask


def naive_qwt(model, quantized, x, path, before):
  """Input, output and float output of one block, from runs of the whole network."""
  variables, hooks = quantized.unbind()
  hooks = (*hooks, *before)
  seen = {}

  def keep(site, call, x, **kwargs):
    y = call(x, **kwargs)
    seen['x'], seen['y'], seen['mask'] = x, y[0], kwargs['mask']
    return y

  apply(model, variables, x, 0.5, hooks=[*hooks, Hook(path, call=keep)])
  block = {'params': quantized.float_variables['params'][path]}
  full = Masked().apply(block, seen['x'], mask=seen['mask'], scale=0.5)[0]
  return seen['x'], full - seen['y']


@pytest.mark.exhaustive
def test_anything_between_blocks_and_their_other_arguments_are_followed():
  model, x = Merging(), random_images((32, 4, 8))
  variables = random_variables(model, x)
  params = jax.tree.map(lambda a: jnp.round(4 * a) / 4, variables['params'])
  quantized = Quantized.of(model, {'params': params}, variables, ())
  batches = [(batch, 0.5) for batch in x.reshape(4, 8, 4, 8)]
  result = compensate(quantized, batches, anatomy=MERGING, **FLOAT)
  assert result.report.paths == ('blocks_0', 'blocks_1', 'blocks_2', 'blocks_3')
  done = []
  for path in result.report.paths:
    known = {name: result.variables[COLLECTION][name] for name in done}
    network = Quantized.of(model, {'params': params, COLLECTION: known}, variables, ())
    inputs, error = naive_qwt(model, network, x, path, [compensation_hook(jnp.float32)])
    own = result.variables[COLLECTION][path]
    rows = np.asarray(inputs, np.float64).reshape(-1, inputs.shape[-1])
    a = np.concatenate([rows, np.ones((len(rows), 1))], 1)
    e = np.asarray(error, np.float64).reshape(len(rows), -1)
    expected = np.linalg.lstsq(a, e, rcond=None)[0]
    assert_close(np.vstack([own['weight'], own['bias']]), expected, 1e-3)
    done.append(path)


@pytest.mark.parametrize('method', tables.few([QwT(), QwTv2(), NBC()], QwT()))
def test_blocks_of_one_shape_are_compiled_once(method):
  run = lambda depth: compensate(small_vit(depth)[1], BATCHES[:2], method, **FLOAT)  # noqa: E731
  small_vit(5)
  run(2)  # what jitted library functions compile once and for all
  totals = []
  for depth in (2, 5):
    with compilations.counted() as count:
      run(depth)
    totals.append(count.total())
  assert 0 < totals[1] <= totals[0]


def test_device_memory_does_not_grow_with_the_number_of_batches(monkeypatch):
  _, quantized = small_vit()
  peaks = []
  restore = blockwise.Parked.restore

  def watched(self):
    array = restore(self)
    peaks[-1] = max(peaks[-1], sum(a.nbytes for a in jax.live_arrays()))
    return array

  monkeypatch.setattr(blockwise.Parked, 'restore', watched)
  monkeypatch.setattr(
    blockwise, 'to_host', np.array
  )  # on a CPU, it would share the device's memory
  for count in (2, 8):
    peaks.append(0)
    compensate(quantized, iter([BATCHES[0]] * count), **FLOAT)
  assert peaks[1] <= peaks[0] + 1000


@pytest.mark.parametrize('method', tables.few([QwT(), NBC()], QwT()))
def test_result_is_the_same_on_eight_devices_as_on_one(method):
  _, quantized = small_vit()
  mesh = Mesh(np.asarray(jax.devices()), ('data',))
  place = lambda spec, tree: jax.device_put(tree, NamedSharding(mesh, spec))  # noqa: E731
  spread = [place(PartitionSpec('data'), batch) for batch in BATCHES]
  everywhere = place(PartitionSpec(), quantized)
  one = compensate(quantized, BATCHES, method, **FLOAT)
  eight = compensate(everywhere, spread, method, **FLOAT)
  for a, b in zip(*(jax.tree.leaves(r.variables[COLLECTION]) for r in (one, eight))):
    assert_close(b, a, 2e-3)
  assert_close(eight.report.error_after, one.report.error_after, 1e-4)


def test_convolutional_blocks_are_compensated_in_groups_and_strides():
  model = ResNet(stage_sizes=(1, 1), width=8, widths=(8, 16), stem='cifar', num_classes=3)
  x = random_images((128, 8, 8, 3))
  variables, quantized = quantize(model, x)
  method = QwT(channels_per_group=4)
  result = compensate(quantized, [x[:64], x[64:]], method, **FLOAT)
  assert result.variables[COLLECTION]['layer2_0']['weight'].shape == (1, 1, 4, 16)
  assert np.all(result.report.error_after <= result.report.error_before * (1 + 1e-6))
  assert not np.all(result.report.skipped)  # R^2 around the mean of the batch alone may be negative
  assert logit_error(variables, result, x) < logit_error(variables, quantized, x)


@pytest.mark.parametrize(
  ('method', 'match'),
  [
    (QwT(channels_per_group=4), 'layer2_0: 2 groups .* do not divide 8 input and 15 output'),
    (NBC(channels_per_group=4), 'layer2_0: 2 groups .* do not divide 8 input and 15 output'),
    (QwT(kernel_size=2), 'layer1_0: kernel_size=2: expected an odd size'),
    (QwT(kind='linear'), 'layer2_0: .* a linear compensation needs one input token per output'),
    (QwTv2('block', held_out=True), 'layer1_0: held_out=True needs at least two'),
    (QwTv2(modules='nothing'), "No layer of 'layer1_0' is one to compensate"),
  ],
)
def test_what_cannot_be_compensated_is_said_before_any_work(method, match, monkeypatch):
  model = ResNet(stage_sizes=(1, 1), width=8, widths=(8, 15), stem='cifar', num_classes=3)
  x = random_images((8, 8, 8, 3))
  _, quantized = quantize(model, x)

  def work(*_):
    raise AssertionError('a block was run')

  monkeypatch.setattr('jaxlab.quantizers.compensation.driver.Stream.advance', work)
  with pytest.raises(ValueError, match=match):
    compensate(quantized, [x], method, **FLOAT)


def test_start_block_leaves_the_blocks_before_alone():
  _, quantized = small_vit()
  result = compensate(quantized, BATCHES, start_block=1, **FLOAT)
  assert result.report.paths == ('blocks_1',) and set(result.variables[COLLECTION]) == {'blocks_1'}
  with pytest.raises(ValueError, match='start_block=2 is not one of the 2'):
    compensate(quantized, BATCHES, start_block=2, **FLOAT)


@pytest.mark.exhaustive
def test_half_compensation_is_close_to_float():
  _, quantized = small_vit()
  half, full = (compensate(quantized, BATCHES, dtype=dtype) for dtype in (jnp.float16, jnp.float32))
  assert_close(run(half, X), run(full, X), 0.1)


@pytest.mark.exhaustive
@pytest.mark.parametrize('method', tables.few([QwT(), QwTv2('block'), NBC()], NBC()))
def test_gradients_reach_the_compensation(method):
  _, quantized = small_vit()
  result = compensate(quantized, BATCHES[:2], method, **FLOAT)

  def loss(own):
    return jnp.sum(result.update(compensation=own)(X[:4]) ** 2)

  for gradient in jax.tree.leaves(jax.jit(jax.grad(loss))(result.variables[COLLECTION])):
    assert np.all(np.isfinite(gradient))
  first = jax.jit(jax.grad(loss))(result.variables[COLLECTION])['blocks_0']
  for name in set(first) & {'weight', 'bias', 'gamma', 'beta', 'kappa'}:
    assert np.any(first[name] != 0)


@pytest.mark.exhaustive
def test_reported_costs_are_those_of_the_formulas():
  _, quantized = small_vit()
  costs = {QwT(): linear_cost(8, 8, 5), QwTv2('block'): channel_affine_cost(8, 5)}
  costs[NBC()] = bipolar_cost(8, 8, 5)
  for method, (parameters, products) in costs.items():
    report = compensate(quantized, BATCHES[:2], method, **FLOAT).report
    np.testing.assert_array_equal(report.parameters, parameters)
    np.testing.assert_array_equal(report.multiply_adds, products)


@pytest.mark.parametrize(
  'method', tables.first([NBC('mean_abs'), NBC('max_abs'), NBC('search', factors=(1.0, np.inf))])
)
def test_scale_rules_run_and_help(method):
  _, quantized = small_vit()
  report = compensate(quantized, BATCHES, method, **FLOAT).report
  assert np.all(report.error_after < report.error_before)


@pytest.mark.exhaustive
def test_search_goes_over_the_rows_a_fixed_number_of_times(monkeypatch):
  _, quantized = small_vit()
  passes = []
  fold = fits.Rows.fold
  monkeypatch.setattr(
    fits.Rows, 'fold', lambda *args, **kwargs: passes.append(args) or fold(*args, **kwargs)
  )
  for factors in ((1.0, np.inf), (0.25, 1.0, 4.0, np.inf)):
    passes.clear()
    compensate(quantized, BATCHES, NBC('search', factors=factors), start_block=1, **FLOAT)
    assert len(passes) == 4


@pytest.mark.parametrize('granularity', tables.few(['linear', 'block'], 'block'))
def test_errors_from_the_statistics_are_those_that_are_measured(granularity, monkeypatch):
  _, quantized = small_vit()
  run = lambda: compensate(quantized, BATCHES, QwTv2(granularity), **FLOAT)  # noqa: E731
  summed = run()
  monkeypatch.setattr(walk.BlockWalk, '_has_exact_sums', lambda self, part: False)
  measured = run()
  for name in ('error_before', 'error_after', 'r2'):
    assert_close(getattr(summed.report, name), getattr(measured.report, name), 1e-4)
  for a, b in zip(*(jax.tree.leaves(r.variables[COLLECTION]) for r in (summed, measured))):
    assert_close(a, b, 1e-4)


def test_held_out_gate_runs_and_needs_two_batches():
  _, quantized = small_vit()
  method = QwTv2('block', held_out=True)
  report = compensate(quantized, BATCHES, method, **FLOAT).report
  assert np.all(report.error_after < report.error_before)
  with pytest.raises(ValueError, match='blocks_0: held_out=True needs at least two'):
    compensate(quantized, BATCHES[:1], method, **FLOAT)


def test_bad_arguments_raise():
  _, quantized = small_vit()
  run = functools.partial(compensate, quantized, **FLOAT)
  with pytest.raises(ValueError, match='batches is empty'):
    run([])
  with pytest.raises(ValueError, match=r"block pattern 'stage_0'"):
    run(BATCHES, blocks='stage_0')
  with pytest.raises(ValueError, match=r"lies inside 'blocks_0'"):
    run(BATCHES, blocks=r'blocks_0.*')
  with pytest.raises(ValueError, match='blocks_0: Calibration rows are not finite'):
    run([BATCHES[0] * np.nan])
  with pytest.raises(ValueError, match="target='teacher'"):
    run(BATCHES, target='teacher')
  with pytest.raises(ValueError, match=r'No layer of .*qkv'):
    run(BATCHES, QwTv2(modules='fc9'))
  with pytest.raises(ValueError, match='granularity='):
    QwTv2('layer')
  for rule in (0.0, 'median'):
    with pytest.raises(ValueError, match='scale_rule='):
      NBC(rule)
  with pytest.warns(RuntimeWarning, match='5 calibration rows for 8 features'):
    run([X[:1]])


def test_a_network_of_unknown_parts_is_named_by_an_anatomy_or_refused():
  model, x = Merging(), random_images((8, 4, 8))
  variables = random_variables(model, x)
  network = Quantized(model, variables, {})
  run = functools.partial(compensate, network, [x], **FLOAT)
  with pytest.raises(ValueError, match=r'parts of Merging are not known .*anatomy='):
    run()
  with pytest.raises(ValueError, match=r"block pattern 'blocks_7'\. Closest .*blocks_"):
    run(anatomy=Anatomy(blocks=['blocks_0', 'blocks_7']))
  with pytest.raises(ValueError, match='names no blocks: give blocks='):
    run(anatomy=Anatomy())
  with pytest.raises(
    ValueError, match=r"No layer of 'blocks_0' .*it has fc\. .*tells the branches"
  ):
    run(QwTv2('branch'), anatomy=MERGING)
  blocks = [Block(path, [Branch('mlp', [f'{path}/fc'], path)]) for path in MERGING.block_paths]
  result = run(QwTv2('branch'), anatomy=Anatomy(blocks=blocks))
  assert result.report.paths == tuple(f'blocks_{i}/fc' for i in range(4))
  result = run(blocks='blocks_[01]')
  assert result.report.paths == ('blocks_0', 'blocks_1')


@pytest.mark.parametrize(
  ('model', 'blocks', 'expected'),
  [
    (
      MobileNetV2((1, 1), (4, 4), (2, 1), 2, 4, 4),
      None,
      ['blocks_0_0/conv_pw', 'blocks_1_0/conv_pwl'],
    ),
    (
      Swin(2, 8, 2, 4, (1, 1), (1, 1)),
      r'layers_1/.*_0|.*/downsample',
      ['layers_1/downsample/reduction']
      + [f'layers_1/blocks_0/{layer}' for layer in ('attention/proj', 'mlp/fc2')],
    ),
  ],
  ids=['mobilenet', 'swin'],
)
def test_branches_end_where_the_anatomy_says(model, blocks, expected):
  variables = random_variables(model, X[:8])
  params = jax.tree.map(lambda a: np.round(4 * a) / 4, variables['params'])
  quantized = Quantized.of(model, {**variables, 'params': params}, variables, ())
  result = compensate(quantized, [X[:8]], QwTv2('branch'), blocks=blocks, **FLOAT)
  assert list(result.report.paths) == expected


def test_stacked_blocks_are_refused():
  model = ViT(**VIT, depth=2, scan=True)
  variables = random_variables(model, X)
  with pytest.raises(ValueError, match='stacked'):
    compensate(Quantized(model, variables, {}), BATCHES)


@pytest.mark.parametrize(
  'channels', [(16, 24), (24, 24), (192, 320), (320, 192), (320, 1280), (64, 64), (256, 512)]
)
def test_default_groups_divide_the_channels_of_any_block(channels):
  bound = max(channels[0] // 64, 1)
  divisors = [n for n in range(1, max(channels) + 1) if channels[0] % n == channels[1] % n == 0]
  expected = max(n for n in divisors if n <= bound)
  assert conv.num_groups(*channels) == expected
  for method in (QwT(), NBC()):
    assert conv.num_groups(*channels, method.channels_per_group) == expected
