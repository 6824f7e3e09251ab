import json
import os
import re
import shlex
import signal
import subprocess
import sys
from subprocess import PIPE

import pytest

from experiments import gml
from experiments.harness import launcher, overrides, results
from experiments.harness.settings import plain
from jaxlab import training


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
  ('paper', 'setting', 'message'),
  [
    ('gml', 'cifar100', r'gml has no such setting\. Did you mean cifar100_lt'),
    ('gml', 'no', 'There are embedded, cifar100_lt'),
    ('gml', 'inaturalist2018', r'It is a setting of btm, dive\.'),
    ('gml', 'btm/cifar100_lt', 'is a setting of btm, not of gml'),
    ('gml', launcher.CONFIGS / 'btm' / 'embedded.py', 'is a setting of btm, not of gml'),
    ('gml', 'configs/gml/cifar100_lt.py', r'no such file; gml has --config=cifar100_lt\.'),
    ('gmll', 'embedded', r"there is no paper 'gmll'\. Did you mean gml"),
  ],
)
def test_other_settings_are_refused(paper, setting, message):
  with pytest.raises(ValueError, match=message):
    launcher.find(paper, setting)


def test_a_setting_of_the_same_name_elsewhere_is_ones_own(tmp_path):
  own = tmp_path / 'btm' / 'mine.py'
  own.parent.mkdir()
  own.write_text((launcher.CONFIGS / 'gml' / 'embedded.py').read_text())
  assert launcher.find('gml', own) == own


def test_what_follows_from_a_data_set_need_not_be_named():
  config = launcher.load('gml', 'embedded', ['data.name=cifar10'])
  assert (config.data.stored_image, config.data.num_threads) == ((32, 32, 3), 8)
  assert config.data.mean == 0.0  # the setting says so


def test_all_problems_are_told_at_once(capsys, monkeypatch):
  monkeypatch.setattr(gml, 'run', pytest.fail)
  keys = ('network.epochs=0', 'runs=["ce",gml,bsc]', 'eval_batch_size=100', 'sed=1', 'gml.power=x')
  with pytest.raises(SystemExit) as stop:
    launcher.main('gml', [f'--config.{key}' for key in keys])
  assert stop.value.code == 2
  text = capsys.readouterr().err
  for problem in (
    'network.epochs=0: expected at least 1',
    "'bsc'",
    'eval_batch_size=100 does not divide',
    '--config.sed: unknown key. Did you mean seed',
    '--config.gml.power=x: expected float',
  ):
    assert problem in text, problem


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('--sed=3', r'Did you mean --seeds\?'),
    ('--x', r'--config\.KEY=VALUE'),
    ('ce', 'unknown arguments'),
  ],
)
def test_unknown_arguments_end_with_status_2(argument, message, capsys):
  with pytest.raises(SystemExit) as stop:
    launcher.main('gml', [argument])
  assert stop.value.code == 2
  assert re.search(message, capsys.readouterr().err)


