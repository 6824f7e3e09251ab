import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from experiments import aot, btm, dive, gml, launcher, supervised
from experiments.long_tail import Trainer
from experiments.long_tail_data import load_sources, with_features
from jaxlab import models, parallel
from jaxlab.data.long_tail import source_labels

PAPERS = {'dive': dive, 'gml': gml, 'btm': btm}
CONFIGS = [path for paper in PAPERS for path in launcher.settings(paper)]


def tiny(paper='gml', *runs, **data):
  """Returns the embedded setting with few digits and one epoch a stage."""
  config = launcher.load_config(launcher.CONFIGS / paper / 'embedded.py')
  with config.unlocked():
    config.data.long_tail.update(max_count=40, ratio=10.0, test_per_class=8)
    config.model.backbone.hidden = (8,)
    config.groups = {'many': 30, 'few': 10}
    for stage in config.stages.values():
      stage.epochs = 1
    config.runs = runs or config.runs
    config.data.update(data)
  return config


def convolutional(config):
  """Puts a small network with batch norms in."""
  with config.unlocked():
    config.model.backbone = {
      'name': 'cifar_resnet18', 'stage_sizes': (1,), 'strides': (2,), 'width': 4,
    }  # fmt: skip
  return config


def flat(tree):
  return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(dict(tree), sep='/').items()}


def one_step(config, name, **state_changes):
  """Returns the state before and after one step on random images."""
  program = supervised.program(config, name)
  before = program.init(jax.random.key(0)).replace(**state_changes)
  rng = np.random.default_rng(0)
  shape = program.batch['image'].shape
  batch = {
    'image': jnp.asarray(rng.integers(0, 256, shape), jnp.uint8),
    'label': jnp.asarray(rng.integers(0, config.data.num_classes, shape[0]), jnp.int32),
    'index': jnp.arange(shape[0]),
  }
  after, metrics = jax.jit(program.step)(before, batch)
  assert np.isfinite(metrics['loss'])
  return before, after


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: f'{path.parent.name}-{path.stem}')
def test_every_setting_builds_and_traces(path):
  config = launcher.load_config(path)
  assert set(config.runs) <= set(config.stages)
  method = {'dive': 'dive', 'gml': 'gml', 'btm': 'balanced'}[config.paper]
  # Each architecture is traced whole once; everywhere else a few of its blocks do.
  names = {other: launcher.load_config(other).model.backbone.name for other in CONFIGS}
  whole = path == next(other for other in CONFIGS if names[other] == names[path])
  for name in config.stages:
    own = config.copy_and_resolve_references()
    sizes = getattr(supervised.classifier(own, own.stages[name]).backbone, 'stage_sizes', None)
    if sizes and not (whole and name == method):
      with own.unlocked():
        own.model.backbone.stage_sizes = (1, 1, 1, sizes[-1]) if 'places' in path.stem else (1,)
    program = supervised.program(own, name)
    state = jax.eval_shape(program.init, jax.random.key(0))
    if name == method or path.stem == 'embedded':
      new, metrics = jax.eval_shape(program.step, state, program.batch)
      assert jax.tree.structure(new) == jax.tree.structure(state) and metrics['loss'].shape == ()
      same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), new, state)
      assert all(jax.tree.leaves(same))


@pytest.mark.parametrize('paper', PAPERS)
def test_programs_lower_for_a_mesh(paper):
  config = tiny(paper)
  with config.unlocked():
    config.runs = config.runs[:2]
  assert set(aot.lower(config, parallel.make_mesh())) == set(config.runs)


def test_dive_leaves_rows_claims_and_pictures(tmp_path):
  config = tiny('dive', 'ce', 'kd', 'dive')
  with config.unlocked():
    config.pictured = ('CE', 'KD', 'DiVE')
  found = launcher.launch(dive.run, config, tmp_path)
  rows = {row['name']: row for row in found['rows']}
  assert list(rows) == ['CE', 'KD', 'DiVE', 'class counts']
  assert rows['DiVE']['role'] == 'method' and 0 <= rows['DiVE']['metrics']['mean'] <= 100
  counts = load_sources(config).counts
  level = counts[counts < 10].mean() / counts[counts > 30].mean()
  assert rows['class counts']['metrics']['virtual_tau3'] == pytest.approx(level)
  assert 0 < rows['CE']['metrics']['virtual_tau6'] < 3
  assert (tmp_path / 'bsce').is_dir()  # the teacher, which no row asked for
  assert {path.name for path in tmp_path.glob('*.png')} == {'recalls.png', 'virtual_examples.png'}
  assert {claim['method'] for claim in found['claims']} == {'DiVE', 'CE'}
  assert json.loads((tmp_path / 'results.json').read_text())['rows'] == found['rows']


