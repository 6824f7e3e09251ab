import functools
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from experiments import acsr, episode_files, episodes, launcher, networks, training
from experiments.tools import aot
from jaxlab import data, models, parallel
from jaxlab.data.protocols.few_shot import sample_episodes
from jaxlab.losses.stability import acsr_loss
from jaxlab.models.resnet import ResNet

CONFIGS = [path for path in launcher.settings('acsr') if path.stem[0] != '_']


def tiny(**changes):
  """The embedded setting with a network that compiles and trains in seconds."""
  config = launcher.load_config(launcher.CONFIGS / 'acsr' / 'embedded.py')
  with config.unlocked():
    config.network.backbone.model.update(stage_sizes=(1, 1), widths=(2, 4), stem_width=2)
    config.network.backbone.model.update(strides=(1, 2), conv='direct')
    config.network.backbone.update(epochs=1, batch_size=128)
    config.episodes.update(count=10, num_ways=3, num_queries=2, per_call=8)
    config.finetune.update(steps=2, base_batch=4, dropout=0.0, at_once=None)
    config.cosine_images, config.eval_batch_size, config.members = 8, 128, 2
    config.update(changes)
  return config


def one_device():
  return parallel.make_mesh(devices=jax.devices()[:1])


def fresh(backbone):
  """Initial variables for digits."""
  return dict(jax.jit(backbone.init)(jax.random.key(0), jnp.zeros((2, 8, 8, 1))))


@functools.cache
def setting(trained='last_stage'):
  """Initial variables, the pools of all digits, and eight drawn episodes, on one device."""
  config = tiny()
  config.finetune.trained = trained
  backbone, _ = episodes.network(config)
  variables = fresh(backbone)
  base, novel = (acsr.load_pool(config, part) for part in ('base', 'novel'))
  pools = episodes.make_pools(config, variables, base, novel, one_device())
  labels = acsr.source_labels(novel)
  drawn = sample_episodes(0, labels, 8, num_ways=3, num_queries=2)
  return variables, pools, drawn


@golden('acsr', 'ensemble')
def test_ensemble_agrees_with_reference(vectors):
  mean, predictions = acsr.ensemble(vectors['in_member_probabilities'])
  assert_close(mean, vectors['out_mean_probabilities'], 1e-9)
  np.testing.assert_array_equal(predictions, vectors['out_predictions'])


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_setting_builds_and_traces(path):
  config = launcher.load_config(path)
  acsr.check(config)
  own = networks.section(config, 'backbone')
  state = jax.eval_shape(networks.program(own).init, jax.random.key(0))
  assert state.params['linear']['kernel'].shape[-1] == own.model.num_classes
  # Steps trace with one block of each stage; the settings of 84 pixels share theirs.
  with config.unlocked():
    config.network.backbone.model.stage_sizes = (1, 1, 1)
  arguments = episodes.abstract(config, parallel.make_mesh())
  if path.stem not in ('cub', 'tiered_imagenet'):
    out = jax.eval_shape(episodes.finetune_all(config, True, parallel.make_mesh()), *arguments)
    ways = config.episodes.num_ways
    assert out['probabilities'].shape == (8, ways * config.episodes.num_queries, ways)
    assert out['cosine'].shape == (8,)


def test_the_programs_lower_for_a_mesh_of_all_devices():
  config = tiny(mesh={'data': -1, 'fsdp': 2, 'tensor': 1})
  lowered = aot.lower(config, training.mesh(config))
  assert set(lowered) == {'pretrain', 'finetune'}
  assert lowered['finetune'].out_info['probabilities'].shape == (8, 6, 3)


def test_resnet18_traces_with_its_last_stage_trained():
  config = launcher.load_config(launcher.CONFIGS / 'acsr' / 'mini_imagenet.py')
  launcher.override(config, ['network.backbone.model.name=resnet18', 'finetune.steps=2'])
  with config.unlocked():
    config.network.backbone.model.stage_sizes = (1, 1, 1, 1)
  mesh = parallel.make_mesh()
  out = jax.eval_shape(episodes.finetune_all(config, True, mesh), *episodes.abstract(config, mesh))
  assert out['cosine'].shape == (8,)


