import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from long_tail_settings import PAPERS, tiny

from experiments import aot, btm, dive, gml, launcher, supervised, training
from experiments.long_tail import Trainer, groups
from experiments.long_tail_data import load_sources
from jaxlab import models, parallel
from jaxlab.data.long_tail import source_labels
from jaxlab.losses.distillation import virtual_example_counts

CONFIGS = [path for paper in PAPERS for path in launcher.settings(paper)]


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
  before = jax.jit(program.init)(jax.random.key(0)).replace(**state_changes)
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


@pytest.fixture
def one_device(monkeypatch):
  """Trains on a single device, which compiles faster."""
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  monkeypatch.setattr(training, 'mesh', lambda config: mesh)


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: f'{path.parent.name}-{path.stem}')
def test_every_setting_builds_and_traces(path):
  config = launcher.load_config(path)
  assert set(config.runs) <= set(config.stages) and 'batch_size' not in config
  members = groups(config, supervised.nominal_counts(config))
  assert all(classes.any() for classes in members.values())
  for claim in config.claims:  # zero must not be above zero
    assert claim['metric'] not in ('lowest', 'harmonic') or claim['margin']
  method = {'dive': 'dive', 'gml': 'gml', 'btm': 'balanced'}[config.paper]
  # Architectures are built whole once (but ResNet-152); steps are traced with a few of their blocks.
  names = {other: launcher.load_config(other).model.backbone.name for other in CONFIGS}
  first = next(other for other in CONFIGS if names[other] == names[path])
  if path == first and 'places' not in path.stem:
    jax.eval_shape(supervised.program(config, method).init, jax.random.key(0))
  if sizes := getattr(
    supervised.classifier(config, config.stages[method]).backbone, 'stage_sizes', None
  ):
    with config.unlocked():
      config.model.backbone.stage_sizes = (1, 1, 1, sizes[-1]) if 'places' in path.stem else (1,)
  seen = set()
  for name, stage in config.stages.items():
    program = supervised.program(config, name)
    # Stages that differ in their loss or records alone have the same state.
    kind = (stage.head, bool(stage.teacher), *(stage[f] for f in ('frozen', 'fresh', 'mixup')))
    if name != method and kind in seen and path.stem != 'embedded':
      continue
    seen.add(kind)
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


def test_dive_leaves_rows_claims_and_pictures(tmp_path, one_device):
  config = tiny('dive', 'ce', 'dive')
  with config.unlocked():
    config.pictured = ('CE', 'DiVE')
  found = launcher.launch(dive.run, config, tmp_path)
  rows = {row['name']: row for row in found['rows']}
  assert list(rows) == ['CE', 'DiVE', 'class counts']
  assert rows['DiVE']['role'] == 'method' and 0 <= rows['DiVE']['metrics']['mean'] <= 100
  counts = load_sources(config).counts
  level = counts[counts < 10].mean() / counts[counts > 30].mean()
  assert rows['class counts']['metrics']['virtual_tau3'] == pytest.approx(level)
  assert 0 < rows['CE']['metrics']['virtual_tau6'] < 3
  assert (tmp_path / 'bsce').is_dir()  # the teacher, which no row asked for
  assert {path.name for path in tmp_path.glob('*.png')} == {'recalls.png', 'virtual_examples.png'}
  assert [claim['method'] for claim in found['claims']] == ['CE']  # BSCE has no row
  assert json.loads((tmp_path / 'results.json').read_text())['rows'] == found['rows']


def test_virtual_examples_are_summed_batch_by_batch(tmp_path):
  config = tiny('dive')
  with config.unlocked():
    config.eval_batch_size = 48
  trainer = Trainer(config, load_sources(config), tmp_path)
  state = jax.jit(supervised.program(config, 'bsce').init)(jax.random.key(0))
  trainer.found['bsce'] = {'params': jax.tree.map(lambda leaf: 3 * leaf, state.params)}
  logits = trainer.outputs('bsce', source=trainer.sources.train)
  assert len(logits) % 48
  expected = [virtual_example_counts(logits, t) for t in config.virtual.temperatures]
  np.testing.assert_allclose(dive.virtual_examples(trainer, 'bsce'), expected, rtol=1e-5)


def test_without_few_shot_classes_their_measure_is_left_out(tmp_path, capsys, one_device):
  config = tiny('dive', 'ce')
  with config.unlocked():
    config.data.long_tail.ratio = 2.0
  launcher.launch(dive.run, config, tmp_path)
  text = (tmp_path / 'results.json').read_text()
  found = json.loads(text, parse_constant=pytest.fail)
  assert [row['name'] for row in found['rows']] == ['CE'] and found['claims'] == []
  assert 'not measured, no class has few images' in capsys.readouterr().out


def test_gml_adds_rows_without_training_and_resumes(tmp_path, capsys, one_device):
  config = tiny('gml', 'ce', 'gml')
  found = launcher.launch(gml.run, config, tmp_path)
  rows = {row['name']: row['metrics'] for row in found['rows']}
  assert list(rows) == ['CE', 'CE + GML', 'ensemble', 'post-hoc', 'tau-norm']
  assert rows['tau-norm']['tau'] in config.tau.grid
  assert set(rows['CE + GML']) >= {'mean', 'harmonic', 'geometric', 'lowest', 'many', 'few', 'ece'}
  capsys.readouterr()
  again = launcher.launch(gml.run, config, tmp_path)
  assert again['rows'] == found['rows']
  assert 'ce/checkpoints' not in capsys.readouterr().err


