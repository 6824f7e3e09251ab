"""DTL and what it is compared with: one program for all, identities at the start, costs, settings."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from golden_vectors import assert_close
from models.random_variables import random_variables

from experiments import dtl
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from experiments.protocols import adaptation, adaptation_comparison, adaptation_costs
from experiments.protocols.adaptation_tuning import TaskTuning, Tuning
from experiments.protocols.replicas import sweep
from jaxlab import adapters, models
from jaxlab.training import step_keys

TINY = (
  "network.model={'name': 'vit_tiny_patch4_16', 'width': 16, 'depth': 2, 'num_heads': 2, 'mlp_ratio': 2.0}",
  'network.data.train_options.length=64',
  'network.data.train_size=64',
  'network.data.test_options.length=32',
  'network.recipe.epochs=1',
  'network.recipe.schedule.warmup_epochs=0',
  'network.recipe.batch_size=32',
  *(f'target.{task}.data.{part}_options.length=48' for task in ('texture', 'rotation', 'noise')
    for part in ('train', 'test')),
  'target.texture.data.train_size=48',
  'target.rotation.data.train_size=48',
  'target.noise.data.train_size=48',
  'tasks=texture,rotation',
  'recipe.batch_size=8',
  'recipe.epochs=3',
  'recipe.schedule.warmup_epochs=1',
  'held_out=16',
  'accounted={}',
  'claims=()',
)  # fmt: skip


STARTS = ('linear', 'full', 'bitfit', 'lora', 'adaptformer', 'dtl', 'dtl_plus')


def tiny_config(*changes):
  return launcher.load('dtl', 'embedded', [*TINY, *changes])


@pytest.fixture(scope='module')
def network():
  model = adaptation.backbone(tiny_config())
  return model, random_variables(model, jnp.zeros((1, 16, 16, 1)))


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


@pytest.mark.parametrize(
  ('name', 'pool'),
  tables.few(
    itertools.product(STARTS, ['mean_patches', 'model']),
    ('dtl_plus', 'mean_patches'), ('lora', 'model'), ('bitfit', 'mean_patches'),
  ),
)  # fmt: skip
def test_adapted_networks_start_as_the_frozen_one_under_the_same_head(network, name, pool):
  model, variables = network
  own = made(tiny_config(f'pool={pool}'), name)
  images = jax.random.normal(jax.random.key(2), (3, 16, 16, 1))

  @jax.jit
  def run(variables, images):
    tokens = models.capture(model, variables, ['blocks_1'], images)[1]['blocks_1']
    state = own.start(own.program.init(jax.random.key(1)), variables)
    found = own.logits(state.params, own.frozen(variables, 1e-3, 0.0), images)
    return tokens, found, state.params['head']

  tokens, found, head = run(variables, images)
  tokens = np.asarray(tokens, np.float64)
  pooled = tokens[:, 1:].mean(1) if pool == 'mean_patches' else tokens[:, 0]
  norm = variables['params']['norm']
  unit = (pooled - pooled.mean(1, keepdims=True)) / np.sqrt(pooled.var(1, keepdims=True) + 1e-6)
  features = unit * norm['scale'] + norm['bias']
  assert_close(found, features @ head['kernel'] + head['bias'], 1e-5)
  assert 0.01 < head['kernel'].std() < 0.03 and not head['bias'].any()


OUTPUTS = 48 + 16 + 32 + 16  # channels of a block's layers
NORMED = 2 * 16
COUNTS = {
  'linear': 0,
  'dtl': 2 * 2 * 2 * 16,
  'dtl_plus': 2 * 2 * 2 * 16 + 9 * 16,
  'lora': 2 * 8 * (16 + 48),
  'adapter': 2 * (2 * 8 * 16 + 8 + 16),
  'adaptformer': 2 * 2 * 8 * 16,
  'vpt_shallow': 10 * 16,
  'vpt_deep': 2 * 10 * 16,
  'bitfit': 16 + 2 * (OUTPUTS + NORMED) + 16,
  'ssf': 2 * (16 + 2 * (OUTPUTS + NORMED) + 16),
}


@pytest.mark.parametrize('name', tables.few(COUNTS, 'dtl_plus', 'vpt_deep', 'ssf'))
def test_what_is_trained_is_counted(name):
  state = jax.eval_shape(made(tiny_config(), name).program.init, jax.random.key(0))
  assert adapters.count_parameters({**state.params, 'head': {}}) == COUNTS[name]


@pytest.mark.parametrize(
  ('setting', 'name', 'count'),
  tables.first(
    [
      ('vtab_swin_base', 'dtl', 90112),
      ('vtab_vit_base', 'dtl', 36864),
      ('vtab_vit_base', 'dtl_plus', 36864 + 9 * 768),
      ('vtab_vit_base', 'lora', 294912),
    ]
  ),
)
def test_published_numbers_of_trained_parameters_are_met(setting, name, count):
  config = launcher.load('dtl', setting)
  model, images = adaptation.backbone(config), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), images)['params']
  options = config.tuned(name, 'caltech101').options
  method = dtl.table(config)[name].make(model, images, pool=config.pool, **options)
  found = jax.eval_shape(lambda key: method.init(key, params), jax.random.key(0))
  assert adapters.count_parameters(found) == count


@pytest.mark.exhaustive
def test_several_rates_side_by_side_are_what_each_is_alone(network):
  _, variables = network
  own = made(tiny_config('target.rotation.augment.kind=pad_crop'), 'dtl')
  rates, decays = (1e-2, 1e-3), (0.0, 0.5)
  many = sweep(own.program, {'rate': rates, 'decay': decays})
  batch = a_batch()
  state, step = jax.jit(many.init)(jax.random.key(3)), jax.jit(many.step)
  frozen = own.frozen(variables, rates, decays)
  alone_step = jax.jit(own.program.step)
  for _ in range(3):
    state, _ = step(state, frozen, batch)
  for index, (rate, decay) in enumerate(zip(rates, decays)):
    alone = jax.jit(own.program.init)(jax.random.key(3))
    for _ in range(3):
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


def test_what_decides_a_run_is_in_its_identity():
  def identity(*changes):
    return dtl.programs(tiny_config('runs=dtl,', *changes))['dtl_texture'].identity

  own = identity()
  assert own == identity('runs=dtl,linear') and own['method']['name'] == 'dtl'
  for change in ('side.rank=3', 'side.beta=10', 'pool=model', 'network.recipe.epochs=2',
                 'recipe.epochs=4', 'tuning={dtl: {model: {drop_path: 0.1}}}'):  # fmt: skip
    assert identity(change) != own, change


def temporaries(config, name):
  own = made(config, name)
  state = jax.eval_shape(own.program.init, jax.random.key(0))
  gradient = jax.jit(jax.grad(own.loss))
  given = own.program.frozen, own.program.batch, jax.eval_shape(step_keys, state)
  compiled = gradient.lower(state.params, *given).compile()
  residuals = adapters.residual_bytes(own.loss, state.params, *given)
  return compiled.memory_analysis().temp_size_in_bytes, residuals


def test_the_compiled_step_keeps_nothing_of_the_blocks_before_the_first_addition():
  def grown(name, *changes):
    """Returns by how much two further frozen blocks in front raise temporaries and residuals."""
    (less, few), (more, many) = (
      temporaries(
        tiny_config(
          f'network.model.depth={depth}',
          f'side.add_from={depth - 1}',
          'recipe.batch_size=32',
          *(change.format(depth - 1) for change in changes),
        ),
        name,
      )
      for depth in (2, 4)
    )
    return more - less, many - few

  state = 4 * 32 * 17 * 16  # bytes of a block's input
  # Blocks that are not even read cost nothing at all; of those that are read the input and the thin product
  # stay, and no activation within.
  assert max(map(abs, grown('dtl', 'side.extract_from={}'))) < state / 4
  read = grown('dtl')
  assert read[1] < 2 * (state + state // 8 + 1024) and read[0] < 2 * 3 * state
  lora = grown('lora')
  assert lora[1] > 5 * read[1] and lora[0] > 2.5 * read[0]


def test_residuals_fall_from_full_tuning_to_the_linear_probe():
  config = launcher.load('dtl', 'embedded')
  kept, rows = {}, dtl.table(config)
  for name in ('linear', 'dtl', 'lora', 'full'):
    own = adaptation_costs.accounted(config, rows[name], name)
    state = jax.eval_shape(own.program.init, jax.random.key(0))
    given = own.program.frozen, own.program.batch, jax.eval_shape(step_keys, state)
    kept[name] = adapters.residual_bytes(own.loss, state.params, *given)
  assert own.program.batch['image'].shape == (32, 28, 28, 1)
  assert kept['linear'] < 0.05 * kept['dtl']
  assert kept['dtl'] < 0.6 * kept['lora'] and kept['lora'] <= kept['full']


def test_a_run_chooses_rates_on_held_out_images_and_compares(tmp_path):
  # Memory is counted for another depth, what is trained is not.
  changes = ('runs=linear,dtl', 'tasks=texture,noise', 'tuning={dtl: {rates: [0.0, 0.01]}}',
             'accounted={depth: 3}', 'held_out_order=by_class')  # fmt: skip
  config = tiny_config(*changes)
  found = launcher.launch(config, tmp_path)
  rows = {row['name']: row['metrics'] for row in found['rows']}
  assert list(rows) == ['linear probe', 'DTL']
  own = rows['DTL']
  assert own['natural'] == own['texture'] and own['specialized'] == own['noise']
  assert own['mean'] == pytest.approx((own['texture'] + own['noise']) / 2)
  assert own['trained'] == 128 and own['trained_with_head'] == 128 + 16 * 10 + 10
  assert rows['linear probe']['residual_mb'] < own['residual_mb']
  assert (tmp_path / 'accuracy_over_memory.png').stat().st_size > 5000
  assert (tmp_path / 'dtl_noise_search' / 'metrics.jsonl').exists()
  assert not (tmp_path / 'linear_noise_search').exists()
  # The other kinds of records: a few of each class, a split to choose the state on.
  shots = dataclasses.replace(config.target['texture'], shots=2, validation='test')
  drawn = adaptation_comparison.sources(config, shots)
  labels = [int(drawn.train[i]['label']) for i in range(len(drawn.train))]
  assert sorted(labels) == sorted([*range(10)] * 2) and len(drawn.validation) == 48
  again = adaptation_comparison.sources(dataclasses.replace(config, seed=1), shots)
  assert any((again.train[i]['image'] != drawn.train[i]['image']).any() for i in range(20))


@pytest.mark.parametrize(
  ('change', 'message'),
  tables.some(
    [
      ('side.rank=0', 'rank=0'),
      ('side.kernel_size=0', 'kernel_size=0'),
      ('side.add_from=4', 'add_from=4: expected 0 <= extract_from <= add_from < 2'),
      ('side.extract_from=2', 'extract_from=2, add_from=1'),
      ('tasks=rotation,rotation', 'expected different ones of count, noise'),
      ('tasks=colors', 'expected different ones of count, noise'),
      ('runs=dtl,last', "'last' are none of the rows linear, full"),
      ('recipe.batch_size=64', 'an epoch would have no step'),
      ('recipe.mixup=0.2', 'recipe.mixup=0.2'),
      ('target.rotation.data.stored_image=(8,8,1)', 'the network sees'),
      ('recipe.eval_every=5', 'recipe.eval_every=5'),
      ('target.rotation.validation_epochs=0', 'validation_epochs=0'),
      ('target.texture.shots=10', 'shots=10'),
      ('tuning={dtl: {rates: [0.1, 0.1]}}', 'expected different numbers'),
      ('tuning={dtl: {tasks: {rotation: {rate: 0.1}}}}', 'rate: unknown key'),
      ('tuning={dtl: {options: {ranks: 2}}}', "unexpected keyword argument 'ranks'"),
      (
        'tuning={dtl: {tasks: {rotations: {rates: [0.1]}}}}',
        "'rotations'. are none of the targets",
      ),
      ('tuning={last: {rates: [0.1]}}', "'last' are none"),
      ("network.model={'name': 'cifar_resnet20'}", 'next to a ViT or a Swin'),
      ('tuning={dtl: {rates: 0.1}}', r'dtl.rates=0.1: expected tuple\[float, ...\], got float'),
      ('tuning={dtl: {tasks: {rotation: 3}}}', 'dtl.tasks.rotation=3: expected TaskTuning'),
      ('tuning={dtl: {tasks: {rotation: {model: 3}}}}', 'dtl.tasks.rotation.model=3: expected'),
      ('tuning.dtl.tasks.rotation.rate=0.1,', 'Did you mean tuning.dtl.tasks.rotation.rates'),
      ('tuning.dtl.tasks.rotation.rates=-0.1,', 'dtl.tasks.rotation.rates=.-0.1,.: expected'),
      ('tuning={dtl_plus: {options: {kernel_size: 2.5}}}', 'kernel_size=2.5: expected int or none'),
      (
        'tuning={dtl: {tasks: {rotation: {options: {kernelsize: 3}}}}}',
        "tuning.dtl on rotation: .*unexpected keyword argument 'kernelsize'",
      ),
      (
        'tuning.dtl_plus.tasks.rotation.options={kernel_size: 0}',
        'tuning.dtl_plus on rotation: rank=2, kernel_size=0',
      ),
      (
        'tuning.dtl.tasks.rotation.model={drop_path: 2}',
        'tuning.dtl on rotation: ViT: drop_path=2 is not in',
      ),
      ('tuning.dtl.tasks.rotation.model={depth: 3}', 'that leave the variables as they are'),
      ('accounted={batch_size: 2.5}', 'accounted.batch_size=2.5: expected a positive integer'),
      ('accounted={batch_size: 0}', 'accounted.batch_size=0: expected a positive integer'),
      ('accounted={image_size: [28, 28]}', 'accounted.image_size=.28, 28.: expected a positive'),
      ('accounted={depth: 1, patch_size: 3}', 'accounted: ViT: an image of 16 x 16'),
    ],
    3,
  ),
)
def test_settings_that_cannot_be_are_refused(change, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny_config('runs=dtl,dtl_plus', change))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (('tasks=colors,',), "tasks=.'colors',.: expected different ones of count"),
    (
      ('recipe.epochs=8', 'recipe.schedule.warmup_epochs=8'),
      'recipe.schedule: overlaid_cosine: warmup_epochs=8: .*fewer than half of epochs=8',
    ),
    (('network.model.name=foo',), 'network.model: .*foo'),
    (('held_out=-5', 'tuning.dtl.rates=0.1,0.2'), 'held_out=-5: expected at least 1'),
    (
      ('accounted={depth: 2}', 'tuning.dtl_plus.options={kernel_size: 2.5}'),
      'tuning.dtl_plus on texture: kernel_size=2.5',
    ),
    (
      ('recipe.microbatches=2', 'accounted={batch_size: 3}'),
      'accounted.batch_size=3: expected a multiple of recipe.microbatches=2',
    ),
    (('accounted={depth: 1}', 'side.add_from=1', 'runs=linear,dtl'), 'accounted: .* < 1 blocks'),
  ],
)
def test_what_is_wrong_is_said_once(changes, message):
  with pytest.raises(SettingsError, match=message) as caught:
    launcher.check(tiny_config('runs=linear,dtl,dtl_plus', *changes))
  assert len(caught.value.problems) == 1


def test_fields_of_a_task_are_named_where_the_setting_has_none():
  config = tiny_config('tuning.dtl.tasks.rotation.rates=0.1,', 'tuning.dtl.decays=0.2,')
  pairs = [config.tuned('dtl', task).pairs(config.recipe) for task in config.tasks]
  assert pairs == [[(3e-3, 0.2)], [(0.1, 0.2)]]


def test_what_every_task_overrules_is_refused():
  some = 'tuning.dtl.tasks={texture: {rates: [0.1], model: {drop_path: 0.1}}}'
  given = ('runs=dtl,', 'tuning.dtl.rates=0.3,', 'tuning.dtl.model={drop_path: 0.2}', some)
  launcher.check(tiny_config(*given))
  for changes in (('tasks=texture,',), ('tuning.dtl.tasks.rotation={rates: [0.2]}',)):
    with pytest.raises(SettingsError) as caught:
      launcher.check(tiny_config(*given, *changes))
    found = ' '.join(caught.value.problems)
    assert (
      'tuning.dtl.rates=(0.3,): every task has its own, as tuning.dtl.tasks.texture.rates' in found
    )
    assert ('tuning.dtl.model.drop_path=0.2: every' in found) == (changes[0] == 'tasks=texture,')


def test_patches_of_a_swin_are_not_averaged():
  changes = ('pool=mean_patches', 'runs=dtl,', 'claims=()', 'tasks=svhn,')
  config = launcher.load('dtl', 'vtab_swin_base', changes)
  small = {'depths': (1, 1), 'width': 8, 'num_heads': (2, 2)}
  model = {**config.network.model, **small}
  network = dataclasses.replace(config.network, model=model)
  side = dtl.Side(extract_from=0, add_from=1)
  with pytest.raises(SettingsError, match=r'averaged in front of the norm of a ViT .* got Swin'):
    launcher.check(dataclasses.replace(config, network=network, side=side))


def test_tasks_that_differ_in_their_test_images_share_a_training(tmp_path):
  config = tiny_config('runs=dtl,', 'recipe.epochs=2', 'recipe.schedule.warmup_epochs=0')
  first = config.target['texture']
  other = dataclasses.replace(first, test=config.target['noise'].data, group='shifted')
  target = {'texture': first, 'shifted': other, 'tuned': other}
  tuning = {'dtl': Tuning(tasks={'tuned': TaskTuning(rates=(0.1,))})}
  config = dataclasses.replace(config, target=target, tasks=tuple(target), tuning=tuning)
  (row,) = adaptation_comparison.compare(config, tmp_path, dtl.table(config))
  assert sorted(path.name for path in tmp_path.iterdir()) == ['dtl_texture', 'dtl_tuned', 'source']
  (plan, *_), own = adaptation_comparison.plans(config, dtl.table(config)).values(), other
  records = adaptation_comparison.sources(config, own)
  variables = adaptation_comparison.load(config, tmp_path)
  folder = tmp_path / 'dtl_texture'
  _, expected = adaptation_comparison.adapt(config, plan, own, records, variables, folder)
  assert row['metrics']['shifted'] == expected
