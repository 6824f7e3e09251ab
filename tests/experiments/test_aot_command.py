import json
import sys
import types

import pytest
from small_program import make_program

from experiments.tools import aot
from jaxlab.parallel import aot as library
from jaxlab.parallel import make_mesh

CONFIG = """
from ml_collections import ConfigDict


def get_config():
  return ConfigDict({'batch': 16, 'mesh': {'data': -1, 'fsdp': 1}})
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
  """The config file of a paper called `toy`, compiled for this machine's devices."""
  module = types.ModuleType('experiments.toy')
  module.program = lambda config: make_program(batch=config.batch)
  module.__spec__ = types.SimpleNamespace(name='experiments.toy')
  monkeypatch.setitem(sys.modules, 'experiments.toy', module)
  monkeypatch.setattr(library, 'tpu_topology_mesh', lambda topology, **axes: make_mesh(**axes))
  path = tmp_path / 'toy' / 'small.py'
  path.parent.mkdir()
  path.write_text(CONFIG)
  return str(path)


def test_report_is_printed_and_written(config, tmp_path, capsys):
  out = tmp_path / 'report.json'
  found = aot.main([f'--config={config}', '--topology=v5e:4x4', f'--json={out}'])
  assert json.loads(out.read_text()) == found
  assert found['mesh'] == {'data': 8, 'fsdp': 1, 'tensor': 1}
  assert found['programs']['step']['flops'] > 0
  text = capsys.readouterr().out
  assert 'HBM temporaries' in text and 'all-reduce' in text and 'v5e:4x4' in text


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--config.bath=8'], 'bath.*batch'),
    (['--config.batch=12'], 'batch_size=12'),
    (['--mesh=data=3'], 'data=3'),
    (['--mesh=model=2'], r'--mesh=model=2: expected data=N'),
  ],
)
def test_what_does_not_fit_is_refused(config, arguments, message):
  with pytest.raises(ValueError, match=message):
    aot.main([f'--config={config}', *arguments])


def test_config_without_experiment_is_refused(config, tmp_path):
  other = tmp_path / 'nothing_like_it' / 'small.py'
  other.parent.mkdir()
  other.write_text(CONFIG)
  with pytest.raises(ValueError, match=r'no experiments/nothing_like_it\.py'):
    aot.main([f'--config={other}'])