def test_btm_leaves_rows_and_a_second_stage(tmp_path):
  config = tiny('btm', 'stage1', 'balanced', 'las_merged')
  with config.unlocked():
    config.merged.count, config.pictured = 2, ('CE', 'merged')
  found = launcher.launch(btm.run, config, tmp_path)
  names = [row['name'] for row in found['rows']]
  assert names == ['CE', 'single subset', 'merged', 'merged + LAS']
  assert len(found['claims']) == 3 and (tmp_path / 'recalls.png').exists()


def test_fine_tunings_vmapped_are_those_one_after_the_other(tmp_path, monkeypatch, one_device):
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
    config.merged.count = 2
  trainer = Trainer(config, load_sources(config), tmp_path)
  trainer.variables('stage1')
  found = {}
  for vmapped in (True, False):
    with config.unlocked():
      config.merged.vmapped = vmapped
    traced.clear()
    found[vmapped] = [flat(one) for one in btm.fine_tune(trainer)]
    assert traced == ['balanced']  # one compilation serves all runs
  assert json.loads((tmp_path / 'balanced' / 'config.json').read_text())['count'] == 2
  start = flat(trainer.variables('stage1'))
  for together, alone in zip(found[True], found[False], strict=True):
    for path, value in alone.items():
      np.testing.assert_allclose(together[path], value, rtol=2e-4, atol=2e-5, err_msg=path)
      assert not np.array_equal(value, start[path]), path
  first, second = found[False]
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
  variables = jax.jit(model.init)(jax.random.key(1), batches[0])
  found = btm.recompute_batch_stats(model, variables, batches)
  outputs = models.capture(model, variables, ['conv1'], batches.reshape(-1, 5, 5, 3))[1]['conv1']
  outputs = np.asarray(outputs).reshape(3, -1, 4)
  stem = found['batch_stats']['bn1']
  np.testing.assert_allclose(stem['mean'], outputs.mean((0, 1)), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(stem['var'], outputs.var(1, ddof=1).mean(0), rtol=1e-4)
  assert found['params'] is variables['params']

  other = btm.recompute_batch_stats(model, variables, batches, ('bn1',))['batch_stats']
  for name, value in variables['batch_stats']['bn1'].items():
    np.testing.assert_array_equal(other['bn1'][name], value)
  conv = 'layer1_0/conv1'  # behind the stem alone, which is in eval mode
  outputs = models.capture(model, variables, [conv], batches.reshape(-1, 5, 5, 3))[1][conv]
  mean = np.asarray(outputs).reshape(-1, 4).mean(0)
  np.testing.assert_allclose(other['layer1_0']['bn1']['mean'], mean, rtol=1e-4, atol=1e-5)


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
def test_losses_by_name_have_gradients(loss):
  config = tiny('gml')
  with config.unlocked():
    config.stages.ce.loss = loss
  value = supervised.make_loss(config.stages.ce, supervised.nominal_counts(config), 1)
  logits, labels = jax.random.normal(jax.random.key(0), (8, 10)), jnp.arange(8)
  gradient = jax.grad(value)(logits / 4, labels, None, jnp.int32(1))
  assert np.isfinite(gradient).all() and np.abs(gradient).max(-1).min() > 1e-6


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
  state = jax.jit(program.init)(jax.random.key(0))
  teacher = jax.tree.map(lambda leaf: leaf + 1, state.extra['teacher'])
  begun = supervised.take_over(state, None, teacher=teacher)
  a = one_step(config, 'dive', extra=state.extra)[1]
  b = one_step(config, 'dive', extra=begun.extra)[1]
  assert not np.allclose(a.params['head']['kernel'], b.params['head']['kernel'])
  kept, given = flat(b.extra['teacher']), flat(teacher)
  assert all(np.array_equal(kept[path], given[path]) for path in given)


def test_a_start_of_another_architecture_is_refused_with_the_paths():
  config = tiny('gml')
  state = jax.jit(supervised.program(config, 'lws').init)(jax.random.key(0))
  start = {'params': jax.jit(supervised.program(config, 'ce').init)(jax.random.key(1)).params}
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


def test_listed_photographs_are_read_and_validate_tau(tmp_path, one_device):
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
    config.eval_batch_size, config.runs, config.pictured = 8, ('ce',), ('CE',)
    for stage in config.stages.values():
      stage.batch_size, stage.epochs = 8, 1
  found = launcher.launch(gml.run, config, tmp_path / 'run')
  assert [row['name'] for row in found['rows']][-1] == 'tau-norm'
  assert not (tmp_path / 'run' / 'ce_holdout').exists()
  with config.unlocked():
    config.data.validation_options.path = str(tmp_path / 'absent.txt')
  assert load_sources(config).validation is None
  with pytest.raises(FileNotFoundError, match=r'absent\.txt'):
    load_sources(config, validation=True)
  with config.unlocked():
    config.data.train_size = 41
  with pytest.raises(ValueError, match=r'--config\.data\.train_size=40'):
    load_sources(config)