def test_gml_adds_rows_without_training_and_resumes(tmp_path, capsys):
  config = tiny('gml', 'ce', 'gml', 'lws')
  found = launcher.launch(gml.run, config, tmp_path)
  rows = {row['name']: row['metrics'] for row in found['rows']}
  assert list(rows) == ['CE', 'CE + GML', 'LWS', 'ensemble', 'post-hoc', 'tau-norm']
  assert rows['tau-norm']['tau'] in config.tau.grid
  assert set(rows['LWS']) >= {'mean', 'harmonic', 'geometric', 'lowest', 'many', 'few', 'ece'}
  capsys.readouterr()
  again = launcher.launch(gml.run, config, tmp_path)
  assert again['rows'] == found['rows']
  assert 'ce/checkpoints' not in capsys.readouterr().err


def test_btm_leaves_rows_and_both_second_stages(tmp_path):
  config = tiny('btm', 'stage1', 'balanced', 'las_stage1', 'las_merged')
  with config.unlocked():
    config.merged.count, config.pictured = 2, ('CE', 'merged')
  found = launcher.launch(btm.run, config, tmp_path)
  names = [row['name'] for row in found['rows']]
  assert names == ['CE', 'single subset', 'merged', 'CE + LAS', 'merged + LAS']
  assert len(found['claims']) == 3 and (tmp_path / 'recalls.png').exists()


def test_fine_tunings_vmapped_are_those_one_after_the_other(tmp_path, monkeypatch):
  config = convolutional(tiny('btm'))
  traced = []

  def counted(self, name, make=Trainer.program):
    program = make(self, name)

    def step(state, batch):
      traced.append(name)
      return program.step(state, batch)

    return program.replace(step=step)

  monkeypatch.setattr(Trainer, 'program', counted)
  with config.unlocked():
    config.stages.balanced.mixup = 0.2
    config.merged.count = 3
  found = {}
  for vmapped in (True, False):
    with config.unlocked():
      config.merged.vmapped = vmapped
    trainer = Trainer(config, load_sources(config), tmp_path / str(vmapped))
    trainer.variables('stage1')
    traced.clear()
    found[vmapped] = [flat(one) for one in btm.fine_tune(trainer)]
    assert traced == ['balanced']  # one compilation serves all runs
  start = flat(trainer.variables('stage1'))
  for together, alone in zip(found[True], found[False], strict=True):
    for path, value in alone.items():
      np.testing.assert_allclose(together[path], value, rtol=2e-4, atol=2e-5, err_msg=path)
      assert not np.array_equal(value, start[path]), path
  first, second = found[False][:2]
  assert not np.allclose(first['params/head/kernel'], second['params/head/kernel'], atol=1e-4)

  nested = [traverse_util.unflatten_dict(one, sep='/') for one in found[False]]
  merged = flat(btm.merge(trainer, nested))
  assert any(path.startswith('batch_stats/') for path in merged)
  for path, value in merged.items():
    np.testing.assert_allclose(value, np.mean([one[path] for one in found[False]], 0), rtol=1e-5)
  with config.unlocked():
    config.merged.recompute_batch_stats = True
  again = flat(btm.merge(trainer, nested))
  for path, value in again.items():
    assert np.array_equal(value, merged[path]) == path.startswith('params/'), path


