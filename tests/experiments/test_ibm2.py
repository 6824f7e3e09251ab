import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import tables
from frozen_feature_settings import save_features, tiny

from experiments import ibm2
from experiments.harness import launcher
from experiments.harness.sections import Claim, Mesh
from experiments.protocols import draws, frozen_features
from jaxlab import parallel

NETWORKS = [path.stem for path in launcher.settings('ibm2') if path.stem != 'embedded']


@pytest.mark.parametrize('setting', tables.some(NETWORKS, 3))
def test_a_search_on_the_features_of_every_network_can_be_traced(setting):
  config = launcher.load('ibm2', setting)
  facts = frozen_features.nominal_facts(config)
  assert facts.dim == (2048 if 'resnet' in config.backbone.model['name'] else 384)
  function, shapes = ibm2.programs(config)['ibm2'].make(parallel.make_mesh())
  assert shapes[1].shape == (config.draws, facts.examples, facts.dim)
  found = jax.eval_shape(function, *shapes)
  assert found.search.trace.shape == (config.draws, 8, 4)
  assert found.params['v'].shape == (config.draws, facts.num_classes, facts.dim)


def test_settings_say_what_the_paper_says():
  config = launcher.load('ibm2', 'imagenet_byol_resnet50')
  assert (config.batch_size, config.train.epochs, config.search.threshold_epochs) == (512, 60, 60)
  assert (config.num_copies, config.search.right, config.search.tolerance) == (200, 10.0, 0.05)
  assert (config.search.search_learning_rate, config.train.learning_rate) == (1.0, 0.05)
  assert launcher.load('ibm2', 'imagenet_moco_v3_vit_small').backbone.model['num_heads'] == 12
  percent = launcher.load('ibm2', 'imagenet_1percent_dino_vit_small')
  assert frozen_features.nominal_facts(percent).examples == 12811 and percent.draws == 1


@pytest.mark.exhaustive
def test_a_pods_programs_lower_with_the_copies_split_over_the_mesh():
  pairs = ['backbone.model.depth=1', 'shots=1', 'draws=2']
  found = ibm2.programs(launcher.load('ibm2', 'imagenet_msn_vit_small', pairs))
  assert list(found) == ['features', 'ibm2', 'naive', 'judge']
  lowered = {name: call.lower(parallel.make_mesh()) for name, call in found.items()}
  assert lowered['features'].out_info.shape == (512, 384)
  assert lowered['ibm2'].out_info.search.trace.shape == (2, 8, 4)
  assert lowered['judge'].out_info['ibm2_noisy_accuracy'].shape == (2,)
  copies = (
    r'sharding_constraint .*"data".*tensor<2x128x200x384xf32>'  # draws, a chunk, copies, channels
  )
  assert re.search(copies, lowered['ibm2'].as_text())


