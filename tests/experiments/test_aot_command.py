import dataclasses
import json
import sys
import types

import jax
import pytest
from small_program import make_program

from experiments.harness import launcher
from experiments.harness.sections import Experiment
from experiments.tools import aot
from jaxlab.parallel import aot as library
from jaxlab.parallel import make_mesh

CONFIG = """
from ml_collections import ConfigDict


def get_config():
  return ConfigDict({'batch': 16})
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  batch: int


def programs(config):
  def lower(mesh):
    return library.lower_step(make_program(batch=config.batch), mesh)

  return {name: types.SimpleNamespace(lower=lower) for name in ('step [a]', 'again')}


@pytest.fixture
def config(tmp_path, monkeypatch):
  """The settings' file of a paper called `toy`, compiled for this machine's devices."""
  module = types.ModuleType('experiments.toy')
  module.Settings, module.programs, module.check = Settings, programs, lambda config: ()
  module.__spec__ = types.SimpleNamespace(name='experiments.toy')
  monkeypatch.setitem(sys.modules, 'experiments.toy', module)
  monkeypatch.setattr(library, 'tpu_topology_mesh', lambda topology, **axes: make_mesh(**axes))
  monkeypatch.setattr(launcher, 'CONFIGS', tmp_path)
  path = tmp_path / 'toy' / 'embedded.py'
  path.parent.mkdir()
  path.write_text(CONFIG)
  return str(path)


def test_report_is_printed_and_written(config, tmp_path, capsys):
  out = tmp_path / 'report.json'
  found = aot.main([f'--config={config}', '--topology=v5e:4x4', f'--json={out}'])
  assert json.loads(out.read_text()) == found
  assert found['mesh'] == {'data': 8, 'fsdp': 1, 'tensor': 1}
  assert found['programs']['step [a]']['flops'] > 0
  text = capsys.readouterr().out
  assert 'HBM temporaries' in text and 'all-reduce' in text and 'v5e:4x4' in text
  assert 'step [a]' in text
  named = aot.main(['--config=toy/embedded', '--topology=v5e:4x4', '--programs=step [a]'])
  assert [*found['programs']] == ['step [a]', 'again'] and [*named['programs']] == ['step [a]']
  assert named['programs']['step [a]']['flops'] == found['programs']['step [a]']['flops']


def test_a_report_that_could_not_be_written_is_told_before_anything_is_compiled(config, capsys):
  with pytest.raises(SystemExit):
    aot.main([f'--config={config}', '--json=/no/such/folder/report.json'])
  assert 'there is no folder /no/such/folder' in capsys.readouterr().err


def test_what_was_compiled_before_one_failed_is_written(config, tmp_path, monkeypatch, capsys):
  out, report, calls = tmp_path / 'report.json', library.report, []

  def fails_once_more(compiled):
    calls.append(compiled)
    if len(calls) == 2:
      raise MemoryError('too large')
    return report(compiled)

  monkeypatch.setattr(library, 'report', fails_once_more)
  with pytest.raises(MemoryError):
    aot.main([f'--config={config}', f'--json={out}'])
  assert list(json.loads(out.read_text())['programs']) == ['step [a]']
  assert 'step [a]: traced in' in capsys.readouterr().err


def test_the_mesh_of_a_setting_is_one_of_the_chips_it_is_compiled_for(config, monkeypatch):
  # Of eight chips; this machine has one.
  devices = jax.devices()
  monkeypatch.setattr(jax, 'devices', lambda *args: devices[:1])
  monkeypatch.setattr(
    library, 'tpu_topology_mesh', lambda topology, **axes: make_mesh(**axes, devices=devices)
  )
  found = aot.main([f'--config={config}', '--config.mesh.fsdp=4'])
  assert found['mesh'] == {'data': 2, 'fsdp': 4, 'tensor': 1}
  found = aot.main([f'--config={config}', '--mesh=data=-1,fsdp=8'])
  assert found['mesh'] == {'data': 1, 'fsdp': 8, 'tensor': 1}
  with pytest.raises(ValueError, match='does not fit 1 device'):
    launcher.load_checked('toy', 'embedded', ['mesh.fsdp=4'])


def test_a_narrow_terminal_cuts_nothing_off(monkeypatch, capsys):
  monkeypatch.setenv('COLUMNS', '60')
  program = {
    'hbm': {'total': 3 * 2**20, 'fits': True},
    'flops': 6.8631e9,
    'collectives': {'all-reduce': {'count': 502, 'bytes': 2**20}},
    'compile_seconds': 39.4,
  }
  programs = dict.fromkeys(('quantize', 'block', 'forward', 'fine_tuning'), program)
  aot.show({'config': 'toy', 'topology': 'v5e:4x4', 'mesh': {'data': 16}, 'programs': programs})
  text = capsys.readouterr().out
  assert '…' not in text and text.count('502 x') == text.count('6.8631e+') == 4
  programs['block'] = {**program, 'collectives': None}
  aot.show({'config': 'toy', 'topology': 'v5e:4x4', 'mesh': {'data': 16}, 'programs': programs})
  text = capsys.readouterr().out
  assert text.count('502 x') == 3 and text.count('unknown') == 1


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--config.bath=8'], 'bath.*batch'),
    (['--config.batch=12'], 'batch_size=12'),
    (['--mesh=data=3'], 'data=3'),
    (['--programs=again,agian'], r"no 'agian'\. Did you mean again"),
    (['--config.mesh.fsdp=3'], 'fsdp=3'),
    (['--mesh=model=2'], r'--mesh=model=2: expected data=N'),
  ],
)
def test_what_does_not_fit_is_refused(config, arguments, message):
  with pytest.raises(ValueError, match=message):
    aot.main([f'--config={config}', *arguments])


def test_a_setting_of_no_paper_is_refused(config, tmp_path):
  other = tmp_path / 'tyo' / 'small.py'
  other.parent.mkdir()
  other.write_text(CONFIG)
  with pytest.raises(ValueError, match=r"there is no paper 'tyo'\. Did you mean toy"):
    aot.main([f'--config={other}'])