def test_recomputed_statistics_are_the_mean_of_the_batches():
  model = models.create('cifar_resnet18', stage_sizes=(1,), strides=(1,), width=4, num_classes=None)
  batches = jax.random.normal(jax.random.key(0), (3, 6, 5, 5, 3))
  variables = model.init(jax.random.key(1), batches[0])
  found = btm.recompute_batch_stats(model, variables, batches)
  outputs = models.capture(model, variables, ['conv1'], batches.reshape(-1, 5, 5, 3))[1]['conv1']
  outputs = np.asarray(outputs).reshape(3, -1, 4)
  stem = found['batch_stats']['bn1']
  np.testing.assert_allclose(stem['mean'], outputs.mean((0, 1)), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(stem['var'], outputs.var(1, ddof=1).mean(0), rtol=1e-4)
  assert found['params'] is variables['params']


def test_a_frozen_backbone_stays_and_its_statistics_move_only_outside_of_eval_mode():
  config = convolutional(tiny('btm'))
  for name, adapts in (('crt_merged', False), ('las_merged', True)):
    before, after = one_step(config, name)
    old, new = flat(before.params), flat(after.params)
    for path in old:
      assert np.array_equal(old[path], new[path]) == path.startswith('backbone/'), path
    old, new = flat(before.model_state), flat(after.model_state)
    assert old
    for path in old:
      assert np.array_equal(old[path], new[path]) != adapts, path


def test_weight_scaling_trains_the_factors_alone():
  before, after = one_step(tiny('gml'), 'lws')
  old, new = flat(before.params), flat(after.params)
  assert [path for path in old if not np.array_equal(old[path], new[path])] == ['head/scale']


@pytest.mark.parametrize(
  'loss',
  [
    {'name': 'class_balanced', 'beta': 0.999, 'start': 1},
    {'name': 'label_smoothing', 'smoothing': 0.1},
    {'name': 'logit_adjusted', 'tau': 1.0},
    {'name': 'focal', 'gamma': 1.0},
    {'name': 'ldam', 'max_margin': 0.5, 'scale': 30.0, 'beta': 0.9999, 'start': 0},
  ],
  ids=lambda loss: loss['name'],
)
def test_losses_by_name_train(loss):
  config = tiny('gml')
  with config.unlocked():
    config.stages.ce.loss = loss
    config.stages.ce.head = 'cosine' if loss['name'] == 'ldam' else 'linear'
  one_step(config, 'ce')


def test_deferred_weights_begin_with_their_epoch():
  config = tiny('gml')
  with config.unlocked():
    config.stages.ce.loss = {'name': 'class_balanced', 'beta': 0.99, 'start': 1}
  counts = supervised.nominal_counts(config)
  loss = supervised.make_loss(config.stages.ce, counts, 3)
  logits, labels = jax.random.normal(jax.random.key(0), (6, 10)), jnp.arange(6) + 4
  plain, last, weighted = (loss(logits, labels, None, jnp.int32(step)) for step in (0, 2, 3))
  assert plain == last and abs(float(weighted - plain)) > 1e-4


def test_a_student_learns_from_the_teacher_given_to_it():
  config = tiny('dive')
  program = supervised.program(config, 'dive')
  state = program.init(jax.random.key(0))
  teacher = jax.tree.map(lambda leaf: leaf + 1, state.extra['teacher'])
  begun = supervised.take_over(state, None, teacher=teacher)
  a = one_step(config, 'dive', extra=state.extra)[1]
  b = one_step(config, 'dive', extra=begun.extra)[1]
  assert not np.allclose(a.params['head']['kernel'], b.params['head']['kernel'])
  kept, given = flat(b.extra['teacher']), flat(teacher)
  assert all(np.array_equal(kept[path], given[path]) for path in given)


def test_a_start_of_another_architecture_is_refused_with_the_paths():
  config = tiny('gml')
  state = supervised.program(config, 'lws').init(jax.random.key(0))
  start = {'params': supervised.program(config, 'ce').init(jax.random.key(1)).params}
  taken = supervised.take_over(state, start, fresh=('head/scale',)).params
  assert np.array_equal(taken['head']['kernel'], start['params']['head']['kernel'])
  assert np.array_equal(taken['head']['scale'], np.ones(10))
  with pytest.raises(ValueError, match=r'head/scale: .* nothing given'):
    supervised.take_over(state, start)


def test_schedules_are_the_published_ones():
  def rates(paper, setting, stage, epochs):
    config = launcher.load_config(launcher.CONFIGS / paper / f'{setting}.py')
    own = config.stages[stage]
    schedule = supervised.stage_schedule(own, 10)
    assert schedule(10 * epochs[0]) == schedule(10 * epochs[0] + 9)
    return [float(schedule(10 * epoch + 5)) for epoch in epochs]

  # BagofTricks-LT: 0.1 (1 - e/5) / 3 + 0.1 e/5; LDAM: 0.1 (e + 1) / 5; epochs from 0.
  expected = [*(0.1 * ((1 - e / 5) / 3 + e / 5) for e in range(5)), 0.1, 0.1, 1e-3, 1e-5]
  found = rates('dive', 'cifar100_lt', 'dive', [0, 1, 2, 3, 4, 5, 119, 120, 160])
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  expected = [*(0.02 * (e + 1) for e in range(5)), 0.1, 0.1, 1e-3, 1e-5]
  found = rates('gml', 'cifar10_lt', 'ce', [0, 1, 2, 3, 4, 5, 159, 160, 180])
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  expected = [0.05 * (1 + np.cos(np.pi * e / 180)) for e in (0, 60, 179)]
  found = rates('btm', 'imagenet_lt', 'balanced', [0, 60, 179])
  np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_hold_out_takes_a_share_of_every_class_away(tmp_path):
  config = tiny('gml')
  trainer = Trainer(config, load_sources(config), tmp_path)
  own = config.stages.ce_holdout
  kept, out = (source_labels(trainer.records(own, held_out=h)) for h in (False, True))
  counts = trainer.sources.counts
  taken = np.bincount(out, minlength=10)
  np.testing.assert_array_equal(taken, np.maximum(np.round(0.2 * counts), 1))
  np.testing.assert_array_equal(np.bincount(kept, minlength=10), counts - taken)
  with pytest.raises(ValueError, match='nothing of class 1'):
    supervised.held_out(np.array([5, 1]), 0.2)


def save_features(path, train=60, test=30, classes=3, **changes):
  rng = np.random.default_rng(0)
  arrays = {}
  for split, count in (('train', train), ('test', test)):
    labels = np.arange(count) % classes
    if split == 'train':
      labels = np.minimum(np.arange(count) // (count // 2), 1) + (np.arange(count) >= count - 6)
    arrays[f'{split}_labels'] = labels
    arrays[f'{split}_features'] = rng.normal(size=(count, 4)) + 3 * np.eye(classes, 4)[labels]
  arrays |= changes
  np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
  return str(path)


@pytest.mark.parametrize('paper', ['gml', 'btm'])
def test_a_users_features_run_through_the_same_stages(tmp_path, paper):
  runs = {'gml': ('ce', 'gml', 'lws'), 'btm': ('stage1', 'balanced', 'las_merged')}[paper]
  config = tiny(paper, *runs)
  with config.unlocked():
    config.features = save_features(tmp_path / 'features.npz')
    for name in config.stages:
      config.stages[name].batch_size = 8
      config.stages[name].epochs = 10
    config.merged = {'of': 'balanced', 'count': 2, 'vmapped': True, 'recompute_batch_stats': False}
    config.pictured = ()
  found = launcher.launch(PAPERS[paper].run, config, tmp_path / paper)
  assert all(row['metrics']['mean'] > 80 for row in found['rows'])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'test_labels': None}, r"lacks \['test_labels'\]"),
    ({'train_labels': np.zeros(59, int)}, r'\(60, 4\) and train_labels \(59,\)'),
    ({'train_features': np.full((60, 4), np.nan)}, 'not finite'),
    ({'train_labels': np.arange(60) % 2 * 2}, 'class 1 has no images'),
    ({'test_labels': np.zeros(30)}, 'must be integers'),
    ({'test_features': np.zeros((30, 5))}, 'differ in their dimension'),
    ({'test_labels': np.arange(30) % 4}, 'out of range'),
  ],
)
def test_wrong_features_are_refused(tmp_path, changes, message):
  config = tiny('gml')
  with config.unlocked():
    config.features = save_features(tmp_path / 'features.npz', **changes)
  with pytest.raises(ValueError, match=message):
    with_features(config)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'loss': {'name': 'bsce'}}, "loss.name='bsce'"),
    ({'loss': {'name': 'dive'}}, 'one needs the other'),
    ({'head': 'svm'}, r"stages.ce.head='svm'"),
    ({'sampler': 'balanced'}, r"stages.ce.sampler='balanced'"),
    ({'batch_size': 4096}, 'exceeds its .* training records'),
  ],
)
def test_wrong_stages_are_refused(change, message):
  config = tiny('gml')
  with config.unlocked():
    config.stages.ce.update(change)
  with pytest.raises(ValueError, match=message):
    supervised.program(config, 'ce')
  with pytest.raises(ValueError, match=r'no stages\.cee'):
    supervised.program(config, 'cee')


