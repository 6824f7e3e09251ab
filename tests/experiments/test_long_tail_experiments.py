import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from flax import traverse_util
from long_tail_settings import CONVOLUTIONAL, tiny

from experiments import btm, dive, gml
from experiments.harness import launcher, runs
from experiments.harness.supervised import Seen
from experiments.protocols import classification_losses, long_tail, long_tail_data, stages
from jaxlab.data.sources.source import source_labels
from jaxlab.losses.distillation import virtual_example_counts


def flat(tree):
  return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(dict(tree), sep='/').items()}


def one_step(config, program, frozen=None):
  """Returns the state before and after one step on random images."""
  before = jax.jit(program.init)(jax.random.key(0))
  if frozen is None:
    frozen = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), program.frozen)
  rng = np.random.default_rng(0)
  shape = program.batch['image'].shape
  batch = {
    'image': jnp.asarray(rng.integers(0, 256, shape), jnp.uint8),
    'label': jnp.asarray(rng.integers(0, config.data.num_classes, shape[0]), jnp.int32),
    'index': jnp.arange(shape[0]),
  }
  after, metrics = jax.jit(program.step)(before, frozen, batch)
  assert np.isfinite(metrics['loss'])
  return before, after


def stage_program(module, config, name):
  table = module.table(config, long_tail_data.nominal_facts(config.data))
  return stages.run(config, table, name).program


def test_settings_say_what_they_mean():
  for paper in ('gml', 'btm', 'dive'):
    for path in launcher.settings(paper):
      config = launcher.load(paper, path)
      members = config.groups.of(long_tail_data.nominal_facts(config.data).counts)
      assert all(classes.any() for classes in members.values()), path
      for claim in config.claims:  # zero must not be above zero
        assert claim.metric not in ('lowest', 'harmonic') or claim.margin


def test_dive_leaves_rows_claims_and_pictures(tmp_path):
  config = tiny('dive', 'ce', 'dive', pictured=('CE', 'DiVE'))
  found = launcher.launch(config, tmp_path)
  rows = {row['name']: row for row in found['rows']}
  assert list(rows) == ['CE', 'DiVE', 'class counts']
  assert rows['DiVE']['role'] == 'method' and 0 <= rows['DiVE']['metrics']['mean'] <= 100
  counts = long_tail_data.load(config).facts.counts
  level = counts[counts < 10].mean() / counts[counts > 30].mean()
  assert rows['class counts']['metrics']['virtual_tau3'] == pytest.approx(level)
  assert 0 < rows['CE']['metrics']['virtual_tau6'] < 3
  assert (tmp_path / 'bsce').is_dir()  # the teacher, which no row asked for
  assert {path.name for path in tmp_path.glob('*.png')} == {'recalls.png', 'virtual_examples.png'}
  assert [claim['method'] for claim in found['claims']] == ['CE']  # BSCE has no row
  assert json.loads((tmp_path / 'results.json').read_text())['rows'] == found['rows']


def test_a_teacher_is_in_no_checkpoint(tmp_path):
  launcher.launch(tiny('dive', 'dive'), tmp_path)
  sizes = {
    name: sum(p.stat().st_size for p in (tmp_path / name / 'checkpoints').rglob('*'))
    for name in ('bsce', 'dive')
  }
  assert sizes['dive'] < 1.2 * sizes['bsce']


def test_virtual_examples_are_summed_batch_by_batch():
  config = tiny('dive', eval_batch_size=48)
  sources = long_tail_data.load(config)
  own = dive.table(config, sources.facts)['bsce']
  state = jax.jit(stage_program(dive, config, 'bsce').init)(jax.random.key(0))
  variables = {'params': jax.tree.map(lambda leaf: 3 * leaf, state.params)}
  logits = stages.outputs(config, own, variables, sources.train)
  assert len(logits) % 48
  expected = [virtual_example_counts(logits, t) for t in config.virtual.temperatures]
  found = dive.virtual_examples(config, own, variables, sources.train)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_without_few_shot_classes_their_measure_is_left_out(tmp_path, capsys):
  launcher.launch(tiny('dive', 'ce', data__imbalance__ratio=2.0), tmp_path)
  text = (tmp_path / 'results.json').read_text()
  found = json.loads(text, parse_constant=pytest.fail)
  assert [row['name'] for row in found['rows']] == ['CE'] and found['claims'] == []
  assert 'not measured, no class has few images' in capsys.readouterr().out


