import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from models.random_variables import run_capture

from experiments import tweo
from experiments.harness import data as harness_data
from experiments.harness import launcher
from experiments.harness.networks import Loaded
from experiments.harness.runs import variables_of
from experiments.protocols import absmax_evaluation, outlier_statistics, outliers
from jaxlab import data, models, quantizers

DIGITS = {
  'network.model.width': 8, 'network.model.depth': 2, 'network.model.num_heads': 2,
  'network.model.patch_size': 4, 'network.recipe.epochs': 1,
  'network.recipe.schedule.warmup_epochs': 0, 'calibration.count': 64, 'calibration.batch_size': 64,
  'bits': '16w3a', 'schemes': 'stream', 'log_every': 1, 'penalty.weight': 10, 'timed': 0,
}  # fmt: skip


@pytest.fixture(scope='module')
def config():
  return launcher.load('tweo', 'embedded', [f'{key}={value}' for key, value in DIGITS.items()])


@pytest.fixture(scope='module')
def batch(config):
  images = np.random.default_rng(0).integers(0, 255, (96, 8, 8, 1), np.uint8)
  return {'image': images, 'label': np.arange(96) % 10, 'index': np.arange(96)}


@pytest.fixture(scope='module')
def network(config):
  """The network as drawn, with its data."""
  run = outliers.training(config, tweo.table(config)['plain'])
  params = jax.jit(run.program.init)(jax.random.key(1)).params
  records = {split: harness_data.load(config.network.data, split) for split in ('train', 'test')}
  return Loaded(config, config.network, config.model, {'params': params}, **records)


def stepped(config, name, batch):
  """Returns the state before and behind a step of a training, and its metrics."""
  program = outliers.training(config, tweo.table(config)[name]).program
  state = program.init(jax.random.key(0))
  return state, *jax.jit(program.step)(state, {}, batch)


def block_outputs(config, state, batch):
  """Returns the outputs of all blocks, and the logits, in float64."""
  x, model = config.network.task.inputs(batch), config.model
  paths = ['blocks_0', 'blocks_1']
  logits, found = run_capture(model, {'params': state.params}, paths, x)
  return [np.asarray(found[path], np.float64) for path in paths], np.asarray(logits, np.float64)


def test_the_loss_is_the_task_plus_the_weighted_penalty(config, batch):
  state, _, metrics = stepped(config, 'tweo', batch)
  found, logits = block_outputs(config, state, batch)
  task = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), batch['label']]
  penalty = np.mean([np.mean((np.abs(y) / (3 + 1e-6)) ** 4) for y in found])
  assert 10 * penalty > 1e-3
  np.testing.assert_allclose(metrics['loss'], task.mean() + 10 * penalty, rtol=1e-5)
  for i, y in enumerate(found):
    np.testing.assert_allclose(metrics[f'peak_{i:02d}'], np.abs(y).max(), rtol=1e-5)


@pytest.mark.exhaustive
def test_the_weight_falls_with_a_cosine_where_it_is_asked_to(config, batch):
  penalty = dataclasses.replace(config.penalty, decay='cosine')
  config = dataclasses.replace(config, penalty=penalty)
  program = outliers.training(config, tweo.table(config)['tweo']).program
  state, step = program.init(jax.random.key(0)), jax.jit(program.step)
  found, logits = block_outputs(config, state, batch)
  task = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), batch['label']]
  size = np.mean([np.mean((np.abs(y) / (3 + 1e-6)) ** 4) for y in found])
  assert 10 * size > 1e-3
  for number in (0, 5, 13):
    _, metrics = step(state.replace(step=jnp.int32(number)), {}, batch)
    weight = 10 * (1 + np.cos(np.pi * number / 13)) / 2  # an epoch of 13 steps
    np.testing.assert_allclose(metrics['loss'] - task.mean(), weight * size, atol=3e-6)
    np.testing.assert_allclose(metrics['tweo_loss'], size, rtol=1e-5)