@pytest.mark.parametrize('with_base', [True, False])
def test_finetuning_follows_the_paper_step_by_step(with_base):
  # The same episode by a plain loop over the whole network from the images: cached activations, the order
  # in which the two passes move the running statistics, decay and momentum of trained parameters alone.
  config = tiny()
  config.finetune.steps = 3
  variables, pools, drawn = setting()
  assert pools.base.shape == (901, 8, 8, 2)  # what goes into the last stage
  task = {k: v[1] for k, v in episodes.make_tasks(drawn, 0.3, 2, 20)[1].items()}
  found = jax.jit(lambda t: episodes.finetune(config, with_base, variables, pools, t))(task)

  backbone, head = episodes.network(config)
  order = np.random.default_rng(config.seed).permutation(config.network.backbone.data.train_size)
  images = {
    part: np.asarray(episodes.view(config, data.materialize(acsr.load_pool(config, part))['image']))
    for part in ('base', 'novel')
  }
  images['base'] = images['base'][order]
  features = jax.jit(lambda v, x: backbone.apply(v, x))
  frozen = features(variables, images['base'])
  head_key, key = jax.random.split(jax.random.fold_in(jax.random.key(0), 1))
  key = jax.random.fold_in(key, 1)
  params = {
    'backbone': variables['params'],
    'head': head.init(head_key, jnp.zeros((1, frozen.shape[-1])))['params'],
  }
  stats, velocity = variables['batch_stats'], None

  def loss(params, stats, drawn):
    def run(stats, x):
      v = {'params': params['backbone'], 'batch_stats': stats}
      e, state = backbone.apply(v, x, {'block2', 'bn1'}, mutable=['batch_stats'])
      return e, state['batch_stats']

    e, stats = run(stats, images['novel'][task['support']])
    logits = head.apply({'params': params['head']}, e)
    held, other = run(stats, jnp.asarray(images['base'])[drawn])
    if not with_base:
      held, other = jax.lax.stop_gradient(frozen[drawn]), stats
    value, _ = acsr_loss(logits, task['support_labels'], held, frozen[drawn], beta=0.3)
    return value, other

  gradient = jax.jit(jax.grad(loss, has_aux=True))
  for step in range(3):
    keys = jax.random.split(jax.random.fold_in(key, step), 4)
    index = jax.random.randint(keys[1], (4,), 10, 20)
    g, stats = gradient(params, stats, index)
    g = jax.tree.map(lambda g, p: g + 1e-4 * p, g, params)
    velocity = g if velocity is None else jax.tree.map(lambda v, g: 0.9 * v + g, velocity, g)
    moved = jax.tree.map(lambda p, v: p - 0.1 * v, params, velocity)
    for stage in ('block2', 'bn1'):
      params['backbone'] = {**params['backbone'], stage: moved['backbone'][stage]}
    params['head'] = moved['head']
  final = {'params': params['backbone'], 'batch_stats': stats}
  logits = head.apply({'params': params['head']}, features(final, images['novel'][task['query']]))
  assert_close(found['probabilities'], jax.nn.softmax(logits), 1e-4)
  assert float(found['cosine']) < 0.9999


def test_tasks_side_by_side_and_on_eight_devices_are_those_one_after_the_other():
  config = tiny()
  config.finetune.dropout = 0.5
  variables, pools, drawn = setting()
  tasks = episodes.make_tasks(drawn, 0.1, 1, config.network.backbone.data.train_size)[0]
  expected = episodes.finetune_all(config, True, one_device())(variables, pools, tasks)
  assert np.ptp(expected['cosine']) > 1e-4
  with config.unlocked():
    config.finetune.at_once = 4
  actual = episodes.finetune_all(config, True, one_device())(variables, pools, tasks)
  assert_close(actual['probabilities'], expected['probabilities'], 1e-4)
  with config.unlocked():
    config.finetune.at_once = None
  mesh = parallel.make_mesh(data=4, fsdp=2)
  pools = jax.device_put(jax.device_get(pools), parallel.replicated(mesh))
  actual = episodes.finetune_all(config, True, mesh)(variables, pools, tasks)
  for name, value in expected.items():
    assert_close(actual[name], value, 1e-5)


