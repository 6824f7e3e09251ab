"""What the long-tail experiments refuse before they train, and what a user's own features become."""

import dataclasses
import json

import numpy as np
import pytest
import tables
from long_tail_settings import PAPERS, save_features, tiny

from experiments import gml
from experiments.harness import launcher, runs
from experiments.protocols import long_tail_data, stages
from experiments.protocols.features import read_features


@pytest.mark.parametrize(
  ('paper', 'assignment', 'message'),
  [
    ('gml', 'runs=[ce,gmll]', "runs name 'gmll': there is no such stage"),
    ('gml', 'runs=()', 'runs is empty'),
    ('gml', 'gml.power=0.5', 'gml: power must be'),
    ('gml', "baselines={'x': {'title': 'X', 'loss': 'ldm'}}", "loss='ldm': expected one of"),
    (
      'gml',
      "baselines={'x': {'title': 'X', 'loss': 'focal', 'options': {'gama': 1.0}}}",
      "loss='focal': .*gama",
    ),
    ('gml', 'network.batch_size=36', r'ce: batch_size=36 does not divide'),
    ('gml', 'network.batch_size=4096', 'exceeds its .* training records'),
    ('gml', 'network.optimizer.name=sgdd', "network.optimizer.name: Unknown optimizer 'sgdd'"),
    ('gml', 'network.schedule.name=cosin', "network.schedule: Unknown schedule 'cosin'"),
    ('gml', "network.optimizer.no_decay=['biass']", "ce: no_decay: no parameter matches 'biass'"),
    ('gml', 'eval_batch_size=100', 'eval_batch_size=100 does not divide'),
    ('gml', 'model.name=mlpp', "ce: .*'mlpp'"),
    ('gml', 'head_init=xavier', "kernel_init='xavier'"),
    ('gml', 'ensemble.t_new=0.0', 'ensemble: t_new must be positive'),
    ('gml', 'tau.grid=()', r'tau\.grid=\(\): expected'),
    ('gml', 'tau.holdout=1.5', r'tau\.holdout=1\.5: expected a share'),
    ('gml', 'data.imbalance.ratio=0.5', 'data.imbalance: '),
    ('gml', 'pictured=[nix]', "there is no row 'nix'"),
    ('dive', 'virtual.teachers=[ce,bsc]', r"virtual\.teachers: runs name 'bsc'"),
    ('dive', 'virtual.temperatures=(0.0, 1.0)', 'virtual.temperatures=.*increasing'),
    ('dive', 'students.kd.temperature=0.0', r'kd: .*temperature must be positive'),
    ('dive', 'students.kd.loss=kdd', "expected one of 'kd', 'dive'"),
    ('btm', 'merging.count=0', 'merging.count=0'),
    ('btm', 'merging.cap=0', r'merging\.cap=0'),
    ('btm', 'runs=[stage1,las_merged]', "name 'balanced' before it"),
    ('btm', 'data.imbalance.ratio=1.0', r'smoothing: class_counts must differ'),
  ],
)
def test_wrong_settings_are_refused_before_training(
  tmp_path, monkeypatch, paper, assignment, message
):
  monkeypatch.setattr(runs, 'train', lambda *args, **kwargs: pytest.fail('it trains'))
  with pytest.raises(ValueError, match=message):
    launcher.run(paper, workdir=tmp_path, overrides=[assignment])


def test_stages_that_need_one_another_are_refused():
  config = tiny('gml')
  table = gml.table(config, long_tail_data.nominal_facts(config.data))
  table['ce'] = dataclasses.replace(table['ce'], start='gml')
  with pytest.raises(ValueError, match='stages ce -> gml -> ce need one another'):
    stages.needed(config, table, ['ce'])


def test_a_start_that_does_not_fit_is_found_without_training():
  config = tiny('gml')
  table = gml.table(config, long_tail_data.nominal_facts(config.data))
  table['lws'] = dataclasses.replace(table['lws'], fresh=())
  found = list(stages.check(config, table))
  assert len(found) == 1 and found[0].startswith('lws: ') and 'params/head/scale' in found[0]