def test_training_in_8_bit_floats_carries_scales_and_keeps_the_network(config, batch, network):
  before, after, _ = stepped(config, 'tweo_float8', batch)
  plain = jax.jit(outliers.training(config, tweo.table(config)['plain']).program.init)(
    jax.random.key(0)
  )
  own = tweo.in_float(variables_of(after))
  assert jax.tree.structure(own) == jax.tree.structure(variables_of(plain))
  probes = [
    value
    for path, value in traverse_util.flatten_dict(after.params).items()
    if path[-1] == 'float8_gradient'
  ]
  # Of each block four layers and two norms; the last norm, the head.
  assert len(probes) == 2 * 6 + 2 and all(value > 0 for value in probes)
  kernel = before.params['head']['kernel']
  history = after.model_state['float8']['head']['kernel']['history']
  np.testing.assert_allclose(history[0], jnp.max(jnp.abs(kernel)), rtol=1e-6)
  np.testing.assert_array_equal(history[1:], 0)
  judged = dataclasses.replace(network, test=data.subset(network.test, range(64)))
  records = [network.test[i] for i in range(64)]
  inputs = config.network.task.inputs({'image': np.stack([r['image'] for r in records])})
  hooks = quantizers.float8_hooks(0.0)
  logits = jax.jit(lambda v: models.apply(config.model, v, inputs, hooks=hooks))(
    variables_of(after)
  )
  right = np.asarray(logits).argmax(-1) == [r['label'] for r in records]
  found = tweo.in_float8(judged, SimpleNamespace(variables=variables_of(after)))
  assert found == {'float8_accuracy': pytest.approx(100 * np.mean(right))}
  assert tweo.in_float8(judged, SimpleNamespace(variables=network.variables)) == {}


def test_kernels_are_drawn_with_the_deviation_that_the_setting_asks_for(config):
  for name in ('plain', 'tweo_float8'):
    params = (
      outliers.training(config, tweo.table(config)[name]).program.init(jax.random.key(0)).params
    )
    for path, shape in (('blocks_1/mlp/fc2', (16, 8)), ('head', (8, 10))):
      kernel = outlier_statistics.at(params, path)['kernel']
      assert kernel.shape == shape
      size = np.sqrt(np.mean(np.float64(kernel) ** 2))
      assert size == pytest.approx((3 * shape[0]) ** -0.5, rel=1e-5)


def test_rules_for_streams_layers_and_channels():
  parts = models.anatomy(models.create('vit_tiny_patch2_8', depth=1))
  kinds = {
    scheme: [
      (rule.operand, rule.bits, rule.granularity)
      for rule in absmax_evaluation.quantization_rules(parts, '4w3a', scheme)
    ]
    for scheme in absmax_evaluation.SCHEMES
  }
  stem = ('input', 3, 'tensor')
  assert kinds['linear'] == [('kernel', 4, 'tensor'), stem, ('input', 3, 'tensor')]
  assert kinds['stream'] == [*kinds['linear'], ('output', 3, 'tensor')]
  assert kinds['channel'] == [('kernel', 4, 'channel'), *kinds['stream'][1:]]
  by_token = [('input', 3, 'token'), ('output', 3, 'token')]
  assert kinds['token'] == [('kernel', 4, 'channel'), stem, *by_token]
  others = {'smooth': 'stream', 'token_linear_smooth': 'token', 'channel_linear': 'channel'}
  for scheme, known in others.items():
    rules = absmax_evaluation.quantization_rules(parts, '4w3a', scheme)
    kept = kinds[known][:-1] if 'linear' in scheme else kinds[known]
    assert [(rule.operand, rule.bits, rule.granularity) for rule in rules] == kept
  tied = models.anatomy(models.create('gpt2', depth=1))
  table = absmax_evaluation.quantization_rules(tied, '4w16a', 'channel')
  assert [(rule.path, rule.operand, rule.granularity) for rule in table] == [
    ('.*', 'kernel', 'channel'), ('wte', 'embedding', 'channel'),
  ]  # fmt: skip
  in_float = absmax_evaluation.quantization_rules(parts, '16w3a', 'stream')
  assert [rule.operand for rule in in_float] == ['input', 'input', 'output']
  assert in_float[2].path == 'blocks_0/residual|blocks_0'
  wrong = [('4w4a', name, f"'{name}'") for name in ('group', '', 'smooth_linear', 'channel_token')]
  for bits, scheme, message in (('9w4a', 'linear', '9 bits'), *wrong):
    with pytest.raises(ValueError, match=message):
      absmax_evaluation.quantization_rules(parts, bits, scheme)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('penalty.tau=0', 'penalty: tau must be positive'),
    ('penalty.tau=inf', 'penalty.tau=inf'),
    ('penalty.power=0.5', 'penalty: power must be at least 1'),
    ('penalty.weight=-1', r'penalty.weight=-1'),
    ('float8.history=0', 'float8.history=0'),
    ('float8.margin=inf', 'float8.margin=inf'),
    ('timed=-1', 'timed=-1'),
    ('runs=plain,qwt', "no training 'qwt'"),
    ('runs=plain,plain', 'runs=plain,plain: each training may be there once'),
    ('bits=4w4a,4w4a', 'bits=4w4a,4w4a: each may be there once'),
    ('schemes=stream,group', "schemes: scheme 'group' is neither"),
    ('network.model.scan=true', 'network.model.scan: the blocks are stacked'),
    (
      'network.model.activation=swiglu',
      'network.model: blocks_0/mlp/fc1/kernel and .* do not chain',
    ),
    ('network.model={name: convnext_tiny}', 'network.model: .* has no mlp branch of two layers'),
    ('network.fan_in_scaled=["(qkv"]', r"network.fan_in_scaled: '\(qkv' is no regular expression"),
    ('network.fan_in_scaled=["qkv"]', "network.fan_in_scaled: 'qkv' matches none"),
    (
      'network.recipe.optimizer.no_decay=["*"]',
      "network.recipe.optimizer.no_decay: '.' is no regular expression",
    ),
    ('network.data.labeled=false', "network.data: 'digits' has no labels"),
    ('runs=', 'runs is empty'),
    ('bits=12w3a', '12 bits'),
    ('calibration.count=100', 'whole batches'),
    ('network.recipe.batch_size=1304', '1304'),
  ],
)
def test_impossible_settings_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    launcher.check(launcher.load('tweo', 'embedded', [change]))


