import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from experiments import s3l
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from experiments.protocols import resolution_stages
from experiments.protocols.subsets import Subset
from jaxlab import data, losses

BATCHES = ['recipe.batch_size=32', 'target.queue_size=64', 'labeled.per_class=4']
BATCHES += [
  f'{key}.recipe.{field}'
  for key in ('warm_up', 'fine_tuning')
  for field in ('batch_size=16', 'epochs=1')
]
TINY = [
  *BATCHES,
  'model.stage_sizes=(1,1)',
  'model.width=4',
  'model.strides=(2,2)',
  'heads.features=8',
]


def tiny_config(*changes):
  """Returns the embedded setting with a network that compiles in seconds."""
  return launcher.load('s3l', 'embedded', [*TINY, *changes])


@functools.cache
def plan():
  """Returns the tiny setting's programs."""
  return s3l.programs(tiny_config())


def random_batch(size, label=False, seed=0):
  rng = np.random.default_rng(seed)
  batch = {'image': rng.integers(0, 256, (size, 16, 16, 1), np.uint8), 'index': np.arange(size)}
  batch['label'] = rng.integers(0, 10, size)
  return {name: jnp.asarray(batch[name]) for name in ('image', 'index', *['label'] * label)}


@functools.cache
def stepped(name):
  """Returns the drawn state of a program, that behind two steps, and metrics."""
  run = plan()[name]
  first = state = jax.jit(run.program.init)(jax.random.key(0))
  step, size = jax.jit(run.program.step), run.program.batch['image'].shape[0]
  for seed in range(2):
    state, metrics = step(state, {}, random_batch(size, 'label' in run.program.batch, seed))
  return first, state, metrics


def moved(before, after):
  """Returns the paths of the leaves that differ, and of those that do not."""
  a, b = (traverse_util.flatten_dict(tree, sep='/') for tree in (before, after))
  differ = {path for path in a if not np.array_equal(a[path], b[path])}
  return differ, {*a} - differ


@pytest.mark.exhaustive
def test_in_the_warm_up_the_last_stage_and_the_head_move_alone():
  first, state, _ = stepped('16_px__cut_warm_up')
  params, still = moved(first.params, state.params)
  assert params == {path for path in {*params, *still} if re.match('backbone/layer2_|head/', path)}
  assert {'backbone/layer2_0/conv1/kernel', 'head/kernel', 'head/bias'} <= params
  assert {'backbone/conv1/kernel', 'backbone/layer1_0/bn2/scale'} <= still
  statistics, kept = moved(first.model_state['batch_stats'], state.model_state['batch_stats'])
  assert 'backbone/layer1_0/bn1/mean' in statistics and not kept


def test_shared_stages_are_attached_bit_for_bit_to_a_drawn_last_one():
  cut = jax.jit(plan()['cut_16px'].program.init)(jax.random.key(1))
  whole = stepped('16_px__cut_warm_up')[0]
  own = {'params': {'backbone': cut.params['encoder']['backbone']}}
  own['batch_stats'] = {'backbone': cut.model_state['batch_stats']['encoder']['backbone']}
  state = s3l.attached(own, s3l.last_parts(tiny_config()))(whole)
  found, given = state.params['backbone'], own['params']['backbone']
  assert {*found} - {*given} == {'layer2_0'}
  for name, tree in given.items():
    for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(tree), strict=True):
      assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name
  drawn = whole.params
  jax.tree.map(np.testing.assert_array_equal, found['layer2_0'], drawn['backbone']['layer2_0'])
  jax.tree.map(np.testing.assert_array_equal, state.params['head'], drawn['head'])
  with pytest.raises(ValueError, match='missing: params/backbone/layer2_0/bn1/bias'):
    s3l.attached(own, ('head/.*',))(whole)


def test_a_next_stage_has_all_but_optimizer_and_step_of_the_one_before():
  _, before, metrics = stepped('8px')
  assert 0 < metrics['z_std'] <= 1
  program = plan()['8px_16px_7'].program
  drawn = jax.jit(program.init)(jax.random.key(3))
  state = resolution_stages.carry(before, drawn)
  for name in ('params', 'model_state', 'extra'):
    jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(before, name))
  assert int(state.step) == 0 and int(state.extra['queue_pointer']) == 64 % 64
  differ, _ = moved(drawn.extra['target']['params'], state.extra['target']['params'])
  assert 'backbone/layer2_0/conv1/kernel' in differ
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
  # It goes on with larger images.
  shapes = jax.eval_shape(program.step, state, {}, random_batch(32))[0]
  assert jax.tree.structure(shapes) == jax.tree.structure(state)


@pytest.mark.exhaustive
def test_simclr_is_supcon_scaled_by_its_base_temperature():
  config = tiny_config('ssl=simclr', 'target.temperature=0.1', 'base_temperature=0.07')
  nets, targets = s3l.method(config, config.variants[0].stages[0])
  z = [np.random.default_rng(seed).normal(size=(4, 8)).astype(np.float32) for seed in range(2)]
  seen = targets.see(nets.encoder, {}, z, jax.random.key(0), 0)
  (both,) = seen.views  # one batch, so that batch norms see both views
  np.testing.assert_array_equal(both, np.stack(z, 1).reshape(8, 8))
  expected = 0.1 / 0.07 * losses.nt_xent(*z, 0.1)
  np.testing.assert_allclose(seen.loss([both], None), expected, rtol=1e-5)
  assert nets.encoder.projector.features == (8, 8) and not nets.encoder.projector.hidden_norm


