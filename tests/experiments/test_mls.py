import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from experiments import mls
from experiments.harness import data as harness_data
from experiments.harness import launcher, runs
from experiments.harness.settings import SettingsError
from experiments.protocols import pretraining, siamese, siamese_methods
from jaxlab import losses, parallel
from jaxlab.training import Out, step_keys

TINY = (
  "model={'name': 'vgg11_bn', 'stage_sizes': (1,), 'widths': (6,), 'hidden': None}",
  "heads={'hidden': 8, 'features': 4}",
  'target.queue_size=32',
  "losses={'mls': {'k': 3, 'warmup': 0.25}, 'early': {'k': 2, 'warmup': 0.0, 'info_nce': False}}",
  "data={'name': 'digit_canvases', 'train_size': 64, 'train_options': {'length': 64}}",
  'data.test_options={"length": 16}',
  'recipe.batch_size=16',
  'recipe.epochs=1',
  'eval.k=3',
  'eval.bank=32',
  'eval.steps=5',
  'claims=()',
  'pictured=()',
)


def tiny_config(*changes):
  """Returns the embedded setting with a network that compiles in seconds; 4 steps."""
  return launcher.load('mls', 'embedded', [*TINY, *changes])


def random_batch(seed):
  rng = np.random.default_rng(seed)
  image = jnp.asarray(rng.integers(0, 256, (16, 36, 36, 1), np.uint8))
  labels = jnp.asarray(rng.random((16, 10)) < 0.2, jnp.float32)
  return {
    'image': image,
    'index': jnp.asarray(rng.permutation(64)[:16], jnp.int32),
    'multi_label': labels,
  }


@functools.cache
def compiled(name):
  """Returns the compiled functions of a program."""
  program = mls.programs(tiny_config())[name].program
  return jax.jit(program.init), jax.jit(program.step)


@functools.cache
def steps(name):
  """Returns the states before and behind each of the 4 steps of a program, and their metrics."""
  init, step = compiled(name)
  states, metrics = [init(jax.random.key(0))], []
  for seed in range(4):
    state, found = step(states[-1], {}, random_batch(seed))
    states.append(state)
    metrics.append(jax.device_get(found))
  return states, metrics


def arrays(state):
  return jax.device_get({'params': state.params, 'stats': state.model_state, 'extra': state.extra})


@functools.cache
def features():
  """Returns `(backbone's variables, state, batch, view) -> features` in train mode of a step's view."""
  config = tiny_config()
  nets, _ = mls.method(config)
  draw = pretraining.two_views(config)

  @functools.partial(jax.jit, static_argnames='view')
  def apply(variables, state, batch, view):
    keys = step_keys(state)['views']
    each = jax.vmap(lambda i: jax.random.fold_in(keys, i))(batch['index'])
    image = draw(each, batch['image'])[view]
    return nets.encoder.backbone.apply(variables, image, train=True, mutable=['batch_stats'])[0]

  return apply


def features_of(state, batch):
  """Returns the trained backbone's features of the first views."""
  stats = state.model_state['batch_stats']['encoder']['backbone']
  variables = {'params': state.params['encoder']['backbone'], 'batch_stats': stats}
  return np.asarray(features()(variables, state, batch, 0), np.float64)


def keys_of(state, batch):
  """Returns the momentum backbone's features of the second views."""
  target = state.extra['target']
  variables = {kind: target[kind]['backbone'] for kind in ('params', 'batch_stats')}
  return np.asarray(features()(variables, state, batch, 1), np.float64)


@golden('mls', 'mls_loss')
def test_the_loss_agrees_with_the_reference(vectors):
  temperature, weight = vectors.param('temperature'), vectors.param('lambda')
  own = mls.MultiLabel(k=int(vectors.param('k')), weight=float(weight))
  queues = vectors['in_queue_g'].T, vectors['in_queue_z'].T

  def loss(g, z):
    value, labels = mls.multi_label_loss(own, g, z, *queues, temperature)
    query, key = losses.normalize(z), vectors['in_key_z2_normalized']
    return losses.info_nce_queue(query, key, queues[1], temperature)[0] + own.weight * value, labels

  grad = jax.value_and_grad(loss, (0, 1), has_aux=True)
  (value, labels), (to_features, to_projections) = grad(vectors['in_g1'], vectors['in_z1'])
  np.testing.assert_array_equal(labels, vectors['out_pseudo_labels'])
  assert_close(value, vectors['out_total'], 2e-6)
  assert_close(to_projections, vectors['grad_z1_total'], 5e-6)
  assert not np.any(to_features)  # pseudo-labels carry no gradient