@pytest.mark.exhaustive
def test_the_largest_output_of_an_mlp_is_taken_apart(network):
  (x,) = network.calibration(32, 32)
  outlier = outlier_statistics.largest_outlier(network, x)
  _, found = run_capture(network.model, network.variables, ['blocks_.*/(mlp|norm2)'], x)
  sizes = {path: np.abs(y) for path, y in found.items() if path.endswith('mlp')}
  path = max(sizes, key=lambda path: sizes[path].max())
  *token, channel = np.unravel_index(sizes[path].argmax(), sizes[path].shape)
  assert (outlier.path, outlier.token, outlier.channel) == (path, tuple(token), channel)
  assert f'channel {channel} of token {token[1]} of input {token[0]} behind {path}' in str(outlier)
  own = network.variables['params'][path.split('/')[0]]['mlp']
  inner = np.asarray(found[path.replace('mlp', 'norm2')][tuple(token)], np.float64)
  first, second = (np.float64(own[name]['kernel']) for name in ('fc1', 'fc2'))
  np.testing.assert_allclose(outlier.parts.linear, inner @ first @ second[:, channel], rtol=1e-3)
  hidden = inner @ first + np.float64(own['fc1']['bias'])
  hidden *= (1 + np.vectorize(math.erf)(hidden / np.sqrt(2))) / 2
  output = hidden @ second[:, channel] + np.float64(own['fc2']['bias'][channel])
  np.testing.assert_allclose(outlier.value, output, rtol=1e-4)