def test_subsets_are_drawn_from_a_source_and_known_by_their_size():
  source = data.InMemory({'image': np.zeros((30, 2, 2, 1), np.uint8), 'label': np.arange(30) % 3})
  section = tiny_config().data
  for own, size in (
    (Subset(total=7), 7),
    (Subset(per_class=4), 12),
    (Subset(6, None, 2), 6),
    (Subset(), 30),
  ):
    drawn = own.draw(np.random.default_rng(0), source)
    of = own.of(dataclasses.replace(section, train_size=30, num_classes=3))
    assert len(drawn) == of.train_size == size
  with pytest.raises(ValueError, match='num_shots 11'):
    Subset(per_class=11).draw(np.random.default_rng(0), source)


STAGES = (
  {'name': 'small', 'stages': ({'size': 3},)},
  {'name': 'empty', 'stages': ()},
  {'name': 'short', 'stages': ({'size': 8, 'epochs': 0},), 'last_stage': 'attached'},
  {'name': 'untrained', 'stages': ({'size': 8, 'base': -1.0},)},
)


# Several at once: all that is wrong is said, and a check traces the trainings.
@pytest.mark.parametrize(
  ('changes', 'messages'),
  [
    (
      ('target.queue_size=33', 'base_temperature=0', 'fine_tuning.recipe.mixup=-1',
       'fine_tuning.recipe.batch_size=41', 'recipe.microbatches=2',
       'recipe.mix_partners=flip', f'variants={STAGES}', 'warm_up=none'),
      ('target.queue_size=33: expected a multiple of recipe.batch_size=32', 'base_temperature=0.0',
       'mixup=-1.0: expected alpha', 'batch_size=41 exceeds data.train_size=40',
       'recipe.microbatches: expected 1', "from 'untrained'", "'empty' has no stages",
       "mix_partners='flip' needs mixup or cutmix",
       "'small': images of 3 pixels are smaller than the total stride of the network, 4",
       "'short': size=8, epochs=0", "'untrained': base=-1.0",
       "warm_up: missing; it trains the attached stage of 'short'"),
    ),
    (
      ('unlabeled.total=1298', 'labeled.total=4', 'recipe.batch_size=1'),
      ('unlabeled: 1298 images of 10 classes exceed the 1297 of 10',
       'labeled.total=4, per_class=4: expected one of the two', 'recipe.batch_size=1: expected at least 2'),
    ),
    (
      ('unlabeled.num_classes=3', 'unlabeled.total=100', 'labeled.per_class=130'),
      ('unlabeled.total=100 does not divide over num_classes=3', 'labeled: 1300 images of 10 classes exceed'),
    ),
    (('unlabeled.num_classes=2',), ('unlabeled.num_classes=2: give total or per_class',)),
    (("model={'name': 'vit_tiny_patch16_224'}",), ('give a ResNet',)),
    (('model.strides=(8,8)',), ('images of 16 pixels are smaller than the total stride',)),
  ],
)  # fmt: skip
def test_impossible_settings_are_named(changes, messages):
  with pytest.raises(SettingsError) as error:
    launcher.check(tiny_config(*changes))
  for message in messages:
    assert message in str(error.value)


def test_a_run_compares_ways_to_pretrain(tmp_path):
  two = {'stages': ({'size': 8}, {'size': 16}), 'last_stage': 'redrawn'}
  rows = (
    {'name': '8 px', 'stages': ({'size': 8},), 'role': 'baseline'},
    {'name': '8, then 16 px', **two},
    {'name': '8 px, cut', 'stages': ({'size': 8},), 'last_stage': 'attached'},
  )
  config = tiny_config(
    f'variants={rows}', 'recipe.epochs=2', 'recipe.batch_size=64', 'unlabeled.total=128', 'timed=0',
    'model.width=16', 'log_every=1', 'augment.contrast=none', 'augment.brightness=none',
    'data.test_options={"pastes": 1}',
  )  # fmt: skip
  found = s3l.run(config, tmp_path)
  metrics = {row['name']: row['metrics'] for row in found['rows']}
  assert list(metrics) == ['untrained', *(row['name'] for row in rows)]
  assert all(0 <= own['fine_tuned'] <= 100 for own in metrics.values())
  # Twice the side is four times the operations, of the network at least.
  assert metrics['8 px']['flops'] == 1 and 3.8 < metrics['8, then 16 px']['flops'] < 6
  assert all(0 < metrics[row['name']]['z_std'] <= 1 for row in rows)
  trained = {path.name for path in tmp_path.iterdir() if path.is_dir()}
  assert {'8px', '8px_16px', 'cut_8px', '8_px__cut_warm_up'} <= trained
  assert len([name for name in trained if name.endswith('fine_tuned')]) == 4
  assert (tmp_path / 'accuracy_over_cost.png').stat().st_size > 1000
  assert (tmp_path / 'curves.png').stat().st_size > 1000
