import dataclasses
import functools
import types

import jax
import numpy as np
import pytest
from few_shot_settings import compiled, fresh, given, one_device, tiny
from golden_vectors import assert_close

from experiments import acsr
from experiments.protocols import episode_results, episodes, partial_tuning
from jaxlab import data, models, parallel
from jaxlab.models.resnet import ResNet


@pytest.mark.exhaustive
def test_tasks_side_by_side_and_on_eight_devices_are_those_one_after_the_other():
  config = tiny(fine_tuning__dropout=0.5)
  method = acsr.methods(config)['SR']
  variables, pools, _, drawn = given()
  tasks = episodes.tasks(drawn, (0, config.num_base), numbers={'beta': 0.1})
  expected = compiled(config, method, one_device())(variables, pools, tasks)
  assert np.ptp(expected['cosine']) > 1e-4
  four = tiny(fine_tuning__dropout=0.5, fine_tuning__at_once=4)
  actual = compiled(four, method, one_device())(variables, pools, tasks)
  assert_close(actual['probabilities'], expected['probabilities'], 1e-4)
  actual = compiled(config, method, parallel.make_mesh(data=4, fsdp=2))(variables, pools, tasks)
  for name, value in expected.items():
    assert_close(actual[name], value, 1e-5)


def test_support_images_are_augmented_anew_in_every_step_and_episode():
  flipped = {'fine_tuning.augment.kind': 'resized_crop', 'fine_tuning.augment.scale': (0.5, 1.0)}
  plain, config = tiny(), tiny(**flipped)
  variables, _, sources, drawn = given()
  pools = episodes.make_pools(config, variables, sources)
  assert pools.base.shape == (901, 8, 8, 1)  # nothing can be computed before
  tasks = episodes.tasks(drawn._replace(support=drawn.support[:1].repeat(8, 0)), (0, 901))
  tasks['query'][:] = tasks['query'][0]
  tune = compiled(config, acsr.methods(config)['plain'], parallel.make_mesh())
  found = np.asarray(tune(variables, pools, tasks)['probabilities'])
  assert np.ptp(found, axis=0).max() > 1e-4  # the same images in all episodes
  tune = compiled(plain, acsr.methods(plain)['plain'], parallel.make_mesh())
  found = np.asarray(tune(variables, given()[1], tasks)['probabilities'])
  assert np.ptp(found, axis=0).max() < 1e-5


@pytest.mark.exhaustive
def test_the_choice_of_what_is_trained_decides_what_moves():
  for choice, activations in (('classifier', (4, 4, 4)), ('all', (8, 8, 1))):
    config = tiny(fine_tuning__trained=choice)
    call = episodes.program(config, acsr.methods(config)['SR'])
    function, (variables, pools, tasks) = call.make(one_device())
    assert pools.base.shape == (901, *activations)
    assert jax.eval_shape(function, variables, pools, tasks)['cosine'].shape == (1,)
  assert config.part.mode == config.backbone.stages
  config = tiny(fine_tuning__trained='classifier')
  variables, pools, _, drawn = given('classifier')
  tasks = episodes.tasks(drawn, (0, 901), numbers={'beta': 0.1})
  found = compiled(config, acsr.methods(config)['SR'], one_device())(variables, pools, tasks)
  assert float(found['cosine'].min()) > 1 - 1e-6


@pytest.mark.exhaustive
def test_frozen_stages_of_a_resnet_stay_in_eval_mode():
  backbone = ResNet((1, 1), width=2, strides=(1, 2), stem='cifar')
  part = partial_tuning.part(backbone, 'last_stage')
  assert part.patterns == ('head/.*', r'backbone/layer2_\d+/.*') and part.start is None
  x = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
  variables = fresh(backbone)
  _, state = models.apply(
    backbone, variables, x, part.mode, hooks=part.hooks, mutable=['batch_stats']
  )
  moved = jax.tree.map(
    lambda a, b: not np.array_equal(a, b), state['batch_stats'], variables['batch_stats']
  )
  assert all(jax.tree.leaves(moved.pop('layer2_0'))) and not any(jax.tree.leaves(moved))


