"""R2-D2: what a step does to pseudo-labels, reprediction, restarts, meshes, the whole path."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import assert_same, on_one_and_on_eight

from experiments import r2d2
from experiments.harness import launcher, runs
from experiments.harness.settings import SettingsError
from experiments.protocols import semi_supervised
from jaxlab import data, losses, training

TINY = (
  "model={'name': 'mlp', 'hidden': (8,)}",
  'augment.cutout=2',
  "data.train_options={'test_size': 1669}",
  'data.train_size=128',
  "data.test_options={'test_size': 64}",
  'labeled.per_class=2',
  'supervised.batch_size=8',
  'supervised.epochs=4',
  'method.labeled_batch=4',
  'method.repredict=1,2',
  'decipher.batch_size=16',
  'decipher.epochs=3',
  "decipher.schedule={'name': 'constant', 'base': 0.1}",
  'tuning.batch_size=16',
  'tuning.epochs=1',
)


def tiny_config(*changes):
  return launcher.load('r2d2', 'embedded', [*TINY, *changes])


@functools.cache
def loaded():
  return semi_supervised.load(tiny_config())


def given(config):
  return np.asarray(losses.initial_label_logits(loaded().given, 10, config.method.scale))


def begin(config):
  """Returns what puts random pseudo-labels of unlabeled records into a state."""
  predicted = np.random.default_rng(0).normal(size=(128, 10)).astype(np.float32)

  def put(state):
    state = semi_supervised.with_pseudo_labels(state, loaded(), given(config), predicted)
    return jax.tree.map(jnp.asarray, state)

  return put


def batches(config, count):
  """Returns batches as the loader makes them."""
  source = loaded().train
  make = r2d2.decipher(config, 'r2d2').sampler
  loader = data.make_loader(source, batch_size=16, sampler=make(source))
  return [jax.tree.map(jnp.asarray, next(loader)) for _ in range(count)]


@functools.cache
def compiled():
  program = r2d2.decipher(tiny_config(), 'r2d2').program
  return program, (jax.jit(program.init), jax.jit(program.step))


def test_a_step_moves_unlabeled_rows_of_its_batch_by_the_gradient_of_the_loss():
  config = tiny_config()
  _, (init, step) = compiled()
  (batch,) = batches(config, 1)
  assert batch['index'].shape == (16,)
  unlabeled = ~loaded().labeled[np.asarray(batch['index'])]
  np.testing.assert_array_equal(unlabeled, np.arange(16) < 12)
  before = begin(config)(init(jax.random.key(0)))
  after, metrics = step(before, {}, batch)
  old, new = (np.asarray(state.extra['table']['logits']) for state in (before, after))
  own, index = config.method, np.asarray(batch['index'])

  # The network's outputs, from the change of the table alone: p = q - moved * batch / (rate alpha).
  q = np.asarray(jax.nn.softmax(old[index[:12]]))
  p = q - (old - new)[index[:12]] * 16 / (own.rate * own.alpha)
  np.testing.assert_allclose(p.sum(-1), 1, atol=1e-4)
  assert (p > -1e-5).all()
  task = dataclasses.replace(config.task, augment=dataclasses.replace(config.augment, cutout=0))

  @jax.jit
  def outputs(state):
    keys = training.step_keys(state)['augment']
    each = jax.vmap(lambda i: jax.random.fold_in(keys, i))(batch['index'])
    return config.network.apply({'params': state.params}, task.augmented(each, batch))

  logits = outputs(before)
  np.testing.assert_allclose(p, jax.nn.softmax(logits[:12]), atol=2e-3)
  loss = losses.d2_loss(logits, old[index], own.alpha, own.beta)
  np.testing.assert_allclose(metrics['loss'], jnp.mean(loss), rtol=1e-5)

  others = np.setdiff1d(np.arange(len(old)), index[:12])
  np.testing.assert_array_equal(new[others], old[others])
  np.testing.assert_allclose(new.sum(-1), old.sum(-1), rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(old[:128][loaded().labeled], given(config)[loaded().labeled])


def test_hidden_labels_are_not_read():
  config = tiny_config()
  _, (init, step) = compiled()
  state = begin(config)(init(jax.random.key(0)))
  (batch,) = batches(config, 1)
  one, _ = step(state, {}, batch)
  other, _ = step(state, {}, {**batch, 'label': jnp.zeros_like(batch['label'])})
  jax.tree.map(np.testing.assert_array_equal, (one.params, one.extra), (other.params, other.extra))
  assert set(loaded().given[~loaded().labeled]) == {-1}


@pytest.mark.exhaustive
def test_the_table_on_eight_devices_is_that_on_one():
  config = tiny_config()
  program, plain = compiled()
  many = batches(config, 6)
  (one, one_metrics), (eight, eight_metrics) = on_one_and_on_eight(
    program, many, plain=plain, prepare=begin(config)
  )
  assert eight.extra['table']['logits'].sharding.spec == jax.sharding.PartitionSpec(
    ('data', 'fsdp')
  )
  assert_same(one.extra['table'], eight.extra['table'], 1e-4, 1e-5)
  assert_same((one.params, one_metrics), (eight.params, eight_metrics), 1e-4, 1e-5)
  labeled = np.flatnonzero(loaded().labeled)
  for state in (one, eight):
    logits = np.asarray(state.extra['table']['logits'])
    np.testing.assert_array_equal(logits[labeled], given(config)[labeled])


class Killed(BaseException):
  pass


def test_a_run_that_is_killed_between_repredictions_ends_as_if_it_had_not_been(
  tmp_path, monkeypatch
):
  config = tiny_config('checkpoint_every=4', "runs=['r2d2']", 'method.repredict=1')
  config = dataclasses.replace(config, decipher=dataclasses.replace(config.decipher, epochs=2))
  steps, run = r2d2.steps_per_epoch(config)['decipher'], r2d2.decipher(config, 'r2d2')
  assert (steps, run.num_steps, run.revise_at) == (9, 18, (9,))
  _, (init, _) = compiled()
  start = runs.variables_of(init(jax.random.key(1)))
  train = lambda name: r2d2.train_deciphering(config, run, loaded(), start, tmp_path / name)  # noqa: E731
  whole = train('whole')
  drawn = data.Loader.__next__

  def until(limit):
    def read(loader):
      # A batch or two are read ahead of the step.
      if loader.get_state()['step'] >= limit:
        raise Killed
      return drawn(loader)

    return read

  # Within D2, and behind the reprediction.
  for limit, saved in ((7, 4), (15, 12)):
    monkeypatch.setattr(data.Loader, '__next__', until(limit))
    with pytest.raises(Killed):
      train('killed')
    assert sorted(int(p.name) for p in (tmp_path / 'killed/checkpoints').iterdir())[-1] == saved
  monkeypatch.setattr(data.Loader, '__next__', drawn)
  again = train('killed')
  jax.tree.map(
    np.testing.assert_array_equal, *((own.state.params, own.state.extra) for own in (whole, again))
  )
  assert r2d2.looked_at(again) == r2d2.looked_at(whole)
  logits, labeled = np.asarray(again.state.extra['table']['logits'])[:128], loaded().labeled
  np.testing.assert_array_equal(logits[labeled], given(config)[labeled])


def test_the_whole_path_ends_with_a_table_claims_and_a_picture(tmp_path):
  config = tiny_config()
  found = r2d2.run(dataclasses.replace(config, runs=('supervised', 'd2', 'r2d2')), tmp_path)
  rows = {line['name']: line['metrics'] for line in found['rows']}
  assert list(rows) == ['Supervised', 'D2', 'R2-D2']
  assert len(found['claims']) == len(config.claims)
  assert rows['D2']['drop'] == 0 and rows['D2']['relative_entropy'] == pytest.approx(100)
  assert rows['R2-D2']['drop'] != 0
  assert rows['R2-D2']['entropy'] != rows['D2']['entropy']
  assert (tmp_path / 'entropy_and_accuracy.png').is_file()
  labels = np.load(tmp_path / 'r2d2_labels.npz')
  np.testing.assert_array_equal(labels['labeled'], loaded().labeled)
  chosen = labels['labeled']
  np.testing.assert_array_equal(labels['label'][chosen], loaded().labels[chosen])
  share = 100 * np.mean(labels['label'][~chosen] == loaded().labels[~chosen])
  assert rows['R2-D2']['label_accuracy'] == pytest.approx(share)


def test_rows_are_switched_by_runs_and_differ_in_their_identities():
  config = tiny_config("runs=['d2']", 'supervised.schedule.decay_epochs=5')
  assert list(r2d2.programs(config)) == ['supervised', 'd2', 'd2_tuning']
  assert r2d2.decipher(config, 'd2').revise_at == ()
  assert r2d2.decipher(config, 'r2d2').revise_at == (9, 18)
  assert r2d2.decipher(config, 'd2').identity != r2d2.decipher(config, 'r2d2').identity
  assert r2d2.tuning(config, 'd2').identity != r2d2.tuning(config, 'r2d2').identity
  # As many steps as all three stages: 4 epochs of 2, 3 of 9 and 1 of 8, in whole epochs of 2.
  longer = r2d2.supervised(config, 'longer')
  assert longer.num_steps == 4 * 2 + 3 * 9 + 8 + 1
  assert longer.recipe.schedule.decay_epochs == pytest.approx(5 * 22 / 4)


def test_labels_are_kept_by_seed_and_for_every_class():
  config = tiny_config()
  sources = loaded()
  assert sources.labeled.sum() == config.num_labeled == 20
  assert np.bincount(sources.given[sources.labeled]).tolist() == [2] * 10
  other = semi_supervised.draw_labeled(dataclasses.replace(config, seed=1), sources.labels)
  assert np.any(other != sources.labeled)
  assert len(sources.labeled_records) == 20
  wrong = dataclasses.replace(
    config, labeled=dataclasses.replace(config.labeled, total=11, per_class=None)
  )
  with pytest.raises(ValueError, match=r'classes .* keep no label'):
    semi_supervised.draw_labeled(wrong, sources.labels)


def test_an_entropy_is_the_mean_over_unlabeled_records():
  labeled = np.array([True, False, False])
  logits = jnp.array([[9.0, 0.0], [0.0, 0.0], [50.0, 0.0], [3.0, 0.0]])
  assert semi_supervised.mean_entropy(logits, labeled) == pytest.approx(np.log(2) / 2, rel=1e-5)


@pytest.mark.parametrize(
  'changes, message',
  [
    (['method.beta=0.1'], 'expected 0 <= beta < alpha'),
    (['method.repredict=2,1'], 'expected increasing numbers'),
    (['method.repredict=1,3'], 'expected epochs below 3'),
    (['method.repredict=[]'], 'method.repredict is empty'),
    (['method.labeled_batch=16'], 'method.labeled_batch=16: expected 1 to 15'),
    (['method.labeled_batch=0'], 'method.labeled_batch=0: expected 1 to 15'),
    (['labeled.per_class=13'], '130 images of 10 classes exceed the 128 of 10'),
    (['labeled.per_class=none', 'labeled.total=128'], 'leave none without a label'),
    (['labeled.per_class=none'], 'labeled: expected one of total and per_class'),
    (['labeled.per_class=1', 'method.labeled_batch=12'], 'exceeds the 10 labeled images'),
    (['supervised.batch_size=32'], 'supervised.batch_size=32 exceeds its 20'),
    (['decipher.batch_size=256'], 'exceeds the 108 unlabeled images'),
    (['decipher.mixup=1.0'], 'decipher.mixup: expected 0'),
    (['decipher.microbatches=2'], 'decipher.microbatches: expected 1'),
    (['runs=ce'], r"runs: \['ce'\] are none of"),
    (['augment.kind=none'], 'cutout=2: expected a side'),
  ],
)
def test_what_does_not_fit_is_refused_before_data_are_opened(changes, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny_config(*changes))


def test_a_step_that_overshoots_is_told(capsys):
  r2d2.say_oscillation(tiny_config())
  assert 'WARNING' in capsys.readouterr().out  # 500 * 0.1 / 16
  r2d2.say_oscillation(tiny_config('method.rate=100'))
  assert 'WARNING' not in capsys.readouterr().out