def test_the_choice_of_what_is_trained_decides_what_moves():
  for choice, activations in (('classifier', (4, 4, 4)), ('all', (8, 8, 1))):
    config = tiny()
    config.finetune.trained = choice
    variables, pools, tasks = episodes.abstract(config, one_device())
    assert pools.base.shape == (901, *activations)
    tune = episodes.finetune_all(config, True, one_device())
    assert jax.eval_shape(tune, variables, pools, tasks)['cosine'].shape == (1,)
  backbone, _ = episodes.network(config)
  assert episodes.adaptation(config, backbone).mode == backbone.stages
  config.finetune.trained = 'classifier'
  variables, pools, drawn = setting('classifier')
  task = {k: v[0] for k, v in episodes.make_tasks(drawn, 0.1, 1, 901)[0].items()}
  found = jax.jit(lambda t: episodes.finetune(config, True, variables, pools, t))(task)
  assert float(found['cosine']) > 1 - 1e-6


def test_frozen_stages_of_a_resnet_stay_in_eval_mode():
  config = tiny()
  backbone = ResNet((1, 1), width=2, strides=(1, 2), stem='cifar')
  adapt = episodes.adaptation(config, backbone)
  assert adapt.patterns == ('head/.*', r'backbone/layer2_\d+/.*') and adapt.start is None
  x = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
  variables = fresh(backbone)
  _, state = models.apply(
    backbone, variables, x, adapt.mode, hooks=adapt.hooks, mutable=['batch_stats']
  )
  moved = jax.tree.map(
    lambda a, b: not np.array_equal(a, b), state['batch_stats'], variables['batch_stats']
  )
  assert all(jax.tree.leaves(moved.pop('layer2_0'))) and not any(jax.tree.leaves(moved))


def test_members_draw_from_disjoint_parts_of_the_base_images():
  drawn = sample_episodes(0, np.arange(40) % 4, 3, num_ways=2, num_queries=1)
  parts = [(int(t['low'][0]), int(t['high'][0])) for t in episodes.make_tasks(drawn, 0.1, 4, 11)]
  assert parts == [(0, 2), (2, 4), (4, 6), (6, 11)]
  with pytest.raises(ValueError, match='members=12 exceeds the 11 base images'):
    episodes.make_tasks(drawn, 0.1, 12, 11)


def test_a_pool_of_drawn_images_alone_holds_the_same_episodes():
  source = data.InMemory(
    {'image': np.arange(60, dtype=np.uint8).reshape(60, 1, 1, 1), 'label': np.arange(60) % 4}
  )
  drawn = sample_episodes(0, source.arrays['label'], 2, num_ways=2, num_queries=3)
  fewer, moved = episodes.only_drawn(source, drawn)
  assert len(fewer) < len(source)
  for name in ('support', 'query'):
    np.testing.assert_array_equal(
      fewer.arrays['image'][getattr(moved, name)], source.arrays['image'][getattr(drawn, name)]
    )


def test_a_run_leaves_rows_claims_and_picture_and_goes_on_where_it_was(tmp_path, monkeypatch):
  config = tiny()
  found = launcher.launch(acsr.run, config, tmp_path)
  rows = {item['name']: item['metrics'] for item in found['rows']}
  assert list(rows) == ['plain', 'beta 0', 'SR 0.1', 'SR 0.5', 'EnSR 0.1 members', 'EnSR 0.1']
  for metrics in rows.values():
    assert 0 <= metrics['acc_1'] <= metrics['acc_10'] <= metrics['acc_mean'] <= 100
    assert metrics['drift'] == pytest.approx(1 - metrics['cosine'])
  assert rows['beta 0']['drift_ratio'] == 1
  assert len(found['claims']) == len(config.claims)
  assert (tmp_path / 'episode_accuracies.png').exists()
  assert json.loads((tmp_path / 'results.json').read_text())['rows'] == found['rows']

  # Half of one arm is lost: it alone is done again, to the same numbers.
  lost = tmp_path / 'episodes' / 'SR_0.1.npz'
  held = dict(np.load(lost))
  assert len(held['cosine']) == 10
  np.savez(lost, **{name: a[:2] if a.ndim else a for name, a in held.items()})
  calls = []
  whole = episodes.finetune_all

  def counted(*args):
    compiled = whole(*args)
    return lambda variables, pools, tasks: (
      calls.append(len(tasks['episode'])) or compiled(variables, pools, tasks)
    )

  monkeypatch.setattr(episodes, 'finetune_all', counted)
  again = launcher.launch(acsr.run, config, tmp_path)
  assert calls == [8]
  assert again['rows'] == found['rows']