def test_gml_adds_rows_without_training_and_resumes(tmp_path, capsys):
  config = tiny('gml', 'ce', 'gml')
  found = launcher.launch(config, tmp_path)
  rows = {row['name']: row['metrics'] for row in found['rows']}
  assert list(rows) == ['CE', 'CE + GML', 'ensemble', 'post-hoc', 'tau-norm']
  assert rows['tau-norm']['tau'] in config.tau.grid
  assert set(rows['CE + GML']) >= {'mean', 'harmonic', 'geometric', 'lowest', 'many', 'few', 'ece'}
  capsys.readouterr()
  (tmp_path / 'results.json').unlink()
  again = launcher.launch(config, tmp_path)
  assert again['rows'] == found['rows']
  assert 'ce: finished before, at step' in capsys.readouterr().out
  other = dataclasses.replace(config, gml=gml.GML(2.0))
  with pytest.raises(ValueError, match=r'gml\.power: 1\.0 there, 2\.0 given'):
    launcher.launch(other, tmp_path)


def test_btm_leaves_rows_and_a_second_stage(tmp_path):
  config = tiny('btm', 'stage1', 'balanced', 'las_merged', merging__count=2)
  found = launcher.launch(config, tmp_path)
  names = [row['name'] for row in found['rows']]
  assert names == ['CE', 'single subset', 'merged', 'merged + LAS']
  assert len(found['claims']) == 3 and (tmp_path / 'recalls.png').exists()


@pytest.mark.exhaustive
def test_fine_tunings_vmapped_are_those_one_after_the_other(tmp_path):
  config = tiny('btm', model=CONVOLUTIONAL, merging__count=2, fine_tuning__mixup=0.2)
  sources, found = long_tail_data.load(config), {}
  own = btm.table(config, sources.facts)
  rows = long_tail.Comparison(config, own, sources, tmp_path)
  for vmapped in (True, False):
    merging = dataclasses.replace(config.merging, vmapped=vmapped)
    chosen = dataclasses.replace(config, merging=merging)
    found[vmapped] = [flat(one) for one in btm.fine_tune(chosen, rows)]
  assert json.loads((tmp_path / 'balanced' / 'config.json').read_text())['count'] == 2
  start = flat(rows.variables('stage1'))
  for together, alone in zip(found[True], found[False], strict=True):
    for path, value in alone.items():
      np.testing.assert_allclose(together[path], value, rtol=2e-4, atol=2e-5, err_msg=path)
      assert not np.array_equal(value, start[path]), path
  first, second = found[False]
  assert not np.allclose(first['params/head/kernel'], second['params/head/kernel'], atol=1e-4)

  nested = [traverse_util.unflatten_dict(one, sep='/') for one in found[False]]
  merged = flat(btm.merge(config, own['balanced'], sources.train, nested))
  assert any(path.startswith('batch_stats/') for path in merged)
  for path, value in merged.items():
    np.testing.assert_allclose(value, np.mean([one[path] for one in found[False]], 0), rtol=1e-5)
  merging = dataclasses.replace(config.merging, recompute_batch_stats=True)
  anew = dataclasses.replace(config, merging=merging)
  again = flat(btm.merge(anew, own['balanced'], sources.train, nested))
  for path, value in again.items():
    assert np.array_equal(value, merged[path]) == path.startswith('params/'), path


@pytest.mark.exhaustive
def test_a_frozen_backbone_stays_and_its_statistics_move_only_outside_of_eval_mode():
  config = tiny('btm', model=CONVOLUTIONAL)
  for name, adapts in (('crt_merged', False), ('las_merged', True)):
    before, after = one_step(config, stage_program(btm, config, name))
    old, new = flat(before.params), flat(after.params)
    for path in old:
      assert np.array_equal(old[path], new[path]) == path.startswith('backbone/'), path
    old, new = flat(before.model_state), flat(after.model_state)
    assert old
    for path in old:
      assert np.array_equal(old[path], new[path]) != adapts, path


