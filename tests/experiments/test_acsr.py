import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from few_shot_settings import given, tiny
from golden_vectors import assert_close

from experiments import acsr
from experiments.harness import launcher
from experiments.harness.settings import SettingsError
from experiments.protocols import episode_results, episodes, few_shot_data
from jaxlab import data, parallel
from jaxlab.losses.stability import acsr_loss


@pytest.mark.parametrize(
  'setting', tables.few(['embedded', 'mini_imagenet', 'cifar_fs'], 'cifar_fs')
)
def test_fine_tuning_traces_in_every_setting(setting):
  # With one block of each stage; the settings of 84 pixels share theirs.
  config = launcher.load('acsr', setting, ['model.stage_sizes=(1, 1, 1)'])
  function, arguments = acsr.programs(config)['SR'].make(parallel.make_mesh())
  out = jax.eval_shape(function, *arguments)
  ways = config.episodes.num_ways
  assert out['probabilities'].shape == (8, ways * config.episodes.num_queries, ways)
  assert out['cosine'].shape == (8,)


def test_resnet18_traces_with_its_last_stage_trained():
  own = ['model.name=resnet18', 'model.stage_sizes=(1, 1, 1, 1)', 'fine_tuning.steps=2']
  config = launcher.load('acsr', 'mini_imagenet', own)
  launcher.check(config)
  function, arguments = acsr.programs(config)['SR'].make(parallel.make_mesh())
  assert jax.eval_shape(function, *arguments)['cosine'].shape == (8,)


@pytest.mark.exhaustive
def test_the_programs_lower_for_a_mesh_of_all_devices():
  config = tiny(mesh__fsdp=2)
  mesh = config.mesh.make()
  lowered = {name: own.lower(mesh) for name, own in acsr.programs(config).items()}
  assert set(lowered) == {'backbone', 'plain', 'SR'}
  assert lowered['SR'].out_info['probabilities'].shape == (8, 6, 3)
  assert set(acsr.programs(tiny(checkpoint='weights.npz'))) == {'plain', 'SR'}


@pytest.mark.parametrize('name', tables.few(['plain', 'SR'], 'SR'))
def test_finetuning_follows_the_paper_step_by_step(name):
  # The same episode by a plain loop over the whole network from the images: cached activations, the order
  # in which the two passes move the running statistics, decay and momentum of trained parameters alone.
  config = tiny(fine_tuning__steps=3)
  method = acsr.methods(config)[name]
  variables, pools, sources, drawn = given()
  assert pools.base.shape == (901, 8, 8, 2)  # what goes into the last stage
  tasks = episodes.tasks(drawn, (10, 20), 1, {'beta': 0.3})
  task = jax.tree.map(lambda values: values[1], tasks)
  found = jax.jit(functools.partial(episodes.fine_tune, config, method))(variables, pools, task)

  backbone, head = config.backbone, method.head
  order = np.random.default_rng(config.seed).permutation(config.data.train_size)
  images = {
    part: np.asarray(episodes.view(config, data.materialize(getattr(sources, part))['image']))
    for part in ('base', 'novel')
  }
  images['base'] = images['base'][order]
  features = jax.jit(lambda v, x: backbone.apply(v, x))
  frozen = features(variables, images['base'])
  head_key, key = jax.random.split(jax.random.fold_in(jax.random.key(0), 1))
  key = jax.random.fold_in(key, 1)
  params = {
    'backbone': variables['params'],
    'head': jax.jit(head.init)(head_key, jnp.zeros((1, frozen.shape[-1])))['params'],
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
    if name == 'plain':
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
  logits = jax.jit(head.apply)(
    {'params': params['head']}, features(final, images['novel'][task['query']])
  )
  assert_close(found['probabilities'], jax.nn.softmax(logits), 1e-4)
  assert float(found['cosine']) < 0.9999


def test_members_draw_from_disjoint_parts_of_the_base_images():
  assert acsr.parts(11, 4) == [(0, 2), (2, 4), (4, 6), (6, 11)]
  assert acsr.parts(11, 1) == [(0, 11)]
  with pytest.raises(ValueError, match=r'expected 1 to 11, .*; got 12'):
    acsr.parts(11, 12)


def test_a_run_leaves_rows_claims_and_picture_and_goes_on_where_it_was(tmp_path, capsys):
  config = tiny()
  found = launcher.launch(config, tmp_path)
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
  (tmp_path / 'results.json').unlink()
  capsys.readouterr()
  again = launcher.launch(config, tmp_path)
  lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith('episodes')]
  assert lines == ['SR 0.1: 10 of 10 episodes']
  assert again['rows'] == found['rows']


