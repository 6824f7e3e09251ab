import csv
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import assert_same, on_one_and_on_eight

from experiments import pencil
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from experiments.protocols import noisy_labels
from jaxlab import data, losses

TINY = (
  "model={'name': 'mlp', 'hidden': (8,)}",
  'recipe.epochs=3',
  'recipe.eval_every=8',
  "recipe.schedule={'name': 'constant', 'base': 0.1}",
  'pencil.start=1',
  'pencil.end=2',
  'log_every=4',
  "data.train_options={'test_size': 1669}",
  'data.train_size=128',
  'recipe.batch_size=16',
)


def tiny_config(*changes):
  return launcher.load('pencil', 'embedded', [*TINY, *changes])


def batches(config, sources, count):
  rng = np.random.default_rng(0)
  for _ in range(count):
    index = rng.permutation(config.data.size)[:16].astype(np.int32)
    found = sources.train.gather(index)
    yield {**{name: jnp.asarray(found[name]) for name in ('image', 'label')}, 'index': index}


def started(config, sources):
  """Returns the program and what its state starts from, with the given labels in its table."""
  program = pencil.programs(config)['pencil'].program
  begin = lambda state: state.replace(  # noqa: E731
    extra={**state.extra, 'table': jax.tree.map(jnp.asarray, padded(config, sources))}
  )
  return program, begin


def padded(config, sources):
  from jaxlab import training

  return training.pad_rows(pencil.rows(config, sources))


def test_labels_move_in_the_second_stage_alone_and_by_the_gradient_of_its_loss():
  config = tiny_config()
  sources = noisy_labels.load(config)
  program, begin = started(config, sources)
  step, state = jax.jit(program.step), begin(jax.jit(program.init)(jax.random.key(0)))
  model, own = noisy_labels.network(config), config.pencil
  for at, batch in zip((0, 8, 16), batches(config, sources, 3)):  # an epoch has 8 steps
    before = jax.device_get(state.replace(step=jnp.int32(at)))
    state, metrics = step(state.replace(step=jnp.int32(at)), {}, batch)
    logits = jax.jit(model.apply)({'params': before.params}, config.task.inputs(batch))
    rows, labels = before.extra['table']['logits'][batch['index']], batch['label']
    joint = lambda rows: jnp.mean(  # noqa: E731
      losses.pencil_loss(logits, rows, labels, own.alpha, own.beta)  # noqa: B023
    )
    expected = {
      0: jnp.mean(losses.cross_entropy(logits, labels)),
      8: joint(rows),
      16: jnp.mean(losses.label_distribution_loss(logits, rows)),
    }[at]
    np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-5)
    table = before.extra['table']['logits'].copy()
    if at == 8:
      table[batch['index']] -= own.rate * jax.jit(jax.grad(joint))(rows)
    np.testing.assert_allclose(state.extra['table']['logits'], table, atol=1e-4)
    right = np.mean(rows.argmax(-1) == sources.true[batch['index']])
    np.testing.assert_allclose(metrics['labels_correct'], right, rtol=1e-6)


