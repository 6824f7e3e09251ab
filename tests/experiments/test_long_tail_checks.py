"""What the long-tail experiments refuse before they train, and what a user's own features become."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from long_tail_settings import PAPERS, save_features, tiny

from experiments import aot, btm, gml, launcher, results, supervised, training
from experiments.long_tail import Trainer
from experiments.long_tail_data import load_sources, with_features
from jaxlab import parallel


@pytest.mark.parametrize(
  ('paper', 'assignment', 'message'),
  [
    ('gml', "runs=('ce', 'gmll')", r"runs=\('ce', 'gmll'\): there is no stages\.gmll"),
    ('gml', 'runs=()', 'runs is empty'),
    ('gml', 'stages.gml.loss.name=gmll', r"stages\.gml: loss\.name='gmll'"),
    ('gml', 'stages.gml.loss.power=0.5', r"stages\.gml: loss\.name='gml': power must be"),
    ('gml', 'stages.crt.sampler=balanced', r"stages\.crt\.sampler='balanced'"),
    ('gml', 'stages.gml.start=cee', r"stages\.gml\.start='cee': there is no stages\.cee"),
    ('gml', 'stages.ce.start=gml', 'stages ce -> gml -> ce need one another'),
    ('gml', 'stages.lws.fresh=()', r'stages\.lws: .*\n  params/head/scale'),
    ('gml', 'stages.ce.cap=5', r'stages\.ce\.cap=5'),
    ('gml', 'stages.ce.batch_size=36', r'stages\.ce\.batch_size=36 does not divide'),
    ('gml', 'eval_batch_size=100', 'eval_batch_size=100 does not divide'),
    ('gml', 'ensemble.t_new=0.0', 'ensemble: t_new must be positive'),
    ('gml', 'tau.grid=()', r'tau\.grid=\(\): expected'),
    ('gml', 'tau.holdout=ce', "tau.holdout='ce': that stage holds nothing out"),
    ('gml', 'tau.holdout=cee', r"tau\.holdout=\('cee',\): there is no"),
    ('gml', "pictured=('nix',)", "there is no row 'nix'"),
    ('dive', "virtual.teachers=('ce', 'bsc')", r'virtual\.teachers=.*no stages\.bsc'),
    ('dive', 'virtual.temperatures=(0.0, 1.0)', 'virtual.temperatures=.*increasing'),
    ('dive', 'stages.kd.loss.temperature=0.0', r'stages\.kd: .*temperature must be positive'),
    ('btm', 'merged.count=0', 'merged.count=0'),
    ('btm', 'merged.of=balancd', "merged.of='balancd'"),
    ('btm', 'stages.balanced.cap=0', r'stages\.balanced\.cap=0'),
    ('btm', 'stages.balanced.cap=none', r'stages\.balanced\.cap=None'),
    ('btm', "runs=('stage1', 'las_merged')", "name 'balanced' before it"),
    ('btm', 'data.long_tail.ratio=1.0', r'stages\.las_stage1: class_counts must differ'),
  ],
)
def test_wrong_settings_are_refused_before_training(
  tmp_path, monkeypatch, paper, assignment, message
):
  monkeypatch.setattr(Trainer, 'fit', lambda *args, **kwargs: pytest.fail('it trains'))
  config = tiny(paper)
  launcher.override(config, [assignment])
  with pytest.raises(ValueError, match=message):
    PAPERS[paper].run(config, tmp_path)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'loss': {'name': 'bsce'}}, "loss.name='bsce'"),
    ({'loss': {'name': 'dive'}}, 'one needs the other'),
    ({'loss': {'name': 'gml', 'powr': 1.0}}, "loss.name='gml': .*powr"),
    ({'head': 'svm'}, r"stages.ce.head='svm'"),
    ({'batch_size': 4096}, 'exceeds its .* training records'),
  ],
)
def test_wrong_stages_are_refused(change, message):
  config = tiny('gml')
  with config.unlocked():
    config.stages.ce.update(change)
  with pytest.raises(ValueError, match=message):
    supervised.program(config, 'ce')


def test_a_mistyped_run_is_not_lowered_to_nothing():
  config = tiny('gml', 'gmll')
  with pytest.raises(ValueError, match=r'no stages\.gmll'):
    aot.lower(config, parallel.make_mesh())


def test_claims_are_left_out_only_aloud_and_mistyped_ones_never(capsys):
  config = tiny('gml', 'ce')
  rows = [results.row('CE', 'baseline', {'mean': 1.0})]
  assert results.measured_claims(config, rows) == []
  assert capsys.readouterr().out.count('Not judged') == len(config.claims)
  claim = config.claims[1]
  names = '|'.join(re.escape(stage.title) for stage in config.stages.values())
  for change, message in (
    ({'method': 'CE + GLM'}, "no row 'CE . GLM'"),
    ({'metric': 'lowst'}, 'lowst'),
  ):
    with config.unlocked():
      config.claims = ({**claim, **change},)
    with pytest.raises(ValueError, match=message):
      results.check_claims(config, f'{names}|ensemble', 'lowest|mean')


def test_a_cap_reaches_the_loss_but_not_the_smoothing_of_classes():
  counts = np.array([50, 20, 3])
  logits = jax.random.normal(jax.random.key(0), (6, 3))
  labels = jnp.arange(6) % 3

  def value(cap, counts, **loss):
    stage = tiny('btm').stages.balanced
    with stage.unlocked():
      stage.update(cap=cap)
      stage.loss = loss
    return float(supervised.make_loss(stage, counts, 1)(logits, labels, None, jnp.int32(0)))

  balanced = {'name': 'balanced_softmax'}
  assert value(5, counts, **balanced) == value(None, np.array([5, 5, 3]), **balanced)
  smoothed = {'name': 'label_aware_smoothing', 'head': 0.3, 'tail': 0.0}
  assert value(5, counts, **smoothed) == value(None, counts, **smoothed)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'test_labels': None}, r"lacks \['test_labels'\]"),
    ({'train_labels': np.zeros(59, int)}, r'\(60, 4\) and train_labels \(59,\)'),
    ({'train_features': np.full((60, 4), np.nan)}, 'not finite'),
    ({'train_labels': np.arange(60) % 2 * 2}, 'npz: train_labels: class 1 of 0..2 has no records'),
    ({'test_labels': np.arange(30) % 2}, 'npz: test_labels: class 2 of 0..2 has no records'),
    ({'test_labels': np.zeros(30)}, 'must be integers'),
    ({'test_features': np.zeros((30, 5))}, 'differ in their dimension'),
    ({'test_labels': np.arange(30) % 4}, 'npz: test_labels: 7 labels are out of range'),
  ],
)
def test_wrong_features_are_refused(tmp_path, changes, message):
  config = tiny('gml')
  with config.unlocked():
    config.features = save_features(tmp_path / 'features.npz', **changes)
  with pytest.raises(ValueError, match=message):
    with_features(config)


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
    launcher.main(gml.run, 'gml', [f'--workdir={tmp_path}', f'--config.features={path}'])
  assert f'error: features={path}: not a whole npz file' in capsys.readouterr().err


def test_missing_data_end_with_one_line(tmp_path, capsys):
  config = str(launcher.CONFIGS / 'btm' / 'places_lt.py')
  with pytest.raises(SystemExit) as stop:
    launcher.main(btm.run, 'btm', [f'--config={config}', f'--workdir={tmp_path}'])
  assert stop.value.code == 2
  assert capsys.readouterr().err.startswith('error: ')


def features_config(paper, path):
  """Returns the paper's setting on the features of a file, with stages that learn them."""
  config = tiny(paper)
  with config.unlocked():
    config.features = str(path)
    for stage in config.stages.values():
      stage.batch_size, stage.epochs = 8, 10
  return config