@pytest.mark.exhaustive
def test_what_is_found_does_not_depend_on_the_mesh(tmp_path):
  config = tiny(features=save_features(tmp_path / 'own.npz'), chunk_size=8)
  (task,) = frozen_features.tasks(config, tmp_path)
  found = []
  for sizes in ((2, 4, 1), (1, 1, 8)):
    own = dataclasses.replace(config, mesh=Mesh(*sizes))
    solved = draws.solve(own, ibm2.methods(own, 3), task, jax.random.key(0))
    found.append((solved.metrics, solved.fitted['ibm2'].params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)


@pytest.mark.exhaustive
def test_test_features_that_are_nan_give_no_accuracy(tmp_path):
  config = tiny(features=save_features(tmp_path / 'own.npz'), chunk_size=8)
  config = dataclasses.replace(config, mesh=Mesh(1, 1, 8))
  (task,) = frozen_features.tasks(config, tmp_path)
  features = np.array(task.test_features)
  features[3] = np.nan
  task = task._replace(test_features=features)
  found = draws.solve(config, ibm2.methods(config, 3), task, jax.random.key(0)).metrics
  for name in ('means', 'naive', 'ibm2', 'naive_noisy', 'ibm2_noisy'):
    assert np.isnan(found[f'{name}_accuracy']).all(), name
  assert np.isfinite(found['train_accuracy_below']).all()


def test_a_run_on_own_features_leaves_rows_claims_and_a_picture(tmp_path, capsys):
  # Noise of a thousandth is fitted: the range is too small, and the search must say so.
  search = {'search__right': 1e-3, 'search__tolerance': 1e-3, 'search__search_epochs': 40}
  config = tiny(features=save_features(tmp_path / 'own.npz'), **search)
  assert config.setting == 'features'
  claims = [
    dataclasses.replace(claim, metric=claim.metric.replace('relu_5shot', 'own_all'))
    for claim in config.claims
  ]
  found = launcher.launch(dataclasses.replace(config, claims=tuple(claims)), tmp_path / 'run')
  rows = {item['name']: item for item in found['rows']}
  assert list(rows) == ['class means', 'naive', 'IbM2', 'required']
  assert rows['naive']['role'] == 'baseline' and rows['IbM2']['role'] == 'method'
  own = rows['IbM2']['metrics']
  assert own['own_all_accuracy'] > 90
  assert rows['class means']['metrics']['own_all_accuracy'] > 90
  np.testing.assert_allclose([own['own_all_epsilon'], own['own_all_width']], [7.5e-4, 5e-4])
  np.testing.assert_allclose(
    own['own_all_slack_below'],
    min(100 * a - 100 * t for a, t in zip(*values(found, 'train_accuracy_below'))),
    atol=1e-4,
  )
  assert own['own_all_seconds_ratio'] > 0
  assert np.shape(found['bisection']['own_all']['trace']) == (2, 1, 4)
  # Claims about digits are not judged, and not complained about.
  kinds = ('width', 'slack_below', 'slack_above', 'accuracy', 'noisy_accuracy')
  assert [c['metric'] for c in found['claims']] == [f'own_all_{kind}' for kind in kinds]
  assert json.loads((tmp_path / 'run' / 'results.json').read_text())['rows'] == found['rows']
  assert (tmp_path / 'run' / 'max_margin.png').stat().st_size > 10_000
  text = capsys.readouterr().out
  assert 'own_all (2 draws of 12, 6 channels)' in text and 'own_all IbM2' in str(found)
  assert 'epsilon is at the end of the range; raise search.right' in text
  assert 'Not judged' not in text


def values(found, name):
  return found['draws']['own_all'][name], found['draws']['own_all']['threshold']


@pytest.mark.exhaustive
def test_own_features_are_run_by_one_line(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  short = ('search.tolerance=9', 'search.search_epochs=2', 'num_copies=2', 'draws=1')
  line = [f'--config.features={save_features(tmp_path / "own.npz")}', '--config.features_shots=2']
  found = launcher.main('ibm2', [*line, *(f'--config.{text}' for text in short)])
  assert 'own_2shot_accuracy' in found['rows'][2]['metrics']
  assert (tmp_path / 'runs' / 'ibm2' / 'features' / 'seed0' / 'results.json').exists()
  assert 'Not judged' not in capsys.readouterr().out


def test_all_problems_of_settings_are_told_with_their_names(tmp_path):
  pairs = [
    'num_copies=0', 'search.right=0.0', 'train.epochs=0', 'eval.chunk_size=0', 'head.smoothing=2',
    'draws=0', 'chunk_size=-1',
  ]  # fmt: skip
  with pytest.raises(ValueError) as caught:
    launcher.launch(launcher.load('ibm2', 'embedded', pairs), tmp_path / 'run')
  for text in (
    'num_copies=0: expected', 'search.right=0.0: expected', 'train.epochs=0: expected',
    'eval.chunk_size=0: expected', 'head.smoothing=2.0: expected', 'draws=0: expected',
    'chunk_size=-1: expected',
  ):  # fmt: skip
    assert f'\n  {text}' in str(caught.value), text
  with pytest.raises(ValueError, match=r'search.tolerance=3 is above search.right=2'):
    launcher.check(tiny(search__right=2.0))
  claim = Claim('better', 'raw_5shot_precision', 'naive', 'IBM2')
  with pytest.raises(ValueError, match=r"no row 'IBM2'(.|\n)*no metric 'raw_5shot_precision'"):
    launcher.check(dataclasses.replace(tiny(), claims=(claim,)))
  assert not (tmp_path / 'run').exists()


def test_what_is_needed_is_listed():
  config = launcher.load('ibm2', 'imagenet_dino_vit_small')
  assert 'tfds build imagenet2012 --file_format=array_record' in config.data.needs
  assert config.backbone.needs.endswith('huggingface.co/timm/vit_small_patch16_224.dino')