def test_files_of_other_episodes_are_refused_and_damaged_ones_written_anew(tmp_path):
  file, config = tmp_path / 'plain.npz', tiny()
  settings = episode_files.fingerprint(config)
  assert episode_files.read_done(file, settings) == {}
  np.savez(file, settings=settings, cosine=np.ones(3))
  assert list(episode_files.read_done(file, settings)) == ['cosine']
  config.finetune.steps = 3
  with pytest.raises(ValueError, match=r'(?s)plain\.npz holds .*finetune\.steps: 2 there, 3 given'):
    episode_files.read_done(file, episode_files.fingerprint(config))
  for content in (file.read_bytes()[:300], b''):
    file.write_bytes(content)
    with pytest.warns(UserWarning, match='cannot be read'):
      assert episode_files.read_done(file, settings) == {}


@pytest.mark.parametrize('queries', [74, 75, 76])
def test_the_histogram_counts_every_accuracy(queries):
  bins = acsr.accuracy_bins(queries)
  shown, _ = np.histogram(100 * np.arange(queries + 1) / queries, bins)
  assert shown.sum() == queries + 1 and set(shown) <= {1, 2}


@pytest.mark.parametrize(
  'key, value, message',
  [
    ('finetune.trained', 'head', "finetune.trained='head': expected"),
    ('finetune.steps', 0, 'must be at least 1'),
    ('betas', (-0.1,), 'different numbers >= 0'),
    ('betas', (0.1, 0.1), 'different numbers >= 0'),
    ('ensemble_betas', (None,), 'different numbers >= 0'),
    ('cosine_images', 1000, 'cosine_images=1000: expected 1 to 901'),
    ('members', 902, 'members=902 exceeds'),
    ('pictured', ('nix',), "there is no row 'nix'"),
    ('episodes.num_ways', 6, 'num_ways is 6'),
    ('episodes.num_queries', 400, 'fewer than num_shots 1'),
    ('network.backbone.data.train_size', 900, 'train_size=901'),
    ('network.backbone.model.num_classes', 4, 'labels are out of range'),
    ('network.backbone.checkpoint', 'weights.pth', 'neither .safetensors nor .npz'),
  ],
)
def test_wrong_settings_are_refused_before_training(tmp_path, key, value, message):
  config = tiny()
  with config.unlocked():
    *parents, name = key.split('.')
    target = config
    for parent in parents:
      target = target[parent]
    target[name] = value
  with pytest.raises(ValueError, match=message):
    acsr.run(config, tmp_path)
  assert not (tmp_path / 'backbone').exists()


def test_a_published_checkpoint_is_read_without_its_classifier(tmp_path):
  config = tiny()
  backbone, _ = episodes.network(config)
  variables = fresh(backbone)
  weights = {f'module.{name}': value for name, value in models.to_torch(variables).items()}
  weights |= {'module.linear.L.weight_v': np.zeros((5, 4), np.float32)}
  np.savez(tmp_path / 'weights.npz', **weights)
  config.network.backbone.checkpoint = str(tmp_path / 'weights.npz')
  loaded = acsr.pretrain(config, acsr.load_pool(config, 'base'), tmp_path)
  for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(variables), strict=True):
    np.testing.assert_array_equal(a, b)


def test_an_unsupported_backbone_is_refused():
  with pytest.raises(ValueError, match='must be a WideResNet or a ResNet, got ViT'):
    episodes.adaptation(tiny(), models.create('vit_tiny_patch16_224'))


def test_the_experiment_is_listed(capsys):
  importlib.import_module('experiments.__main__').main([])
  assert 'acsr  ' in capsys.readouterr().out
