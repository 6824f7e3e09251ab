import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import peer_learning
from experiments.harness import launcher, networks
from experiments.harness.settings import SettingsError
from experiments.protocols import network_pairs, noisy_labels
from jaxlab import losses

TINY = (
  "model={'name': 'mlp', 'hidden': (8,)}",
  'recipe.epochs=3',
  'recipe.eval_every=8',
  'recipe.schedule.base=0.01',
  'peer.ramp_epochs=2',
  'log_every=4',
  "data.train_options={'test_size': 1669}",
  'data.train_size=128',
  'recipe.batch_size=16',
  'claims=()',
)
BILINEAR = (
  "model={'name': 'bcnn_vgg11', 'stage_sizes': (1,), 'widths': (4,)}",
  "classifier={'epochs': 2, 'batch_size': 32, 'optimizer': {'name': 'adam'}, 'eval_every': 4,"
  " 'schedule': {'name': 'constant', 'base': 0.05}}",
)


def tiny_config(*changes):
  return launcher.load('peer_learning', 'embedded', [*TINY, *changes])


@functools.cache
def sources():
  return noisy_labels.load(tiny_config())


def batch(seed):
  index = np.random.default_rng(seed).permutation(128)[:16].astype(np.int32)
  found = sources().train.gather(index)
  return {**{name: jnp.asarray(found[name]) for name in ('image', 'label')}, 'index': index}


@functools.cache
def compiled(name):
  program = peer_learning.programs(tiny_config())[name].program
  return jax.jit(program.init), jax.jit(program.step)


def test_a_step_is_that_of_two_networks_alone_on_what_their_peer_chose():
  config, (init, step) = tiny_config(), compiled('peer')
  model, optimizer = noisy_labels.network(config), config.recipe.optimizer.make(0.01)
  state, given = init(jax.random.key(0)), batch(0)
  params = jax.device_get(state.params)
  # Near each other, so that they agree on some examples.
  between = jax.tree.map(lambda a, b: 0.6 * a + 0.4 * b, params['first'], params['second'])
  params = {**params, 'second': between}
  # The second epoch: the ramp is over.
  state = state.replace(step=jnp.int32(8), params=jax.tree.map(jnp.copy, params))
  new, metrics = step(state, {'true': sources().true}, given)

  def logits(own):
    return model.apply({'params': own}, config.task.inputs(given), train=True)

  each, labels = [logits(params[name]) for name in network_pairs.NAMES], given['label']
  found = losses.peer_learning_loss(*each, labels, 0.45)
  assert found.aux.agree.any() and not found.aux.agree.all()
  for name, chosen in zip(network_pairs.NAMES, (found.aux.update1, found.aux.update2)):

    def loss(own, chosen=chosen):
      return jnp.sum(jnp.where(chosen, losses.cross_entropy(logits(own), labels), 0)) / chosen.sum()

    gradients = jax.jit(jax.grad(loss))(params[name])
    updates, _ = optimizer.update(gradients, optimizer.init(params[name]), params[name])
    expected = jax.tree.map(np.add, params[name], updates)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      new.params[name],
      expected,
    )
  true = sources().true[given['index']] == labels
  kept = np.stack([found.aux.keep1, found.aux.keep2])
  np.testing.assert_allclose(metrics['loss'], found.loss1 + found.loss2, rtol=1e-5)
  np.testing.assert_allclose(metrics['disagreement'], np.mean(~found.aux.agree), rtol=1e-6)
  np.testing.assert_allclose(metrics['labels_correct'], np.mean(true), rtol=1e-6)
  np.testing.assert_allclose(metrics['kept'], kept.mean(), rtol=1e-6)
  np.testing.assert_allclose(metrics['kept_correct'], (kept & true).mean(), rtol=1e-6)


def test_networks_are_drawn_differently_and_equal_ones_are_refused():
  params = compiled('peer')[0](jax.random.key(0)).params
  network_pairs.require_different(params)
  with pytest.raises(ValueError, match='would agree forever'):
    network_pairs.require_different({'first': params['first'], 'second': params['first']})


def test_plain_networks_learn_from_everything_and_not_from_each_other():
  init, step = compiled('ce')
  state = init(jax.random.key(0))
  other = init(jax.random.key(1))
  mixed = state.replace(params={'first': state.params['first'], 'second': other.params['second']})
  true = {'true': sources().true}
  (a, _), (b, _) = step(state, true, batch(1)), step(mixed, true, batch(1))
  jax.tree.map(np.testing.assert_array_equal, a.params['first'], b.params['first'])


def test_the_drop_rate_rises_by_epochs():
  kept = []
  state = compiled('co_teaching')[0](jax.random.key(0))
  for at in (0, 7, 8, 16):  # an epoch has 8 steps, the ramp 2 epochs
    own = state.replace(step=jnp.int32(at))
    kept.append(
      float(compiled('co_teaching')[1](own, {'true': sources().true}, batch(0))[1]['kept'])
    )
  assert kept == [1, 1, 8 / 16, 8 / 16]  # floor(0.55 * 16) = 8