def test_weight_scaling_trains_the_factors_alone():
  config = tiny('gml')
  before, after = one_step(config, stage_program(gml, config, 'lws'))
  old, new = flat(before.params), flat(after.params)
  assert [path for path in old if not np.array_equal(old[path], new[path])] == ['head/scale']


@pytest.mark.parametrize(
  ('name', 'options'),
  tables.some(
    [
      ('class_balanced', {'beta': 0.999, 'start': 1}),
      ('label_smoothing', {'smoothing': 0.1}),
      ('label_aware_smoothing', {'head': 0.3, 'tail': 0.0}),
      ('logit_adjusted', {'tau': 1.0}),
      ('balanced_softmax', {}),
      ('focal', {'gamma': 1.0}),
      ('sigmoid_focal', {'alpha': 0.25}),
      ('ldam', {'max_margin': 0.5, 'scale': 30.0, 'beta': 0.9999, 'start': 0}),
    ],
    2,
  ),
)
def test_losses_by_name_have_gradients(name, options):
  counts = long_tail_data.nominal_facts(tiny('gml').data).counts
  value = classification_losses.baseline(name, options, counts, 1)
  logits, labels = jax.random.normal(jax.random.key(0), (8, 10)), jnp.arange(8)
  gradient = jax.jit(jax.grad(lambda z: jnp.mean(value(z, labels, Seen(jnp.int32(1), None)))))(
    logits / 4
  )
  assert np.isfinite(gradient).all() and np.abs(gradient).max(-1).min() > 1e-6


def test_deferred_weights_begin_with_their_epoch():
  counts = long_tail_data.nominal_facts(tiny('gml').data).counts
  loss = classification_losses.class_balanced(counts, 3, beta=0.99, start=1)
  logits, labels = jax.random.normal(jax.random.key(0), (6, 10)), jnp.arange(6) + 4
  values = (jnp.mean(loss(logits, labels, Seen(jnp.int32(step), None))) for step in (0, 2, 3))
  plain, last, weighted = values
  assert plain == last and abs(float(weighted - plain)) > 1e-4


def test_a_student_learns_from_the_teacher_given_to_it():
  config = tiny('dive')
  program = stage_program(dive, config, 'dive')
  teachers = [
    jax.tree.map(lambda leaf, value=value: jnp.full(leaf.shape, value), program.frozen)
    for value in (0.0, 0.1)
  ]
  teachers[1]['teacher']['params']['head']['bias'] = jnp.arange(10.0)
  a, b = (one_step(config, program, frozen)[1] for frozen in teachers)
  assert not np.allclose(a.params['head']['kernel'], b.params['head']['kernel'])


def test_a_start_of_another_architecture_is_refused_with_the_paths():
  config = tiny('gml')
  state = jax.jit(stage_program(gml, config, 'lws').init)(jax.random.key(0))
  other = jax.jit(stage_program(gml, config, 'ce').init)(jax.random.key(1))
  start = runs.variables_of(other)
  taken = runs.take_over(state, start, ('head/scale',)).params
  assert np.array_equal(taken['head']['kernel'], start['params']['head']['kernel'])
  assert np.array_equal(taken['head']['scale'], np.ones(10))
  with pytest.raises(ValueError, match=r'head/scale: .* nothing given'):
    runs.take_over(state, start)