@pytest.mark.exhaustive
def test_a_run_that_ends_while_labels_move_goes_on_bit_for_bit_the_same(tmp_path, monkeypatch):
  config = tiny_config('recipe.eval_every=12')  # in the middle of the second stage
  sources, own = noisy_labels.load(config), pencil.programs(config)['pencil']
  start = lambda sources: pencil.rows(config, sources)  # noqa: E731
  whole = noisy_labels.train(config, own, sources, tmp_path / 'whole' / 'pencil', start)
  with monkeypatch.context() as patch:
    patch.setattr(noisy_labels.networks, 'accuracy', lambda *_: pytest.fail('the machine is lost'))
    with pytest.raises(pytest.fail.Exception, match='lost'):
      noisy_labels.train(config, own, sources, tmp_path / 'pencil', start)
  found = noisy_labels.train(config, own, sources, tmp_path / 'pencil', start)
  assert [line['step'] for line in found.history if 'test' in line] == [12, 24]
  for a, b in zip(*(jax.tree.leaves(own.state) for own in (whole, found)), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.exhaustive
def test_the_table_on_eight_devices_is_that_on_one():
  config = tiny_config('pencil.start=0', 'pencil.rate=100')
  sources = noisy_labels.load(config)
  program, begin = started(config, sources)
  one, eight = on_one_and_on_eight(program, list(batches(config, sources, 3)), prepare=begin)
  assert_same(eight[0].extra, one[0].extra, rtol=1e-5, atol=1e-5)
  assert_same(eight[0].params, one[0].params, rtol=1e-4, atol=1e-5)
  assert eight[0].extra['table']['logits'].addressable_shards[0].data.shape == (32, 10)


def test_a_run_leaves_rows_a_list_of_labels_and_pictures(tmp_path):
  config = tiny_config('pencil.rate=4000')
  found = launcher.launch(config, tmp_path)
  rows = {row['name']: row['metrics'] for row in found['rows']}
  assert list(rows) == ['CE', 'PENCIL', 'PENCIL again']
  assert rows['PENCIL']['label_accuracy'] != rows['CE']['label_accuracy']
  lines = list(csv.DictReader((tmp_path / 'labels.csv').open()))
  stored = np.load(tmp_path / 'labels.npz')
  sources = noisy_labels.load(config)
  assert [int(line['given']) for line in lines] == sources.given.tolist()
  assert [int(line['label']) for line in lines] == stored['label'].tolist()
  right = 100 * np.mean(stored['label'] == sources.true)
  assert rows['PENCIL again']['label_accuracy'] == pytest.approx(right)
  for name in ('accuracy_over_epochs', 'corrections', 'suspicious'):
    assert (tmp_path / f'{name}.png').stat().st_size > 5000


@pytest.mark.exhaustive
def test_where_images_show_several_classes_each_is_a_label_with_two_outcomes(tmp_path):
  small = "{'name': 'convnet', 'widths': (4,), 'pools': (4,), 'hidden': ()}"
  config = launcher.load(
    'pencil',
    'multi_label',
    [
      *(text for text in TINY if not text.startswith(('model', 'data'))),
      f'model={small}',
      'data.train_options.length=48',
      'data.test_options.length=20',
      'data.train_size=48',
      'pencil.rate=20000',
    ],
  )
  sources = noisy_labels.load(config)
  assert sources.given.shape == (48, 10) and 75 < sources.facts['label_accuracy'] < 95
  program = pencil.programs(config)['pencil'].program
  state = jax.jit(program.init)(jax.random.key(0))
  table = jax.tree.map(jnp.asarray, padded(config, sources))
  state = state.replace(step=jnp.int32(3), extra={**state.extra, 'table': table})  # second stage
  found = sources.train.gather(np.arange(16))
  batch = {name: jnp.asarray(found[name]) for name in ('image', 'multi_label', 'index')}
  new, metrics = jax.jit(program.step)(state, {}, batch)
  variables = {'params': state.params, **state.model_state}
  logits, _ = noisy_labels.network(config).apply(
    variables, config.task.inputs(batch), train=True, mutable=['batch_stats']
  )
  pairs = jnp.stack([jnp.zeros_like(logits), logits], -1)

  def joint(rows):
    return jnp.mean(losses.pencil_loss(pairs, rows, sources.given[:16], 0.1, 0.4))

  rows = table['logits'][:16]
  np.testing.assert_allclose(metrics['loss'], joint(rows), rtol=1e-5)
  moved = rows - config.pencil.rate * jax.jit(jax.grad(joint))(rows)
  np.testing.assert_allclose(new.extra['table']['logits'][:16], moved, atol=1e-3)
  results = launcher.launch(config, tmp_path)
  assert [row['name'] for row in results['rows']] == ['CE', 'PENCIL']
  (line, *_) = csv.DictReader((tmp_path / 'labels.csv').open())
  assert line['given'] == ';'.join(str(k) for k in np.flatnonzero(sources.given[0]))


def test_noise_is_that_of_the_seed_and_records_can_be_held_out():
  config = tiny_config('data.held_out=28')
  first, again = noisy_labels.load(config), noisy_labels.load(config)
  np.testing.assert_array_equal(first.given, again.given)
  assert (
    len(first.train) == 100 and data.source_labels(first.train).tolist() == first.given.tolist()
  )
  other = noisy_labels.load(dataclasses.replace(config, seed=1))
  assert np.any(other.given != first.given)
  assert 40 < first.facts['label_accuracy'] < 70
  unknown = noisy_labels.load(tiny_config('data.noise=None'))
  assert unknown.true is None and unknown.facts == {}


def test_labels_that_cannot_reach_a_change_are_said(capsys):
  pencil.say_reach(tiny_config('pencil.rate=600'))
  assert 'none can change' in capsys.readouterr().out
  pencil.say_reach(tiny_config('pencil.rate=2000'))
  assert not capsys.readouterr().out


@pytest.mark.parametrize(
  'change, message',
  [
    ('pencil.end=0', 'expected epochs in this order'),
    ('pencil.end=9', 'pencil.end=9 exceeds recipe.epochs=3'),
    ('pencil.rate=0', 'rate=0'),
    ('pencil.compatibility=both', 'both'),
    ('data.noise.rate=1.0', 'rate=1.0: expected a share'),
    ('data.noise.kind=asymmetric', 'known for cifar10, cifar100'),
    ('data.held_out=128', 'held_out=128'),
    ('recipe.mixup=0.5', 'one label distribution'),
    ('recipe.microbatches=2', 'recipe.microbatches: expected 1'),
    ('runs=ce,again', "starts from the labels of 'pencil'"),
    ('runs=pencils,', 'pencils'),
    ('weights=file', 'give the name of the weights'),
  ],
)
def test_settings_that_cannot_be_are_refused(change, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny_config(change))
