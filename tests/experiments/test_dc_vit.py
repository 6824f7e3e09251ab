import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import dc_vit
from experiments.harness import data as harness_data
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from jaxlab import compression, models

TINY = (
  "network.data={'name': 'digits', 'train_options': {'test_size': 1669}, 'train_size': 128}",
  "network.model={'name': 'vit_tiny_patch4_8', 'depth': 4, 'num_classes': 10, 'width': 8, 'num_heads': 2}",
  'network.recipe.epochs=3',
  'network.recipe.batch_size=32',
  "targets={'dense': {'reduction': 0.25, 'num_blocks': 2, 'title': 'dense'}}",
  'tiny={total: 32}',
  'recipe.epochs=2',
  'recipe.batch_size=16',
  'synthesis.count=8',
  'synthesis.steps=4',
  'synthesis.warmup_steps=1',
  'synthesis.recognized=0',
  'log_every=2',
  'claims=[]',
)


def tiny_config(*changes):
  return launcher.load('dc_vit', 'embedded', [*TINY, *changes])


def test_a_tuning_mimics_features_with_the_front_part_of_the_network():
  config = tiny_config('loss_warmup=2')
  target = config.targets['dense']
  model = dc_vit.networks.create(config.network.model)
  blank = jnp.zeros((1, *config.network.data.view))
  teacher = dict(jax.jit(model.init)(jax.random.key(1), blank))
  kept = range(compression.dense_cut(model, 0.25, num_blocks=2).kept)
  net = dc_vit.compressed(dc_vit.Compressed(model, teacher), 1, kept)
  shapes = dc_vit.abstract(config, target, (1,))
  assert (shapes.model, shapes.blocks) == (net.model, (1,))
  assert jax.tree.map(jnp.shape, shapes.variables) == jax.tree.map(jnp.shape, net.variables)
  program = dc_vit.tuning(config, target, shapes).program
  state = jax.jit(program.init)(jax.random.key(0)).replace(params=net.variables['params'])
  records = harness_data.load(config.network.data, 'train').gather(np.arange(16))
  batch = {name: jnp.asarray(records[name]) for name in ('image', 'label', 'index')}
  step = jax.jit(program.step)

  @jax.jit
  def error(own, theirs):
    x = config.network.task.inputs(batch)
    pair = [
      models.capture(m, v, ['norm'], x)[1]['norm'] for m, v in ((net.model, own), (model, theirs))
    ]
    return jnp.mean(jnp.square(pair[0] - pair[1]))

  frozen = {'teacher': teacher}
  losses = [step(state.replace(step=jnp.int32(at)), frozen, batch)[1]['loss'] for at in (0, 2, 4)]
  # An epoch has two steps; the loss rises over two epochs.
  whole = error(net.variables, teacher)
  np.testing.assert_allclose(losses, [0, whole / 2, whole], rtol=1e-4)
  new, _ = step(state.replace(step=jnp.int32(4)), frozen, batch)
  before, moved = net.variables['params'], set()
  for name, own in new.params.items():
    pairs = zip(jax.tree.leaves(own), jax.tree.leaves(before[name]), strict=True)
    if any(np.any(a != b) for a, b in pairs):
      moved.add(name)
  assert moved == {
    'cls_token',
    'pos_embed',
    'patch_embed',
    'blocks_0',
    'blocks_1',
    'blocks_2',
    'norm',
  }


def test_a_run_compresses_the_best_blocks_one_after_another(tmp_path, monkeypatch):
  config = tiny_config('targets.dense.neurons=gelu')
  values = {(1,): 0.3, (2,): 0.1}
  monkeypatch.setattr(dc_vit.Trials, 'judge', lambda self, net: values[net.blocks])
  found = launcher.launch(config, tmp_path)
  rows = {row['name']: row['metrics'] for row in found['rows']}
  assert list(rows) == ['original', 'dense', 'dense, untuned']
  kept = dc_vit.cut_of(config, config.targets['dense']).kept
  folders = {
    f'{path.parents[1].name}/{path.parent.name}' for path in tmp_path.glob('*/*/checkpoints')
  }
  assert folders == {'dense/block_1', *(f'trials_{kept}_gelu/block_{block}' for block in (1, 2))}
  assert rows['dense']['blocks'] == 2 and rows['dense']['macs'] < 85
  assert rows['dense']['feature_error'] < rows['dense, untuned']['feature_error']
  assert rows['original']['feature_error'] == 0 and rows['dense']['off_target'] < 2
  assert (tmp_path / 'accuracy_over_operations.png').stat().st_size > 5000