@pytest.mark.exhaustive
def test_dictionaries_are_chosen_for_labels_and_for_logits():
  rng = np.random.default_rng(0)
  g, z, queue_g, queue_z = (rng.normal(size=s) for s in ((3, 5), (3, 4), (5, 7), (4, 7)))
  views, cosines = {'features': (g, queue_g), 'projections': (z, queue_z)}, {}
  for name, (view, queue) in views.items():
    cosines[name] = view / np.linalg.norm(view, axis=1, keepdims=True) @ queue
  for labels_from in views:
    best = np.argsort(-cosines[labels_from], axis=1)[:, :2]
    y = np.zeros((3, 7))
    np.put_along_axis(y, best, 1, 1)
    for logits_from in views:
      x = cosines[logits_from] / 0.5
      terms = {
        'bce': y * np.log1p(np.exp(-x)) + (1 - y) * np.log1p(np.exp(x)),
        'positives': y * np.log1p(np.exp(-x)),
      }
      for kind, expected in terms.items():
        own = mls.MultiLabel(k=2, loss=kind, labels_from=labels_from, logits_from=logits_from)
        found, labels = mls.multi_label_loss(own, g, z, queue_g, queue_z, 0.5)
        np.testing.assert_array_equal(labels, y)
        assert_close(found, expected.mean(), 1e-5)
      own = mls.MultiLabel(k=2, loss='neighbors', labels_from=labels_from, logits_from=logits_from)
      others = (np.exp(x) * (1 - y)).sum(1, keepdims=True)
      expected = (y * (np.log(np.exp(x) + others) - x)).sum(1) / 2
      found, _ = mls.multi_label_loss(own, g, z, queue_g, queue_z, 0.5)
      assert_close(found, expected.mean(), 1e-5)


def test_infonce_trains_alone_in_the_warm_up():
  for step, metrics in enumerate(steps('mls')[1]):  # the warm-up is a quarter of 4 steps
    more = 0.5 * metrics['multi_label'] if step >= 1 else 0
    assert_close(metrics['loss'], metrics['info_nce'] + more, 1e-6)
  pairs = list(zip(steps('moco')[0], steps('mls')[0], strict=True))
  for step, same in ((1, True), (2, False)):
    a, b = (jax.tree.leaves(state.params) for state in pairs[step])
    assert all(map(np.array_equal, a, b)) is same


def test_dictionaries_hold_what_the_momentum_encoder_says_of_earlier_images():
  states, _ = steps('mls')
  for step in range(4):
    before, after, batch = states[step].extra, states[step + 1].extra, random_batch(step)
    columns = (16 * step + np.arange(16)) % 32
    assert int(after['queue_pointer']) == 16 * (step + 1) % 32
    np.testing.assert_array_equal(after['origin']['index'][0, columns], batch['index'])
    np.testing.assert_array_equal(after['origin']['labels'][:, columns], batch['multi_label'].T)
    kept = np.setdiff1d(np.arange(32), columns)
    for name in ('queue', 'feature_queue'):
      np.testing.assert_array_equal(after[name][:, kept], before[name][:, kept])
      np.testing.assert_allclose(np.linalg.norm(after[name], axis=0), 1, rtol=1e-5)
    # Entries belong together: the momentum encoder's projector turns features into projections.
    head = jax.tree.map(np.float64, before['target']['params']['projector'])
    found = keys_of(states[step], batch)
    hidden = np.maximum(found @ head['fc0']['kernel'] + head['fc0']['bias'], 0)
    projections = hidden @ head['fc1']['kernel'] + head['fc1']['bias']
    for name, expected in (('feature_queue', found), ('queue', projections)):
      unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
      np.testing.assert_allclose(after[name][:, columns].T, unit, rtol=1e-4, atol=1e-5)
  assert set(np.asarray(states[1].extra['origin']['index'])[0, 16:]) == {-1}


def test_precision_is_of_what_a_view_retrieves_from_the_old_dictionary():
  states, metrics = steps('mls')
  for step in (2, 3):
    extra, batch = states[step].extra, random_batch(step)
    cosines = features_of(states[step], batch) @ np.asarray(extra['feature_queue'], np.float64)
    nearest = np.argsort(-cosines, axis=1)[:, :3]
    bank, own = np.asarray(extra['origin']['labels']).T, np.asarray(batch['multi_label'])
    shared = [(bank[row] * own[i]).any(1).mean() for i, row in enumerate(nearest)]
    assert_close(metrics[step]['queue_precision'], np.mean(shared), 1e-6)


