import json

import pytest

from experiments import gml
from experiments.harness import launcher, results


@pytest.fixture
def run(monkeypatch):
  """Replaces what GML does by a row."""

  def run(config, workdir):
    row = results.row('CE', 'baseline', {'mean': 50 + config.seed, 'lowest': 1.0})
    other = results.row('CE + GML', 'method', {'mean': 60, 'lowest': 1.5})
    return results.results(config, [row, other])

  monkeypatch.setattr(gml, 'run', run)


def test_settings_are_found_by_name_and_by_path(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert launcher.load('gml', 'cifar100_lt').data.name == 'cifar100'
  path = launcher.CONFIGS / 'gml' / 'cifar100_lt.py'
  assert launcher.load('gml', path).setting == 'cifar100_lt'
  own = tmp_path / 'mine.py'
  own.write_text(path.read_text())
  assert launcher.load('gml', own).setting == 'mine'


@pytest.mark.parametrize(
  ('setting', 'message'),
  [
    ('cifar100', 'gml has no such setting, only cifar100_lt'),
    (launcher.CONFIGS / 'btm' / 'embedded.py', 'is a setting of btm, not of gml'),
  ],
)
def test_other_settings_are_refused(setting, message):
  with pytest.raises(ValueError, match=message):
    launcher.find('gml', setting)


def test_what_follows_from_a_data_set_need_not_be_named():
  config = launcher.load('gml', 'embedded', ['data.name=cifar10'])
  assert (config.data.stored_image, config.data.num_threads) == ((32, 32, 3), 8)
  assert config.data.mean == 0.0  # the setting says so


def test_all_problems_are_told_at_once():
  pairs = ['network.epochs=0', 'gml.power=0.5', 'runs=[ce,gml,bsc]', 'eval_batch_size=100']
  with pytest.raises(ValueError) as caught:
    launcher.check(launcher.load('gml', 'embedded', pairs))
  for text in ('network.epochs=0', "'bsc'", 'eval_batch_size=100 does not divide'):
    assert text in str(caught.value), text


def test_user_errors_end_with_status_2(capsys):
  with pytest.raises(SystemExit) as stop:
    launcher.main('gml', ['--config.seeed=3'])
  assert stop.value.code == 2
  assert capsys.readouterr().err.startswith('error: --config.seeed: unknown key. Did you mean seed')


def test_a_run_leaves_complete_results_and_says_its_verdicts(tmp_path, capsys, run):
  launcher.main('gml', [f'--workdir={tmp_path}'])
  written = json.loads((tmp_path / 'results.json').read_text())
  assert set(written) == {
    'paper', 'setting', 'seed', 'rows', 'claims', 'seconds', 'config', 'versions', 'device',
  }  # fmt: skip
  assert written['rows'][0] == {
    'name': 'CE',
    'role': 'baseline',
    'metrics': {'mean': 50, 'lowest': 1},
  }
  assert set(written['claims'][0]) == {
    'statement', 'method', 'baseline', 'metric', 'margin', 'higher_is_better',
  }  # fmt: skip
  assert written['config']['network']['epochs'] == 60
  text = capsys.readouterr().out
  assert (
    'DOES NOT HOLD: lowest recall at least 1 point above CE' in text and '+0.5, margin 1' in text
  )
  assert 'holds: mean recall' in text and str(tmp_path / 'results.json') in text
  assert 'Not judged, as it was not measured' in text


def test_a_work_directory_belongs_to_one_experiment(tmp_path, run):
  launcher.run('gml', workdir=tmp_path)
  launcher.run('gml', workdir=tmp_path)
  with pytest.raises(
    ValueError, match='that of another experiment: paper=gml setting=embedded seed=0'
  ):
    launcher.run('gml', workdir=tmp_path, overrides={'seed': 1})


def test_a_workdir_that_cannot_be_written_is_refused_before_the_run(tmp_path, monkeypatch):
  monkeypatch.setattr(gml, 'run', pytest.fail)
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='cannot be written'):
    launcher.run('gml', workdir=tmp_path / 'file' / 'below')


def test_seeds_have_folders_of_their_own_and_one_summary(tmp_path, capsys, run, monkeypatch):
  launcher.main('gml', [f'--workdir={tmp_path}', '--seeds=0,2'])
  assert {path.name for path in tmp_path.iterdir()} == {'seed0', 'seed2'}
  assert '51.0 ± 1.4' in capsys.readouterr().out
  monkeypatch.setattr(gml, 'run', pytest.fail)
  launcher.main('gml', [f'--workdir={tmp_path}', '--seeds=0,2'])
  assert 'seed 2: finished before' in capsys.readouterr().out


def test_no_number_of_a_table_is_cut_off(capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '80')
  names = [f'a_metric_of_some_length_{i}' for i in range(8)]
  rows = [
    results.row(f'method [{i}] of a long name', 'method', dict.fromkeys(names, 12345.6 + i))
    for i in range(3)
  ]
  results.print_table('title [x]', rows, names)
  text = capsys.readouterr().out
  assert '…' not in text and 'method [1] of a long name' in text and 'title [x]' in text
  assert text.count('12346.6') == 8 and max(map(len, text.splitlines())) <= 80