def test_an_unsupported_backbone_is_refused():
  with pytest.raises(ValueError, match='expected a WideResNet or a ResNet, got ViT'):
    partial_tuning.part(models.create('vit_tiny_patch16_224'), 'all')


def test_a_pool_of_drawn_images_alone_holds_the_same_episodes():
  config = tiny(episodes__count=2)
  source = data.InMemory(
    {'image': np.arange(60, dtype=np.uint8).reshape(60, 1, 1, 1), 'label': np.arange(60) % 4}
  )
  own = config.episodes
  drawn = data.sample_episodes(0, source.arrays['label'], 2, own.num_ways, own.num_shots, 2)
  fewer, moved = episodes.draw(config, source)
  assert len(fewer) < len(source)
  for name in ('support', 'query'):
    np.testing.assert_array_equal(
      fewer.arrays['image'][getattr(moved, name)], source.arrays['image'][getattr(drawn, name)]
    )


def test_shapes_for_compiling_are_those_that_are_run():
  config = tiny(episodes__count=8)
  variables, pools, _, drawn = given()
  tasks = episodes.tasks(drawn, (0, config.num_base), numbers={'beta': 0.1})
  shapes = episodes.abstract(config, ('beta',), parallel.make_mesh())
  for there, promised in zip((variables, pools, tasks), shapes, strict=True):
    found = jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), there)
    assert found == jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), promised)


def test_files_of_other_episodes_are_refused_and_damaged_ones_written_anew(tmp_path):
  file, config = tmp_path / 'plain.npz', tiny()
  settings = episode_results.fingerprint(config, {'beta': 0.1})
  assert episode_results.read_done(file, settings) == {}
  np.savez(file, settings=settings, cosine=np.ones(3))
  assert list(episode_results.read_done(file, settings)) == ['cosine']
  free = dataclasses.replace(config, episodes=dataclasses.replace(config.episodes, per_call=2))
  again = episode_results.fingerprint(free, {'beta': 0.1})
  assert list(episode_results.read_done(file, again)) == ['cosine']
  for other, difference in (
    (
      episode_results.fingerprint(tiny(fine_tuning__steps=3), {'beta': 0.1}),
      'fine_tuning.steps: 2',
    ),
    (episode_results.fingerprint(config, {'beta': 0.5}), 'beta: 0.1 there, 0.5 given'),
  ):
    with pytest.raises(ValueError, match=rf'(?s)plain\.npz holds .*{difference}'):
      episode_results.read_done(file, other)
  for content in (file.read_bytes()[:300], b''):
    file.write_bytes(content)
    with pytest.warns(UserWarning, match='cannot be read'):
      assert episode_results.read_done(file, settings) == {}


@pytest.mark.parametrize('queries', [74, 75, 76])
def test_the_histogram_counts_every_accuracy(queries):
  bins = episode_results.accuracy_bins(queries)
  shown, _ = np.histogram(100 * np.arange(queries + 1) / queries, bins)
  assert shown.sum() == queries + 1 and set(shown) <= {1, 2}


def test_probabilities_that_are_nan_are_no_classes():
  probabilities = np.full((2, 3, 2), 0.5)
  probabilities[1, :, 1] = 0.6
  drawn = types.SimpleNamespace(query_labels=np.array([[0, 1, 0], [1, 1, 0]]))
  judge = functools.partial(episode_results.Comparison.judge, types.SimpleNamespace(drawn=drawn))
  np.testing.assert_allclose(judge(probabilities), [2 / 3, 2 / 3])
  probabilities[0, 2, 0] = np.nan
  with pytest.raises(ValueError, match='1 rows hold values that are NaN'):
    judge(probabilities)


def test_a_published_checkpoint_is_read_without_its_classifier(tmp_path):
  config = tiny()
  variables = fresh(config.backbone)
  weights = {f'module.{name}': value for name, value in models.to_torch(variables).items()}
  weights |= {'module.linear.L.weight_v': np.zeros((5, 4), np.float32)}
  np.savez(tmp_path / 'weights.npz', **weights)
  config = tiny(checkpoint=tmp_path / 'weights.npz')
  loaded = episodes.pretrained(config, None, tmp_path / 'backbone')
  assert not (tmp_path / 'backbone').exists()
  for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(variables), strict=True):
    np.testing.assert_array_equal(a, b)
