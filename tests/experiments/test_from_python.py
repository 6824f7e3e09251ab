import json
import os
import subprocess
import sys

import pytest

import experiments
from experiments import gml
from experiments.harness import results
from experiments.harness.settings import SettingsError


@pytest.fixture
def run(monkeypatch):
  """Replaces what GML does by a row."""

  def run(config, workdir):
    (workdir / 'recalls.png').write_bytes(b'picture')
    rows = [results.row('CE', 'baseline', {'mean': 50.0 + config.seed, 'lowest': 1.0})]
    return results.results(config, rows, ['mean'])

  monkeypatch.setattr(gml, 'run', run)


def test_a_call_runs_writes_and_returns_what_shows_itself(tmp_path, run, capsys):
  found = experiments.run('gml', 'embedded', workdir=tmp_path, **{'seed': 1, 'network.epochs': 3})
  assert found['rows'][0]['metrics']['mean'] == 51.0 and found['config']['network']['epochs'] == 3
  assert json.loads((tmp_path / 'results.json').read_text()) == dict(found)
  assert '51.0' not in capsys.readouterr().out  # it shows itself, once
  assert '51.0' in str(found) and '<td>51.0</td>' in found._repr_html_()
  assert 'data:image/png' in found._repr_html_()
  assert experiments.run('gml', workdir=tmp_path, seed=1, **{'network.epochs': 3}) == found


def test_seeds_come_back_as_one(tmp_path, run):
  found = experiments.run('gml', workdir=tmp_path, seeds=(0, 2))
  assert found['seeds'] == [0, 2] and found['rows'][0]['metrics']['mean']['mean'] == 51.0
  assert '51.0 ± 1.4' in str(found) and (tmp_path / 'summary.json').exists()
  assert 'data:image/png' in found._repr_html_()


def test_all_that_is_wrong_is_said_before_anything_is_trained(tmp_path, monkeypatch):
  monkeypatch.setattr(gml, 'run', pytest.fail)
  changes = {'network.epochs': 0, 'netwrk.epochs': 3, 'gml.power': 'high', 'seed': 1.5}
  with pytest.raises(SettingsError) as caught:
    experiments.run('gml', workdir=tmp_path, **changes)
  for text in ('netwrk.epochs: unknown key', 'gml.power=high: expected float', 'seed=1.5'):
    assert text in str(caught.value), text
  changes = {'network.epochs': 0, 'runs': ('ce', 'gmll')}
  with pytest.raises(SettingsError) as caught:
    experiments.run('gml', workdir=tmp_path, **changes)
  assert 'network.epochs=0' in str(caught.value) and "'gmll'" in str(caught.value)
  assert not list(tmp_path.iterdir())
  with pytest.raises(ValueError, match='Did you mean gml'):
    experiments.run('gmll', workdir=tmp_path)


def test_an_interruption_raises_where_python_expects_it(tmp_path, monkeypatch):
  def stop(config, workdir):
    raise SystemExit(0)

  monkeypatch.setattr(gml, 'run', stop)
  with pytest.raises(KeyboardInterrupt, match='the same call goes on'):
    experiments.run('gml', workdir=tmp_path)


def test_settings_can_be_looked_at_before(tmp_path):
  config = experiments.settings('gml', 'cifar100_lt', runs='ce,gml', **{'network.epochs': 6})
  assert config.runs == ('ce', 'gml') and config.network.epochs == 6
  lines = str(config).splitlines()
  assert 'network.epochs=6' in lines and 'data.name=cifar100' in lines
  with pytest.raises(SettingsError, match='expected at least 1'):
    experiments.settings('gml', **{'network.epochs': 0})


PROGRAM = """
import warnings
warnings.simplefilter('error')
import jax
{before}
import experiments
flag = 'xla_cpu_experimental_ynn_fusion_type'
import os
assert jax.config.jax_compilation_cache_dir == os.environ['JAX_COMPILATION_CACHE_DIR']
"""


@pytest.mark.parametrize('late', [False, True])
def test_flags_that_come_too_late_are_warned_of(late):
  from experiments import _only_cpu
  from experiments.harness import xla_flags

  names = 'LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION'
  if not _only_cpu() or not xla_flags._library_holds(names):
    pytest.skip('there is no flag to set')
  before = 'jax.numpy.zeros(3)' if late else ''
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  del environment['JAX_COMPILATION_CACHE_DIR']
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM.format(before=before)],
    env=environment, capture_output=True, text=True,
  )  # fmt: skip
  assert (done.returncode != 0) == late, done.stderr
  if late:
    assert 'UserWarning: jax has computed something before `import experiments`' in done.stderr