def test_schedules_are_the_published_ones():
  def rates(paper, setting, recipe, epochs):
    own = getattr(launcher.load(paper, setting), recipe)
    schedule = own.schedule.make(own.epochs, 10)
    assert schedule(10 * epochs[0]) == schedule(10 * epochs[0] + 9)
    return [float(schedule(10 * epoch + 5)) for epoch in epochs]

  # BagofTricks-LT: 0.1 (1 - e/5) / 3 + 0.1 e/5; LDAM: 0.1 (e + 1) / 5; epochs from 0.
  expected = [*(0.1 * ((1 - e / 5) / 3 + e / 5) for e in range(5)), 0.1, 0.1, 1e-3, 1e-5]
  found = rates('dive', 'cifar100_lt', 'network', [0, 1, 2, 3, 4, 5, 119, 120, 160])
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  expected = [*(0.02 * (e + 1) for e in range(5)), 0.1, 0.1, 1e-3, 1e-5]
  found = rates('gml', 'cifar10_lt', 'network', [0, 1, 2, 3, 4, 5, 159, 160, 180])
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  expected = [0.05 * (1 + np.cos(np.pi * e / 180)) for e in (0, 60, 179)]
  found = rates('btm', 'imagenet_lt', 'fine_tuning', [0, 60, 179])
  np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_hold_out_takes_a_share_of_every_class_away():
  config = tiny('gml')
  sources = long_tail_data.load(config)
  own, counts = gml.table(config, sources.facts)['ce_holdout'], sources.facts.counts
  kept = source_labels(own.records(sources.train))
  out = source_labels(long_tail_data.held_out(sources.train, counts, 0.2, config.seed)[1])
  taken = np.bincount(out, minlength=10)
  np.testing.assert_array_equal(taken, np.maximum(np.round(0.2 * counts), 1))
  np.testing.assert_array_equal(np.bincount(kept, minlength=10), counts - taken)
  assert own.size == len(kept)
  with pytest.raises(ValueError, match='nothing of class 1'):
    long_tail_data.held_out_counts(np.array([5, 1]), 0.2)


@pytest.mark.exhaustive
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

  def load(**changes):
    values = {'augment.jitter': None, 'eval_batch_size': 8, 'runs': ('ce',), 'pictured': ('CE',)}
    values |= {'model': CONVOLUTIONAL, 'data.num_classes': 3, 'data.train_size': 40}
    values |= {'data.stored_image': (16, 16, 3), 'data.image_size': 12, 'data.num_threads': 0}
    values |= {'data.num_workers': 0, 'data.train_decode': {'size': 16}}
    values |= {'data.test_decode': {'size': 12, 'resize': 14}}
    for split, name in (('train', 'train'), ('test', 'test'), ('validation', 'val')):
      options = {'path': f'{tmp_path}/Toy_{name}.txt', 'root': str(tmp_path), 'decode': False}
      values[f'data.{split}_options'] = options
    for recipe in ('network', 'classifier', 'crt', 'lws'):
      values |= {f'{recipe}.batch_size': 8, f'{recipe}.epochs': 1}
    values |= changes
    return launcher.load('gml', 'imagenet_lt', [f'{k}={v}' for k, v in values.items()])

  found = launcher.launch(load(), tmp_path / 'run')
  assert [row['name'] for row in found['rows']][-1] == 'tau-norm'
  assert not (tmp_path / 'run' / 'ce_holdout').exists()
  absent = {'path': str(tmp_path / 'absent.txt'), 'root': str(tmp_path), 'decode': False}
  config = load(**{'data.validation_options': absent})
  assert long_tail_data.load(config).validation is None
  with pytest.raises(FileNotFoundError, match=r'absent\.txt'):
    long_tail_data.load(config, validation=True)
  with pytest.raises(ValueError, match=r'--config\.data\.train_size=40'):
    long_tail_data.load(load(**{'data.train_size': 41}))


def test_settings_reach_accumulation_precision_partition_and_evaluation(tmp_path):
  changes = {
    'network__microbatches': 2,
    'network__precision': 'bfloat16',
    'network__partition': "[['head/kernel',['fsdp',null]]]".replace('null', 'None'),
    'network__eval_every': 4,
    'network__best_metric': 'mean',
    'tau__holdout': 0.0,
  }
  config = tiny('gml', 'ce', **changes)
  launcher.launch(config, tmp_path)
  rows = [json.loads(line) for line in (tmp_path / 'ce' / 'metrics.jsonl').read_text().splitlines()]
  evaluated = [row for row in rows if 'harmonic' in row]
  assert [row['step'] for row in evaluated][:1] == [4]
  best = max(row['mean'] for row in evaluated)
  found = json.loads((tmp_path / 'results.json').read_text())
  assert found['rows'][0]['metrics']['mean'] == pytest.approx(best)
  program = gml.programs(config)['ce'].program
  assert program.rules[0][0] == 'head/kernel' and 'fsdp' in str(program.rules[0][1])