def test_mistyped_claims_are_never_left_out():
  config = tiny('gml')
  claim = config.claims[1]
  wrong = (
    dataclasses.replace(claim, method='CE + GLM'),
    dataclasses.replace(claim, metric='lowst'),
  )
  found = list(gml.check(dataclasses.replace(config, claims=wrong)))
  assert len(found) == 2 and "no row 'CE + GLM'" in found[0] and "no metric 'lowst'" in found[1]


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'test_labels': None}, r"lacks \['test_labels'\]"),
    ({'train_labels': np.zeros(59, int)}, r'\(60, 4\) and train_labels \(59,\)'),
    ({'train_features': np.full((60, 4), np.nan)}, 'not finite'),
    ({'train_labels': np.arange(60) % 2 * 2}, 'npz: train_labels: class 1 of 0..2 has no records'),
    ({'test_labels': np.arange(30) % 2}, 'npz: test_labels: class 2 of 0..2 has no records'),
    (
      {'test_labels': np.arange(30) % 3 + 0.9},
      'npz: 30 values of test_labels are no integers .* 0: 0.9',
    ),
    ({'test_labels': np.eye(3)[np.arange(30) % 3]}, r'test_labels has shape \(30, 3\).*argmax'),
    ({'test_labels': np.arange(30)[:, None] % 3}, r'take test_labels\[:, 0\]'),
    ({'test_labels': np.full(30, 'a')}, 'test_labels has dtype <U1'),
    (
      {'train_features': np.full((60, 4), 1e39)},
      'not finite in float32, the first in row 0, column 0',
    ),
    ({'train_features': np.full((60, 4), 'a')}, 'train_features has dtype <U1, expected numbers'),
    ({'train_features': np.zeros((60, 4), 'V2')}, 'bfloat16 is not written to npz'),
    ({'test_features': np.zeros((30, 5))}, 'differ in their dimension'),
    ({'test_labels': np.arange(30) % 4}, 'npz: test_labels: 7 labels are out of range'),
  ],
)
def test_wrong_features_are_refused(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    read_features(save_features(tmp_path / 'features.npz', **changes))


@pytest.mark.parametrize('kind', ['text', 'npy', 'cut off', 'damaged'])
def test_files_that_are_no_features_are_refused_by_name(tmp_path, kind, capsys):
  path = tmp_path / 'features.npz'
  save_features(path)
  whole = path.read_bytes()
  if kind == 'npy':
    with path.open('wb') as stream:
      np.save(stream, np.zeros(3))
  else:
    middle = len(whole) // 3
    path.write_bytes(
      {
        'text': b'hello',
        'cut off': whole[:middle],
        'damaged': whole[:middle] + bytes(40) + whole[middle + 40 :],
      }[kind]
    )
  with pytest.raises(SystemExit):
    launcher.main('gml', [f'--workdir={tmp_path / "run"}', f'--config.features={path}'])
  assert f'error: features={path}: not a whole npz file' in capsys.readouterr().err


def test_missing_data_end_with_one_line(tmp_path, capsys):
  with pytest.raises(SystemExit) as stop:
    launcher.main('btm', ['--config=places_lt', f'--workdir={tmp_path}'])
  assert stop.value.code == 2
  assert capsys.readouterr().err.startswith('error: ')


def features_config(paper, path, *named, **changes):
  """Returns the paper's setting on the features of a file, with stages that learn them."""
  recipes = {'gml': ('network', 'classifier'), 'btm': ('network', 'fine_tuning', 'second')}[paper]
  sizes = {f'{recipe}__batch_size': 8 for recipe in recipes}
  sizes |= {f'{recipe}__epochs': 10 for recipe in recipes}
  return tiny(paper, *named, features=str(path), **sizes, **changes)


def test_other_features_of_the_same_counts_are_another_run(tmp_path):
  path = tmp_path / 'features.npz'

  def identity(scale):
    save_features(path, train_features=scale * np.ones((60, 4)))
    config = long_tail_data.with_features(features_config('gml', path, 'ce', tau__holdout=0.0))
    return gml.programs(config, long_tail_data.load(config).facts)['ce'].identity

  assert identity(1) == identity(1) != identity(2)


def test_features_are_standardized_by_the_training_records_unless_told(tmp_path):
  rng = np.random.default_rng(1)
  given = {
    split: 255 * rng.random((size, 4)) + [0, 1e4, 0, 0]
    for split, size in (('train', 60), ('test', 30))
  }
  for features in given.values():
    features[:, 3] = 7
  path = save_features(
    tmp_path / 'features.npz', **{f'{split}_features': x for split, x in given.items()}
  )
  config = long_tail_data.with_features(features_config('gml', path, 'ce', tau__holdout=0.0))
  scale = given['train'].std(0)
  scale[3] = np.inf
  loaded = long_tail_data.load(config)
  for split in ('train', 'test'):
    found = getattr(loaded, split).arrays['image'][:, 0, 0]
    np.testing.assert_allclose(found, (given[split] - given['train'].mean(0)) / scale, atol=1e-4)
  plain = dataclasses.replace(config, standardize_features=False)
  found = long_tail_data.load(plain).train.arrays['image'][:, 0, 0]
  np.testing.assert_allclose(found, given['train'], rtol=1e-6)


@pytest.mark.parametrize('paper', tables.few(['gml', 'btm'], 'gml'))
def test_a_users_features_run_through_the_same_stages(tmp_path, monkeypatch, paper):
  monkeypatch.chdir(tmp_path)
  path = save_features(tmp_path / 'features.npz')
  if paper == 'gml':
    config = features_config(paper, path, 'ce', 'gml', tau__holdout=0.0)
  else:
    config = features_config(paper, path, 'stage1', 'balanced', 'las_merged', merging__count=2)
  found = launcher.launch(config)
  assert all(row['metrics']['mean'] > 80 for row in found['rows'])
  assert found['setting'] == found['config']['setting'] == 'features' and not found['claims']
  written = tmp_path / 'runs' / paper / 'features' / 'seed0' / 'results.json'
  assert json.loads(written.read_text())['rows'] == found['rows']


def test_the_identity_of_a_run_is_that_of_what_it_builds_on():
  def identity(name, *assignments):
    config = launcher.load('gml', 'embedded', assignments)
    return gml.programs(config)[name].identity

  assert identity('gml') == identity('gml', 'log_every=7', 'data.num_threads=3', 'mesh.data=1')
  assert identity('gml') != identity('gml', 'network.epochs=3')  # what it starts from
  assert identity('ce') == identity('ce', 'classifier.epochs=3', 'gml.power=2')
  assert identity('gml') != identity('gml', 'gml.power=2')
  assert set(PAPERS) == {'gml', 'btm', 'dive'}