def test_all_wrong_settings_are_told_at_once_by_the_names_of_their_keys():
  config = tiny(
    fine_tuning__steps=0, fine_tuning__learning_rate=0.0, episodes__count=0, episodes__num_ways=6,
    betas=(-0.1,), ensemble_betas=(0.1, 0.1), base__judged=1000, members=902, pictured=['nix'],
    eval_batch_size=100, recipe__batch_size=1000, checkpoint='weights.pth', smoothing=2,
  )  # fmt: skip
  with pytest.raises(SettingsError) as caught:
    launcher.check(config)
  for text in (
    'fine_tuning.steps=0', 'fine_tuning.learning_rate=0.0', 'episodes.count=0', 'episodes.num_ways=6',
    'betas=(-0.1,): expected different numbers >= 0', 'ensemble_betas=(0.1, 0.1)',
    'base.judged=1000: expected 1 to 901', 'members: expected 1 to 901', "there is no row 'nix'",
    'eval_batch_size=100 does not divide', 'recipe.batch_size=1000 exceeds',
    'neither .safetensors nor .npz', 'smoothing=2',
  ):  # fmt: skip
    assert text in str(caught.value), text


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'fine_tuning__trained': 'head'}, "one of 'classifier', 'last_stage', 'all'"),
    ({'ensemble_betas': (None,)}, r'ensemble_betas=\(None,\): expected tuple'),
    ({'betas': (), 'ensemble_betas': ()}, 'betas and ensemble_betas are empty'),
    ({'model__dropout': 2}, 'model: .*dropout'),
    ({'model__name': 'vit_tiny_patch2_8'}, 'model: '),
    ({'data__image_size': 4}, "augment.kind='none': expected 'resized_crop'"),
    ({'data__image_size': 9}, r'data.image_size=9: expected at most the side of \(8, 8, 1\)'),
    ({'recipe__schedule__warmup_epochs': 3}, 'recipe.schedule: '),
    ({'episodes__num_queries': 400}, 'fewer than num_shots 1'),
    ({'data__train_size': 900}, 'train_size=901'),
    ({'data__num_classes': 4}, 'labels are out of range'),
  ],
)
def test_wrong_settings_are_refused_before_training(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    launcher.launch(tiny(**changes), tmp_path)
  assert not (tmp_path / 'backbone').exists()


def test_an_ensemble_is_the_mean_of_its_members(tmp_path, monkeypatch):
  config = tiny(betas=(), ensemble_betas=(0.1,))
  rng = np.random.default_rng(0)
  member = [rng.dirichlet(np.ones(3), (10, 6)) for _ in range(2)]
  seen = []

  def fine_tune(self, title, name, numbers, *, member, rows):
    seen.append((title, name, numbers, member, rows))
    return {'probabilities': answers[member], 'cosine': np.full(10, 0.5 + member / 4)}

  answers = dict(enumerate(member))
  monkeypatch.setattr(episode_results.Comparison, 'fine_tune', fine_tune)
  found = acsr.run(config, tmp_path)
  assert seen == [
    ('EnSR 0.1, network 1', 'SR', {'beta': 0.1}, 0, (0, 450)),
    ('EnSR 0.1, network 2', 'SR', {'beta': 0.1}, 1, (450, 901)),
  ]
  _, drawn = episodes.draw(config, few_shot_data.load(config.data).novel)
  right = np.mean(member, 0).argmax(-1) == drawn.query_labels
  metrics = {row['name']: row['metrics'] for row in found['rows']}
  assert metrics['EnSR 0.1']['acc_mean'] == pytest.approx(100 * right.mean())
  single = np.mean([(m.argmax(-1) == drawn.query_labels).mean() for m in member])
  assert metrics['EnSR 0.1 members']['acc_mean'] == pytest.approx(100 * single)
  assert metrics['EnSR 0.1']['cosine'] == pytest.approx(0.625)