def test_other_features_of_the_same_counts_are_another_run(tmp_path):
  path = tmp_path / 'features.npz'

  def identity(scale):
    save_features(path, train_features=scale * np.ones((60, 4)))
    config = with_features(features_config('gml', path))
    return Trainer(config, load_sources(config), tmp_path).trajectory('gml')

  assert identity(1) == identity(1) != identity(2)


@pytest.mark.parametrize('paper', ['gml', 'btm'])
def test_a_users_features_run_through_the_same_stages(tmp_path, monkeypatch, paper):
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  monkeypatch.setattr(training, 'mesh', lambda config: mesh)
  monkeypatch.chdir(tmp_path)
  config = features_config(paper, save_features(tmp_path / 'features.npz'))
  with config.unlocked():
    config.runs = {'gml': ('ce', 'gml'), 'btm': ('stage1', 'balanced', 'las_merged')}[paper]
    config.pictured = ()
    if paper == 'gml':
      config.tau.holdout = ''
    else:
      config.merged.count = 2
  found = launcher.launch(PAPERS[paper].run, config)
  assert all(row['metrics']['mean'] > 80 for row in found['rows'])
  assert found['setting'] == found['config']['setting'] == 'features' and not found['claims']
  written = tmp_path / 'runs' / paper / 'features' / 'seed0' / 'results.json'
  assert json.loads(written.read_text())['rows'] == found['rows']


def test_the_listing_names_weights_and_folders():
  from experiments.__main__ import need

  def listed(paper, setting):
    return need(paper, launcher.CONFIGS / paper / f'{setting}.py')

  assert 'weights resnet152.tv_in1k, batch 256, 512' in listed('gml', 'places_lt')
  assert listed('gml', 'embedded') == 'digits (embedded), batch 32'
  assert listed('acsr', 'cub') == 'image_folder (data/cub), batch 256, or a checkpoint'
