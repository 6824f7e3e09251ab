"""DTL and what it is compared with: one program for all, identities at the start, costs, settings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close

from experiments import dtl
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from experiments.protocols import adaptation, adaptation_comparison
from experiments.protocols.replicas import sweep
from jaxlab import adapters, models
from jaxlab.training import step_keys

TINY = (
  "network.model={'name': 'vit_tiny_patch4_16', 'width': 16, 'depth': 4, 'num_heads': 2, 'mlp_ratio': 2.0}",
  'network.data.train_options.length=64',
  'network.data.train_size=64',
  'network.data.test_options.length=32',
  'network.recipe.epochs=1',
  'network.recipe.schedule.warmup_epochs=0',
  'network.recipe.batch_size=32',
  *(f'target.{task}.data.{part}_options.length=48' for task in ('texture', 'rotation')
    for part in ('train', 'test')),
  'target.texture.data.train_size=48',
  'target.rotation.data.train_size=48',
  'tasks=texture,rotation',
  'recipe.batch_size=8',
  'recipe.epochs=3',
  'recipe.schedule.warmup_epochs=1',
  'held_out=16',
  'accounted={}',
  'claims=()',
)  # fmt: skip


def tiny_config(*changes):
  return launcher.load('dtl', 'embedded', [*TINY, *changes])


@pytest.fixture(scope='module')
def network():
  config = tiny_config()
  model = adaptation.backbone(config)
  draw = jax.jit(lambda key: model.init(key, jnp.zeros((1, 16, 16, 1))))
  variables = jax.tree.map(
    lambda leaf: leaf + 0.1 * jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape),
    draw(jax.random.key(0)),
  )
  return model, variables


def made(config, name, task='rotation'):
  target = config.target[task]
  row = dtl.table(config)[name]
  return adaptation.adapted(config, row, config.tuned(name, task), target, target.size)


def a_batch(size=8):
  rng = np.random.default_rng(0)
  return {
    'image': jnp.asarray(rng.integers(0, 256, (size, 16, 16, 1), np.uint8)),
    'label': jnp.asarray(rng.integers(0, 4, size).astype(np.int32)),
    'index': jnp.arange(size, dtype=jnp.int32),
  }


@pytest.mark.parametrize('pool', ['mean_patches', 'model'])
def test_adapted_networks_start_as_the_frozen_one_under_the_same_head(network, pool):
  model, variables = network
  config = tiny_config(f'pool={pool}')
  images = jax.random.normal(jax.random.key(2), (3, 16, 16, 1))
  tokens = models.capture(model, variables, ['blocks_3'], images)[1]['blocks_3']
  tokens = np.asarray(tokens, np.float64)
  pooled = tokens[:, 1:].mean(1) if pool == 'mean_patches' else tokens[:, 0]
  norm = variables['params']['norm']
  unit = (pooled - pooled.mean(1, keepdims=True)) / np.sqrt(pooled.var(1, keepdims=True) + 1e-6)
  features = unit * norm['scale'] + norm['bias']
  for name in ('linear', 'full', 'bitfit', 'lora', 'adaptformer', 'dtl', 'dtl_plus'):
    own = made(config, name)
    state = own.start(jax.jit(own.program.init)(jax.random.key(1)), variables)
    found = jax.jit(own.logits)(state.params, own.frozen(variables, 1e-3, 0.0), images)
    head = state.params['head']
    assert_close(found, features @ head['kernel'] + head['bias'], 1e-5)
    assert 0.01 < head['kernel'].std() < 0.03 and not head['bias'].any()


def test_what_is_trained_is_counted(network):
  model, _ = network
  config = tiny_config()
  counted = {}
  for name in dtl.table(config):
    state = jax.eval_shape(made(config, name).program.init, jax.random.key(0))
    counted[name] = adapters.count_parameters({**state.params, 'head': {}})
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 1)))['params']
  assert counted['linear'] == 0
  assert counted['full'] == adapters.count_parameters(params)
  assert counted['dtl'] == 4 * 2 * 2 * 16 and counted['dtl_plus'] == counted['dtl'] + 9 * 16
  assert counted['lora'] == 4 * 8 * (16 + 48)
  assert counted['vpt_shallow'] == 10 * 16 and counted['vpt_deep'] == 4 * 10 * 16
  assert counted['adapter'] == 4 * (2 * 8 * 16 + 8 + 16) and counted['adaptformer'] == 4 * 256
  outputs = 16 + 48 + 16 + 32 + 16  # of a block's layers
  assert counted['bitfit'] == 16 + 4 * (outputs + 2 * 16 - 16) + 16
  assert counted['ssf'] == 2 * (16 + 4 * (outputs + 2 * 16 - 16) + 16)


def test_several_rates_side_by_side_are_what_each_is_alone(network):
  _, variables = network
  own = made(tiny_config('target.rotation.augment.kind=pad_crop'), 'dtl')
  rates, decays = (1e-2, 1e-3, 3e-2), (0.0, 0.5, 0.1)
  many = sweep(own.program, {'rate': rates, 'decay': decays})
  batch = a_batch()
  state, step = jax.jit(many.init)(jax.random.key(3)), jax.jit(many.step)
  frozen = own.frozen(variables, rates, decays)
  alone_step = jax.jit(own.program.step)
  for _ in range(4):
    state, _ = step(state, frozen, batch)
  for index, (rate, decay) in enumerate(zip(rates, decays)):
    alone = jax.jit(own.program.init)(jax.random.key(3))
    for _ in range(4):
      alone, _ = alone_step(alone, own.frozen(variables, rate, decay), batch)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone.params), strict=True):
      np.testing.assert_allclose(a[index], b, atol=2e-5)
  # The frozen blocks run once, whatever the number of rates.
  probe = made(tiny_config(), 'linear')
  many = sweep(probe.program, {'rate': [1e-3] * 16, 'decay': [0.0] * 16})

  def flops(program):
    compiled = jax.jit(program.step).lower(
      jax.eval_shape(program.init, jax.random.key(0)), program.frozen, program.batch
    )
    return compiled.compile().cost_analysis()['flops']

  assert flops(many) < 1.1 * flops(probe.program)
  with pytest.raises(ValueError, match='as many of each'):
    sweep(probe.program, {'rate': [1.0], 'decay': [1.0, 2.0]})


def test_a_decay_spares_biases_and_the_rate_is_an_argument(network):
  _, variables = network
  own = made(tiny_config('recipe.schedule.warmup_epochs=0'), 'bitfit')
  state = own.start(jax.jit(own.program.init)(jax.random.key(0)), variables)
  step = jax.jit(own.program.step)
  moved = {}
  for decay in (0.0, 10.0):
    new, _ = step(state, own.frozen(variables, 1e-3, decay), a_batch())
    moved[decay] = new.params
  plain, decayed = moved[0.0], moved[10.0]
  jax.tree.map(np.testing.assert_array_equal, plain['network'], decayed['network'])
  np.testing.assert_array_equal(plain['head']['bias'], decayed['head']['bias'])
  kernel = plain['head']['kernel'] - 1e-3 * 10.0 * state.params['head']['kernel']
  np.testing.assert_allclose(decayed['head']['kernel'], kernel, atol=1e-6)
  same, _ = step(state, own.frozen(variables, 0.0, 10.0), a_batch())
  jax.tree.map(np.testing.assert_array_equal, same.params, state.params)


def temporaries(config, name):
  own = made(config, name)
  state = jax.eval_shape(own.program.init, jax.random.key(0))
  gradient = jax.jit(jax.grad(own.loss))
  given = own.program.frozen, own.program.batch, jax.eval_shape(step_keys, state)
  compiled = gradient.lower(state.params, *given).compile()
  residuals = adapters.residual_bytes(own.loss, state.params, *given)
  return compiled.memory_analysis().temp_size_in_bytes, residuals


def test_the_compiled_step_keeps_nothing_of_the_blocks_before_the_first_addition():
  def with_depth(depth, name):
    changes = (f'network.model.depth={depth}', f'side.add_from={depth - 2}', 'recipe.batch_size=32')
    return temporaries(tiny_config(*changes), name)

  short, long = with_depth(3, 'dtl'), with_depth(7, 'dtl')
  images, tokens, width = 32, 17, 16
  state = 4 * images * tokens * width  # bytes of a block's input
  # Four more frozen blocks: each may keep the `[.., rank]` product that its `up` is multiplied with, and the
  # input of its `down`, but no activation within.
  assert long[1] - short[1] <= 4 * (state + state // 8 + 4096)
  assert long[0] - short[0] <= 4 * (state + state // 8 + 4096)
  lora = [with_depth(depth, 'lora') for depth in (3, 7)]
  assert lora[1][1] - lora[0][1] > 5 * (long[1] - short[1])
  assert lora[1][0] - lora[0][0] > 3 * (long[0] - short[0])


def test_residuals_fall_from_full_tuning_to_the_linear_probe():
  config = launcher.load('dtl', 'embedded')
  kept, rows = {}, dtl.table(config)
  for name in ('linear', 'dtl', 'lora', 'full'):
    own = adaptation_comparison.accounted(config, rows[name], name)
    state = jax.eval_shape(own.program.init, jax.random.key(0))
    given = own.program.frozen, own.program.batch, jax.eval_shape(step_keys, state)
    kept[name] = adapters.residual_bytes(own.loss, state.params, *given)
  assert own.program.batch['image'].shape == (32, 28, 28, 1)
  assert kept['linear'] < 0.05 * kept['dtl']
  assert kept['dtl'] < 0.6 * kept['lora'] and kept['lora'] <= kept['full']


def test_a_run_chooses_rates_on_held_out_images_and_compares(tmp_path):
  config = tiny_config('runs=linear,dtl', 'tuning={dtl: {rates: [0.0, 0.01]}}')
  found = launcher.launch(config, tmp_path)
  rows = {row['name']: row['metrics'] for row in found['rows']}
  assert list(rows) == ['linear probe', 'DTL']
  own = rows['DTL']
  assert own['natural'] == own['texture'] and own['structured'] == own['rotation']
  assert own['mean'] == pytest.approx((own['texture'] + own['rotation']) / 2)
  assert own['trained'] == 256 and own['trained_with_head'] == 256 + 16 * 10 + 10
  assert rows['linear probe']['residual_mb'] < own['residual_mb']
  assert (tmp_path / 'accuracy_over_memory.png').stat().st_size > 5000
  assert (tmp_path / 'dtl_rotation_search' / 'metrics.jsonl').exists()
  assert not (tmp_path / 'linear_rotation_search').exists()
  # The other kinds of records: a few of each class, a split to choose the state on.
  shots = dataclasses.replace(config.target['texture'], shots=2, validation='test')
  drawn = adaptation_comparison.sources(config, shots)
  labels = [int(drawn.train[i]['label']) for i in range(len(drawn.train))]
  assert sorted(labels) == sorted([*range(10)] * 2) and len(drawn.validation) == 48
  again = adaptation_comparison.sources(dataclasses.replace(config, seed=1), shots)
  assert any((again.train[i]['image'] != drawn.train[i]['image']).any() for i in range(20))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('side.rank=0', 'rank=0'),
    ('side.kernel_size=0', 'kernel_size=0'),
    ('side.add_from=4', 'add_from=4: expected 0 <= extract_from <= add_from < 4'),
    ('side.extract_from=3', 'extract_from=3, add_from=2'),
    ('tasks=rotation,rotation', 'expected different ones of texture'),
    ('tasks=colors', 'expected different ones of texture'),
    ('runs=dtl,last', "'last' are none of the rows linear, full"),
    ('recipe.batch_size=64', 'an epoch would have no step'),
    ('recipe.mixup=0.2', 'recipe.mixup=0.2'),
    ('target.rotation.data.stored_image=(8,8,1)', 'the network sees'),
    ('target.rotation.validation=test', 'needs recipe.eval_every'),
    ('target.texture.shots=10', 'shots=10'),
    ('tuning={dtl: {rates: [0.1, 0.1]}}', 'expected different numbers'),
    ('tuning={dtl: {tasks: {rotation: {rate: 0.1}}}}', 'rate: unknown key'),
    ('tuning={lora: {options: {ranks: 2}}}', "unexpected keyword argument 'ranks'"),
    ('tuning={lora: {options: {rank: 0}}}', 'rank=0'),
    ("network.model={'name': 'cifar_resnet20'}", 'of a ViT'),
  ],
)
def test_settings_that_cannot_be_are_refused(change, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny_config(change))