def test_lists_come_as_a_shell_passes_them(tmp_path):
  commands = {
    """--config.runs=["ce","gml"]""": ('ce', 'gml'),
    """--config.runs='["ce"]'""": ('ce',),
    """--config.runs=ce,gml""": ('ce', 'gml'),
    """--config.runs="('ce', 'gml')" """: ('ce', 'gml'),
  }
  for text, expected in commands.items():
    (passed,) = subprocess.run(
      ['bash', '-c', f'printf %s {text}'], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert launcher.load('gml', 'embedded', [passed.removeprefix('--config.')]).runs == expected


def test_printed_settings_can_be_pasted_back(capsys):
  launcher.main('gml', ['--config=cifar100_lt', '--print_config', '--config.runs=ce,ldam'])
  text = capsys.readouterr().out
  program, *pasted = shlex.split(text.replace('\\\n', ''))[2:]
  assert program == 'experiments.gml' and pasted[0] == '--config=cifar100_lt'
  launcher.main('gml', [*pasted, '--print_config'])
  assert capsys.readouterr().out == text
  config = launcher.load('gml', 'cifar100_lt', [p.removeprefix('--config.') for p in pasted[1:]])
  assert plain(config) == plain(launcher.load('gml', 'cifar100_lt', ['runs=ce,ldam']))


def test_a_run_leaves_complete_results_and_says_its_verdicts(tmp_path, capsys, run):
  launcher.main('gml', [f'--workdir={tmp_path}'])
  written = json.loads((tmp_path / 'results.json').read_text())
  assert set(written) == {
    'paper', 'setting', 'seed', 'rows', 'claims', 'table', 'seconds', 'config', 'versions', 'machine',
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
  assert written['machine']['threads'] >= 1 and written['machine']['device'] == 'cpu'
  text = capsys.readouterr().out
  assert 'does not hold: lowest recall at least 1 point above CE' in text
  assert '+0.5, margin 1' in text and '│ CE + GML │' in text
  assert 'holds: mean recall' in text and str(tmp_path / 'results.json') in text
  assert 'Not judged, as it was not measured' in text


def test_a_work_directory_belongs_to_one_experiment(tmp_path, run):
  launcher.run('gml', workdir=tmp_path / 'one')
  before = {path: path.read_bytes() for path in (tmp_path / 'one').iterdir()}
  there = 'holds gml/embedded, seed 0; this is '
  for paper, setting, changes, this in (
    ('gml', 'embedded', {'seed': 1}, 'gml/embedded, seed 1'),
    ('gml', 'cifar100_lt', {}, 'gml/cifar100_lt, seed 0'),
    ('btm', 'embedded', {}, 'btm/embedded, seed 0'),
  ):
    with pytest.raises(ValueError, match=there + this):
      launcher.run(paper, setting, workdir=tmp_path / 'one', overrides=changes)
  with pytest.raises(ValueError, match=f'{there}gml/embedded, several seeds'):
    launcher.run('gml', workdir=tmp_path / 'one', seeds=(0, 1))
  assert before == {path: path.read_bytes() for path in (tmp_path / 'one').iterdir()}


def test_a_finished_run_says_so_and_shows_its_table(tmp_path, capsys, run, monkeypatch):
  launcher.main('gml', [f'--workdir={tmp_path}'])
  first = capsys.readouterr().out
  monkeypatch.setattr(gml, 'run', pytest.fail)
  launcher.main('gml', [f'--workdir={tmp_path}'])
  text = capsys.readouterr().out
  assert f'Finished before: {tmp_path / "results.json"}' in text
  assert (
    text[text.index('gml, embedded, seed 0') :] == first[first.index('gml, embedded, seed 0') :]
  )


def test_results_of_other_rows_are_kept_beside_the_new_ones(tmp_path, capsys, run):
  launcher.main('gml', [f'--workdir={tmp_path}'])
  first = (tmp_path / 'results.json').read_bytes()
  for number, tau in enumerate((2.0, 3.0), 1):
    launcher.main('gml', [f'--workdir={tmp_path}', f'--config.posthoc_tau={tau}'])
    told = f'results.json was of other settings (posthoc_tau); it is kept as results.{number}.json'
    assert told in capsys.readouterr().out
  assert (tmp_path / 'results.1.json').read_bytes() == first
  assert json.loads((tmp_path / 'results.2.json').read_text())['config']['posthoc_tau'] == 2.0
  assert json.loads((tmp_path / 'results.json').read_text())['config']['posthoc_tau'] == 3.0


@pytest.mark.parametrize(
  'change, message',
  [
    ('seed=-1', r'seed=-1: expected 0 to 4294967295'),
    ('seed=4294967296', r'seed=4294967296: expected 0 to 4294967295'),
    ('data.image_size=16', r'data.*image_size=16: test images of \(8, 8, 1\) keep their size'),
  ],
)
def test_numbers_that_nothing_could_be_made_of_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    launcher.load_checked('gml', 'embedded', [change])


def test_results_of_files_that_changed_since_say_so(tmp_path, capsys, run, monkeypatch):
  weights, folder = tmp_path / 'weights.npz', tmp_path / 'folder'
  folder.mkdir()
  for path in (weights, folder / 'model.safetensors'):
    path.write_bytes(b'first')
  (folder / 'link').symlink_to(tmp_path / 'nowhere')
  config = launcher.load('gml', 'embedded')
  entries = overrides.entries
  named = (('pretrained', str(weights)), ('checkpoint', str(folder)), ('other', '/not/there'))
  monkeypatch.setattr(overrides, 'entries', lambda config: (*entries(config), *named))
  launcher.launch(config, tmp_path / 'run')
  launcher.launch(config, tmp_path / 'run')
  assert 'changed since' not in capsys.readouterr().out
  later = os.path.getmtime(tmp_path / 'run' / 'results.json') + 1
  os.utime(weights, (later, later))
  launcher.launch(config, tmp_path / 'run')
  assert f'But pretrained={weights} changed since then' in capsys.readouterr().out
  os.utime(folder / 'model.safetensors', (later, later))
  launcher.launch(config, tmp_path / 'run')
  assert f'pretrained={weights}, checkpoint={folder} changed' in capsys.readouterr().out


def test_other_settings_are_not_taken_for_finished(tmp_path, run, monkeypatch):
  launcher.run('gml', workdir=tmp_path)
  calls = []
  monkeypatch.setattr(
    gml, 'run', lambda config, workdir: calls.append(1) or results.results(config, [])
  )
  launcher.run('gml', workdir=tmp_path, overrides={'pictured': ()})
  launcher.run('gml', workdir=tmp_path, overrides={'pictured': ()})
  assert calls == [1]


def test_a_workdir_that_cannot_be_written_is_refused_before_the_run(tmp_path, monkeypatch):
  monkeypatch.setattr(gml, 'run', pytest.fail)
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='cannot be written'):
    launcher.run('gml', workdir=tmp_path / 'file' / 'below')


def test_seeds_have_folders_of_their_own_and_one_summary(tmp_path, capsys, run, monkeypatch):
  launcher.main('gml', [f'--workdir={tmp_path}', '--seeds=0,2'])
  folders = {path.name for path in tmp_path.iterdir()}
  assert folders == {'seed0', 'seed2', 'summary.json', 'experiment.json'}
  text = capsys.readouterr().out
  assert 'seeds 0, 2' in text and '51.0 ± 1.4' in text
  assert 'does not hold: lowest recall at least 1 point above CE' in text
  written = json.loads((tmp_path / 'summary.json').read_text())
  assert written['rows'][0]['metrics']['mean'] == {'mean': 51.0, 'deviation': pytest.approx(2**0.5)}
  (claim,) = [c for c in written['claims'] if c['metric'] == 'mean' and c['method'] == 'CE + GML']
  assert claim['difference']['mean'] == 9.0 and claim['holds'] and claim['seeds'] == 2
  monkeypatch.setattr(gml, 'run', pytest.fail)
  launcher.main('gml', [f'--workdir={tmp_path}', '--seeds=0,2'])
  assert capsys.readouterr().out.count('Finished before') == 2


def test_a_signal_ends_a_series_and_the_same_command_goes_on(tmp_path, run, monkeypatch):
  finish, calls = gml.run, []

  def interrupted(config, workdir):
    calls.append(config.seed)
    if config.seed == 1 and calls.count(1) == 1:
      raise SystemExit(0)  # as a training does once it has saved
    return finish(config, workdir)

  monkeypatch.setattr(gml, 'run', interrupted)
  with pytest.raises(SystemExit) as stop:
    launcher.main('gml', [f'--workdir={tmp_path}', '--seeds=0,1,2'])
  assert stop.value.code == 0 and calls == [0, 1]
  assert not (tmp_path / 'summary.json').exists()
  launcher.main('gml', [f'--workdir={tmp_path}', '--seeds=0,1,2'])
  assert calls == [0, 1, 1, 2] and (tmp_path / 'summary.json').exists()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_trainings_ends_the_run_without_a_traceback(
  tmp_path, run, monkeypatch, capsys, number
):
  finish, before = gml.run, signal.getsignal(number)

  def signaled(config, workdir):
    signal.raise_signal(number)
    pytest.fail('the signal was not answered')

  monkeypatch.setattr(gml, 'run', signaled)
  with pytest.raises(SystemExit) as stop:
    launcher.main('gml', [f'--workdir={tmp_path}'])
  assert stop.value.code == 0 and signal.getsignal(number) is before
  assert 'the same command goes on' in capsys.readouterr().err
  monkeypatch.setattr(gml, 'run', finish)
  launcher.main('gml', [f'--workdir={tmp_path}'])
  assert (tmp_path / 'results.json').exists()


def test_a_work_directory_in_use_is_refused(tmp_path, run, capsys):
  with training.locked(tmp_path), pytest.raises(SystemExit) as stop:
    launcher.main('gml', [f'--workdir={tmp_path}'])
  assert stop.value.code == 2
  assert f'is in use by process {os.getpid()}' in capsys.readouterr().err
  launcher.main('gml', [f'--workdir={tmp_path}'])


@pytest.mark.exhaustive
def test_many_processes_claim_a_work_directory_at_once(tmp_path):
  code = """
import sys, time
from experiments.harness import launcher
config = launcher.load('gml', 'embedded')
print(flush=True)
sys.stdin.read()
for index in range(50):
  launcher.claim(f'{sys.argv[1]}/{index}', config)
"""
  processes = [
    subprocess.Popen([sys.executable, '-c', code, tmp_path], stdin=PIPE, stdout=PIPE, stderr=PIPE)
    for _ in range(2)
  ]
  for process in processes:
    process.stdout.readline()
  for process in processes:
    process.stdin.close()
  errors = [process.stderr.read().decode() for process in processes]
  assert [process.wait() for process in processes] == [0, 0], errors
  for process in processes:
    process.stdout.close()
    process.stderr.close()


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--seeds=0,0'], 'seeds=0,0: expected different ones'),
    (['--seeds='], 'expected different ones'),
    (['--seeds=a'], 'expected tuple'),
    (['--seeds=0,1', '--config.seed=2'], '--seeds and --config.seed'),
  ],
)
def test_bad_seeds_are_refused(arguments, message, capsys, tmp_path):
  with pytest.raises(SystemExit) as stop:
    launcher.main('gml', [f'--workdir={tmp_path}', *arguments])
  assert stop.value.code == 2 and message in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('error', 'status', 'message'),
  [
    (ValueError('wrong'), 2, 'error: wrong'),
    (FileNotFoundError('gone'), 2, 'error: gone\ngml/embedded needs\n  nothing: digits comes with'),
    (FloatingPointError('nan'), 1, 'error: nan'),
    (KeyboardInterrupt(), 130, 'the same command goes on'),
  ],
)
def test_what_ends_a_run_leaves_no_traceback(error, status, message, tmp_path, capsys, monkeypatch):
  def run(config, workdir):
    raise error

  monkeypatch.setattr(gml, 'run', run)
  with pytest.raises(SystemExit) as stop:
    launcher.main('gml', [f'--workdir={tmp_path}'])
  assert stop.value.code == status and message in capsys.readouterr().err


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