@pytest.mark.exhaustive
def test_random_weights_are_those_that_training_starts_from(network):
  (x,) = network.calibration(64, 64)
  drawn = jax.jit(network.model.init)(jax.random.split(jax.random.key(0))[0], x)['params']
  flat = traverse_util.flatten_dict(drawn, sep='/')
  for path, kernel in flat.items():
    if path.endswith('kernel'):
      kernel, fan_in = np.float64(kernel), kernel.size // kernel.shape[-1]
      flat[path] = kernel / np.sqrt(np.mean(kernel**2)) / np.sqrt(3 * fan_in)
  drawn = {'params': traverse_util.unflatten_dict(flat, sep='/')}
  found = tweo.origin(network)
  for own, variables in ((found.peaks.drawn, drawn), (found.peaks.trained, network.variables)):
    _, captured = run_capture(network.model, variables, ['blocks_[01]'], x)
    for i in range(2):
      outputs = np.float64(captured[f'blocks_{i}']).reshape(64, -1)
      np.testing.assert_allclose(own.peak[i], np.abs(outputs).max(1).mean(), rtol=1e-4)
      np.testing.assert_allclose(own.minimum[i], outputs.min(1).mean(), rtol=1e-4)
      np.testing.assert_allclose(own.mean_abs[i], np.abs(outputs).mean(), rtol=1e-4)
  metrics = tweo.largest(found.peaks.drawn)
  assert metrics['input_peak'] == max(found.peaks.drawn.peak)
  assert metrics['input_minimum'] == min(found.peaks.drawn.minimum)


@pytest.mark.parametrize(('options', 'size'), [({}, 256), ({'vocab_size': 5}, 5)])
def test_random_tokens_are_of_the_vocabulary(options, size):
  changes = {'network.data.train_options': options, 'network.model.vocab_size': 256}
  config = launcher.load('tweo', 'text', changes)
  network = Loaded(config, config.network, config.model, {}, None, None)
  tokens = tweo.noise(network, (50, 64), jax.random.key(0))
  counts = np.bincount(np.ravel(tokens))
  assert len(counts) == size and counts.min() > 0


def test_perplexities_are_compared_with_plain_training_and_losses_with_those_in_float():
  def row(name, perplexity, loss, **more):
    metrics = {'perplexity': perplexity, 'bits_per_token': np.log2(perplexity), 'loss': loss}
    return {'name': name, 'metrics': {**metrics, **more}}

  rows = [
    row('TWEO', 4.0, 2.0, **{'4w4a_perplexity': 5.0}),
    row('TWEO, float8', 5.0, 2.2),
    row('plain', 8.0, 3.0, **{'4w4a_perplexity': 20.0}),
  ]
  tweo.add_ratios(rows)
  found = {item['name']: item['metrics'] for item in rows}
  names = ('relative_perplexity', '4w4a_relative_perplexity', 'relative_loss', 'loss_over_float')
  expected = {
    'TWEO': (0.5, 0.25, 2 / 3, 1.0),
    'TWEO, float8': (0.625, None, np.log2(5) / 3, 1.1),
    'plain': (1.0, 1.0, 1.0, None),
  }
  for title, values in expected.items():
    for name, value in zip(names, values):
      assert found[title].get(name) == (value and pytest.approx(value)), (title, name)


def test_a_run_leaves_rows_of_trainings_and_of_their_origins(tmp_path, monkeypatch):
  def measure(sides, mesh, repeats):
    assert set(sides) == {'', 'tweo'} and repeats == 1
    kinds = ('milliseconds', 'megabytes', 'gigaflops')
    return {name: {kind: 2.0 + len(name) for kind in kinds} for name in sides}

  changes = {**DIGITS, 'runs': 'tweo', 'network.model.depth': 1, 'timed': 1}
  monkeypatch.setattr(outliers.costs, 'measure', measure)
  found = launcher.run('tweo', workdir=tmp_path, overrides=changes)
  rows = {row['name']: row['metrics'] for row in found['rows']}
  assert set(rows) == {'TWEO', 'TWEO on noise', 'random weights'}
  own = rows['TWEO']
  text = (tmp_path / 'tweo' / 'metrics.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  peaks = [value for line in lines for key, value in line.items() if key.startswith('peak_')]
  assert own['training_peak'] == pytest.approx(max(peaks), rel=1e-6)
  steps = [line for line in lines if 'loss' in line]
  assert len(steps) == 13  # of which one is the last tenth
  for metric in ('loss', 'tweo_loss'):
    assert own[metric] == pytest.approx(steps[-1][metric], rel=1e-6)
  assert [own[metric] for metric in ('time', 'memory', 'flops')] == [3, 3, 3]
  assert {'accuracy', '16w3a_accuracy', 'colinearity_vo', 'outlier_value'} <= set(own)
  pictures = {'peaks.png', 'accuracy_over_bits.png', 'origin.png'}
  assert {path.name for path in tmp_path.glob('*.png')} == pictures
