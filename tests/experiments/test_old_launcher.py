import json

import pytest
from ml_collections import ConfigDict

from experiments import launcher
from experiments.results import results, row

EMBEDDED = launcher.CONFIGS / 'ibm2' / 'embedded.py'


@pytest.fixture
def config():
  return launcher.load_config(EMBEDDED)


def test_a_config_knows_its_paper_and_setting(config):
  assert (config.paper, config.setting) == ('ibm2', 'embedded')


@pytest.mark.parametrize(
  ('assignment', 'key', 'value'),
  [
    ('search.search_epochs=3', 'search_epochs', 3),
    ('train.learning_rate=1', 'learning_rate', 1.0),
    ('data.name=other', 'name', 'other'),
    ('shots=[5]', 'shots', (5,)),
    ('shots=(1, 2)', 'shots', (1, 2)),
  ],
)
def test_an_override_is_read_by_the_type_of_what_is_there(config, assignment, key, value):
  launcher.override(config, [assignment])
  parent = assignment.partition('=')[0].split('.')[:-1]
  for part in parent:
    config = config[part]
  assert config[key] == value and type(config[key]) is type(value)


@pytest.mark.parametrize(
  ('assignment', 'message'),
  [
    ('drawz=3', 'unknown key. Did you mean draws'),
    ('draws=many', 'expected int as in 4, got str'),
    ('draws', 'expected --config.key=value'),
    ('train.epoch=x', 'Did you mean train.epochs'),
  ],
)
def test_a_wrong_override_says_what_was_expected(config, assignment, message):
  with pytest.raises(ValueError, match=message):
    launcher.override(config, [assignment])


def test_a_mistyped_config_is_answered_by_those_that_exist():
  with pytest.raises(ValueError, match=r'ibm2/embedded\.py'):
    launcher.load_config('mlcollections_configs/ibm2/embeddedd.py')


def test_user_errors_end_with_one_line_and_status_2(capsys):
  with pytest.raises(SystemExit) as stop:
    launcher.main(lambda config, workdir: {}, 'ibm2', ['--config.drawz=3'])
  assert stop.value.code == 2
  assert capsys.readouterr().err.startswith('error: --config.drawz: unknown key.')


def test_a_workdir_that_cannot_be_written_is_refused_before_the_run(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='cannot be written'):
    launcher.launch(pytest.fail, launcher.load_config(EMBEDDED), tmp_path / 'file' / 'below')


def test_a_run_leaves_complete_results(tmp_path, config):
  def run(config, workdir):
    return results(config, [row('a', 'baseline', {'x': 1})])

  launcher.launch(run, config, tmp_path)
  written = json.loads((tmp_path / 'results.json').read_text())
  assert set(written) == {
    'paper', 'setting', 'seed', 'rows', 'claims', 'seconds', 'config', 'versions', 'device',
  }  # fmt: skip
  assert written['rows'] == [{'name': 'a', 'role': 'baseline', 'metrics': {'x': 1.0}}]
  assert written['config']['draws'] == config.draws


def test_results_refuse_what_a_report_could_not_read():
  config = ConfigDict({'paper': 'p', 'setting': 's', 'seed': 0})
  with pytest.raises(ValueError, match="role 'best' is none of"):
    row('a', 'best', {})
  claim = {'statement': 'a beats b', 'metric': 'x', 'baseline': 'b', 'method': 'a'}
  with pytest.raises(ValueError, match="no 'x' in row 'b'"):
    results(config, [row('a', 'method', {'x': 1})], [claim])