@pytest.mark.exhaustive
def test_a_run_in_two_steps_starts_from_each_networks_best_classifier(tmp_path, monkeypatch):
  config = tiny_config(*BILINEAR, "runs=('peer',)", 'compared=False')
  plan, own = peer_learning.programs(config), network_pairs
  assert list(plan) == ['peer_classifier', 'peer']
  accuracies = iter([50.0, 10.0, 20.0, 30.0])  # first and second network, twice

  trained, kept = {}, own.keep_best

  def keep_best(state, keeps, accuracy):
    trained.setdefault('seen', []).append(jax.device_get(state.params))
    return kept(state, keeps, lambda variables: next(accuracies))

  monkeypatch.setattr(own, 'keep_best', keep_best)
  start = peer_learning.first_step(config, plan, 'peer', sources(), tmp_path)['start']
  middle, end = trained['seen']
  jax.tree.map(np.testing.assert_array_equal, start['params']['first'], middle['first'])
  jax.tree.map(np.testing.assert_array_equal, start['params']['second'], end['second'])
  # Features stayed as they were drawn; classifiers did not.
  drawn = jax.jit(plan['peer_classifier'].program.init)(jax.random.key(config.seed)).params
  for name in own.NAMES:
    np.testing.assert_array_equal(
      end[name]['conv1']['kernel'], np.asarray(drawn[name]['conv1']['kernel'])
    )
    assert np.any(end[name]['fc']['kernel'] != drawn[name]['fc']['kernel'])
    assert np.any(end[name]['fc']['kernel'] != middle[name]['fc']['kernel'])


def test_a_run_leaves_rows_of_all_methods_costs_and_a_picture(tmp_path):
  config = tiny_config("runs=('ce', 'peer')")
  found = launcher.launch(config, tmp_path)
  rows = {row['name']: row['metrics'] for row in found['rows']}
  assert list(rows) == ['CE', 'Peer-learning', 'All examples']
  assert set(rows['CE']) == {*network_pairs.METRICS}
  assert set(rows['Peer-learning']) == {*network_pairs.METRICS, 'operations'}
  assert 1.9 < rows['Peer-learning']['operations'] < 2.1
  right = 100 * np.mean(sources().given == sources().true)
  assert rows['All examples']['kept_correct'] == pytest.approx(right)
  # Plain networks keep everything.
  assert rows['CE']['kept_correct'] == pytest.approx(right)
  assert (tmp_path / 'accuracy_over_epochs.png').stat().st_size > 5000


def test_scores_are_of_both_networks_and_of_the_last_steps():
  history = [
    {'step': 4, 'disagreement': 0.9, 'kept': 0.9, 'kept_correct': 0.1},
    {'step': 8, 'test': 70.0, 'test_first': 75.0, 'test_second': 65.0},
    {'step': 12, 'disagreement': 0.2, 'kept': 0.5, 'kept_correct': 0.4},
    {'step': 16, 'disagreement': 0.4, 'kept': 0.3, 'kept_correct': 0.1},
    {'step': 16, 'test': 66.0, 'test_first': 66.0, 'test_second': 66.0},
  ]
  found = network_pairs.scores(history, 8)
  assert found == pytest.approx({
    'last': 66, 'best': 70, 'fall': 4, 'better': 75, 'disagreement': 30, 'kept_correct': 62.5,
  })  # fmt: skip
  none = network_pairs.scores([{**line, 'kept': 0.0} for line in history], 8)
  assert 'kept_correct' not in none


def test_accuracies_are_those_of_each_network(tmp_path, monkeypatch):
  config = tiny_config('recipe.epochs=2', 'recipe.eval_every=16')
  seen = []

  def accuracy(config, own, model, task, variables, source):
    seen.append(variables)
    return float(len(seen))

  monkeypatch.setattr(networks, 'accuracy', accuracy)
  run = peer_learning.programs(config)['peer']
  trained = network_pairs.train(config, run, sources(), tmp_path / 'peer')
  (line,) = [line for line in trained.history if 'test' in line]
  assert (line['test_first'], line['test_second'], line['test']) == (1, 2, 1.5)
  for name, variables in zip(network_pairs.NAMES, seen, strict=True):
    jax.tree.map(np.testing.assert_array_equal, variables['params'], trained.state.params[name])


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ('peer.drop_rate=1.0', r'drop_rate must be in \[0, 1\)'),
    ('peer.ramp_epochs=0', 'ramp_epochs must be at least 1'),
    ('peer.ramp_epochs=4', 'peer.ramp_epochs=4 exceeds recipe.epochs=3'),
    (
      "recipe.schedule={'name': 'shifted_cosine', 'base': 0.1, 'warmup_epochs': 4}",
      'warmup_epochs',
    ),
    ('peer.late_beta1=1.0', 'late_beta1=1.0'),
    ("runs=('peers',)", 'peers'),
    ('recipe.microbatches=2', 'recipe.microbatches: expected 1'),
    ('recipe.mixup=0.5', 'neither mixup nor cutmix'),
    ('recipe.eval_every=0', 'recipe.eval_every'),
  ],
)
def test_settings_that_cannot_be_are_refused(change, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny_config(change))


def test_a_later_beta1_is_of_adam():
  with pytest.raises(SettingsError, match=r'peer.late_beta1 is of adam'):
    launcher.check(tiny_config('peer.late_beta1=0.1', "recipe.optimizer={'name': 'sgd'}"))