@pytest.mark.exhaustive
def test_without_pseudo_positives_it_is_moco_v2():
  config = tiny_config()
  nets, targets = siamese_methods.method(
    'moco', config.model, config.heads, config.target, pretraining.length(config)
  )

  def loss(params, state, views, keys):
    seen = targets.see(nets.encoder, state.extra, views, keys['order'], state.step)
    stats = state.model_state['batch_stats']
    online = siamese.online_pass(nets, params, stats, seen.views)
    value = seen.loss(online.predictions, seen.targets)
    return value, Out({'batch_stats': online.batch_stats}, seen.extra, {})

  images = jnp.zeros((2, 36, 36, 1))
  init = siamese.init(nets, targets, images)
  own = pretraining.training(config, 'plain', init, loss, after=targets.after).program
  state, step = jax.jit(own.init)(jax.random.key(0)), jax.jit(own.step)
  for seed, metrics in enumerate(steps('moco')[1]):
    state, found = step(state, {}, {k: random_batch(seed)[k] for k in ('image', 'index')})
    assert_close(metrics['loss'], found['loss'], 1e-6)
  last = steps('moco')[0][-1]
  assert_close(last.extra['queue'], state.extra['queue'], 1e-5)
  for a, b in zip(*map(jax.tree.leaves, (last.params, state.params)), strict=True):
    assert_close(a, b, 1e-5)


@pytest.mark.exhaustive
def test_dictionaries_are_the_same_on_one_and_on_eight_devices():
  program = mls.programs(tiny_config())['mls'].program
  mesh = parallel.make_mesh(data=2, fsdp=4, devices=jax.devices()[:8])
  sharded = parallel.shard_program(program, mesh, fsdp_min_size=64)
  state = sharded.init(jax.random.key(0))
  for seed in range(2):
    batch = jax.device_put(random_batch(seed), parallel.batch_sharding(mesh))
    state, metrics = sharded.step(state, {}, batch)
  states, expected = steps('mls')
  found = jax.device_get(metrics), arrays(state)
  for a, b in zip(*map(jax.tree.leaves, (found, (expected[1], arrays(states[2])))), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * np.max(np.abs(b)) + 1e-6)
  origin = states[2].extra['origin']
  np.testing.assert_array_equal(state.extra['origin']['index'], origin['index'])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (("losses={'mls': {'k': 33}}",), 'losses.mls.k=33: expected at most target.queue_size=32'),
    (("losses={'mls': {'k': 32, 'loss': 'neighbors'}}",), 'one that is no neighbor'),
    (("losses={'mls': {'k': 0}}",), 'losses.mls.k=0'),
    (("losses={'mls': {'warmup': 1.0}}",), 'losses.mls.warmup=1.0'),
    (("losses={'mls': {'weight': 0.0}}",), 'losses.mls.weight=0.0'),
    (("losses={'moco': {}}",), "'moco' is the name"),
    (("losses={'mls': {'title': 'MoCo v2'}}",), 'titles that differ'),
    (("losses={'mls': {'labels_from': 'both'}}",), 'labels_from'),
    (('runs=mls,late',), 'late'),
    (('target.queue_size=40',), 'target.queue_size=40: expected a multiple of'),
    (('target.temperature=0',), 'temperature=0'),
    (('recipe.microbatches=2',), 'recipe.microbatches: expected 1'),
    (('eval.k=33',), 'eval.k=33|eval.bank|k=33'),
    (('eval.bank=65',), 'eval.bank=65: expected at most 64'),
    (('eval.steps=0',), 'eval.steps=0'),
    (('data.multi_label=False',), 'data.multi_label=False'),
  ],
)
def test_impossible_settings_are_named(changes, message):
  with pytest.raises(SettingsError, match=message):
    launcher.check(tiny_config(*changes))


def test_a_run_compares_rows_and_goes_on_with_its_dictionaries(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(mls, 'SHOWN', 2)  # axes take seconds to draw
  monkeypatch.setattr(pretraining, 'COLLAPSED', 1.1)
  config = tiny_config('log_every=1', 'runs=early,', 'pictured=MoCo v2,early')
  launcher.check(config)
  seen, draw = [], mls.draw_neighbors
  monkeypatch.setattr(mls, 'draw_neighbors', lambda *args: seen.append(args[3]) or draw(*args))
  found = mls.run(config, tmp_path)
  assert [row['name'] for row in found['rows']] == ['untrained', 'MoCo v2', 'early']
  said = capsys.readouterr().out
  assert 'MoCo v2 has collapsed' in said and 'early has collapsed' in said
  for row in found['rows']:
    assert all(0 <= row['metrics'][name] <= 100 for name in ('mAP', 'precision'))
  for name in ('retrieved_early', 'retrieved_moco', 'curves'):
    assert (tmp_path / f'{name}.png').stat().st_size > 1000
  # What was saved holds the dictionaries, and says of which images their entries are.
  source = harness_data.load(config.data, 'train')
  again = runs.train(mls.programs(config)['early'], source, tmp_path / 'early')
  for a, b in zip(*map(jax.tree.leaves, (again.state.extra, seen[1])), strict=True):
    np.testing.assert_array_equal(a, b)
  origin = jax.device_get(again.state.extra['origin'])
  np.testing.assert_array_equal(
    origin['labels'].T, source.arrays['multi_label'][origin['index'][0]]
  )
  for line in again.history:  # no warm-up, and no InfoNCE
    assert_close(line['loss'], 0.5 * line['multi_label'], 1e-5)