def test_what_learns_from_labels_begins_with_the_blocks_of_the_trials_as_they_were(monkeypatch):
  config = tiny_config('targets.dense.tuning=labels')
  model = dc_vit.networks.create(config.network.model)
  variables = dict(
    jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *config.network.data.view)))
  )
  trials, calls = object.__new__(dc_vit.Trials), []
  trials.config, trials.original, trials.few = config, dc_vit.Compressed(model, variables), None
  candidates = {block: (None, value) for block, value in ((1, 0.3), (2, 0.1))}
  monkeypatch.setattr(dc_vit.Trials, 'of', lambda self, target: candidates)
  monkeypatch.setattr(
    dc_vit.Trials, 'tuned', lambda self, target, start, folder: calls.append(folder) or (start, 0.0)
  )
  tuned, untuned = dc_vit.progressive(trials, 'dense')
  assert calls == ['dense/block_2', 'dense/block_1'] and tuned.blocks == untuned.blocks == (2, 1)
  # Nothing was trained here, so that both are the original's, cut.
  jax.tree.map(np.testing.assert_array_equal, tuned.variables, untuned.variables)


@pytest.mark.exhaustive
def test_candidates_are_judged_by_the_original_on_images_made_of_it():
  config = tiny_config()
  model = dc_vit.networks.create(config.network.model)
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *config.network.data.view)))
  trials = object.__new__(dc_vit.Trials)
  trials.config, trials.images = config, jax.random.normal(jax.random.key(1), (8, 8, 8, 1))
  trials.labels = jnp.arange(8)
  trials.told = dc_vit.predicted(variables, trials.images, model=model)
  double = jax.tree.map(lambda leaf: 2 * leaf, variables)
  same, other = (dc_vit.Compressed(model, own) for own in (variables, double))
  assert trials.judge(same) == pytest.approx(0, abs=1e-6)
  p, q = (
    np.asarray(jax.nn.log_softmax(dc_vit.predicted(own, trials.images, model=model)))
    for own in (variables, double)
  )
  assert trials.judge(other) == pytest.approx(np.mean(np.sum(np.exp(p) * (p - q), 1)), rel=1e-4)
  trials.config = dataclasses.replace(config, metric='label_ce')
  assert trials.judge(other) == pytest.approx(-np.mean(np.diagonal(q)), rel=1e-4)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('targets.dense.reduction=0', 'targets.dense: removed=0: expected more than 0'),
    ('targets.dense.reduction=0.7', 'num_blocks=2: expected 3 to 4'),
    ('targets.dense.num_blocks=3', '3 blocks are compressed; of depth=4|take fewer blocks'),
    ('targets.dense.tuning=none', 'tuning'),
    ('targets={}', 'targets: expected rows'),
    ('network.model.name=deit_tiny_distilled_patch4_8', 'expected a plain ViT|network.model'),
    ("network.model={'name': 'cifar_resnet20'}", 'expected a plain ViT, got ResNet'),
    ('tiny={}', 'tiny: expected total'),
    ('tiny={total: 8}', 'recipe.batch_size=16 exceeds the 8 images of tiny'),
    ('tiny={total: 999}', 'tiny: 999 images'),
    ('recipe.mixup=1', 'recipe.mixup: expected 0'),
    ('loss_warmup=-1', 'loss_warmup=-1'),
    ('synthesis.shift=8', 'synthesis.shift=8: expected 0 to 7'),
    ('synthesis.steps=1', 'warmup_steps=1'),
    ('synthesis.recognized=2', 'recognized=2'),
    ('synthesis.learning_rate=0', 'learning_rate=0'),
    ('synthesis.norm_weight=-1', 'norm_weight=-1'),
  ],
)
def test_settings_that_cannot_be_are_refused(change, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny_config(change))