def test_listed_photographs_are_read_and_validate_tau(tmp_path):
  from PIL import Image

  rng = np.random.default_rng(0)
  counts = {'train': [24, 12, 4], 'val': [3, 3, 3], 'test': [4, 4, 4]}
  for split, per_class in counts.items():
    lines = []
    for label, count in enumerate(per_class):
      for number in range(count):
        name = f'{split}_{label}_{number}.png'
        pixels = np.clip(rng.normal(80 * label, 30, (20, 24, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        lines.append(f'{name} {label}')
    (tmp_path / f'Toy_{split}.txt').write_text('\n'.join(lines))
  config = launcher.load_config(launcher.CONFIGS / 'gml' / 'imagenet_lt.py')
  with config.unlocked():
    convolutional(config)
    for split, name in (('train', 'train'), ('test', 'test'), ('validation', 'val')):
      config.data[f'{split}_options'].update(path=f'{tmp_path}/Toy_{name}.txt', root=str(tmp_path))
    config.data.update(num_classes=3, train_size=40, stored_image=(16, 16, 3), image_size=12)
    config.data.update(num_threads=0, num_workers=0)
    config.data.train_decode.size, config.augment.jitter = 16, None
    config.data.test_decode = {'size': 12, 'resize': 14}
    config.eval_batch_size, config.runs, config.pictured = 8, ('ce', 'gml'), ('CE', 'CE + GML')
    for stage in config.stages.values():
      stage.batch_size, stage.epochs = 8, 1
  found = launcher.launch(gml.run, config, tmp_path / 'run')
  assert [row['name'] for row in found['rows']][-1] == 'tau-norm'
  assert not (tmp_path / 'run' / 'ce_holdout').exists()
  with config.unlocked():
    config.data.train_size = 41
  with pytest.raises(ValueError, match=r'--config\.data\.train_size=40'):
    load_sources(config)
