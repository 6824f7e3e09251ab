import json
import os
import subprocess
import sys

import pytest

from experiments.harness import xla_flags


@pytest.fixture
def library(tmp_path, monkeypatch):
  """A library that knows one flag, and names two more: one reserved, one in a longer name."""
  path = tmp_path / 'libxla.so'
  path.write_bytes(b'\x7fELF\0xla_known\0\x1bxla_reservedR\0xla_known_too\0TYPE_DOT\x10')
  monkeypatch.setattr(xla_flags, '_libraries', lambda: [path])
  monkeypatch.setattr(xla_flags, 'CACHE', tmp_path / 'cache' / 'flags.json')
  monkeypatch.setenv('XLA_FLAGS', '--xla_mine=1')
  return path


def test_a_flag_is_appended_where_the_library_knows_it(library):
  assert xla_flags.add('xla_known', 'a,b', names='TYPE_DOT')
  assert os.environ['XLA_FLAGS'] == '--xla_mine=1 --xla_known=a,b'


@pytest.mark.parametrize(
  ('flag', 'member'),
  [('xla_reserved', None), ('xla_know', None), ('xla_other', None), ('xla_known', 'TYPE_CONV')],
)
def test_an_unknown_flag_or_value_is_left_out(library, flag, member):
  assert not xla_flags.add(flag, '1', names=member)
  assert os.environ['XLA_FLAGS'] == '--xla_mine=1'


def test_what_the_user_has_set_stays(library, monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_known=7')
  assert not xla_flags.add('xla_known', '8')
  assert os.environ['XLA_FLAGS'] == '--xla_known=7'
  assert xla_flags.add('xla_known_too', '8')


def test_answers_are_remembered_until_the_library_changes(library, monkeypatch):
  searched = []
  search = xla_flags._file_holds
  monkeypatch.setattr(
    xla_flags, '_file_holds', lambda path, text: searched.append(text) or search(path, text)
  )
  for _ in range(2):
    assert not xla_flags.add('xla_other', '1')
  assert len(searched) == 1
  library.write_bytes(b'\0xla_other\0')
  assert xla_flags.add('xla_other', '1') and len(searched) == 2


@pytest.mark.parametrize('text', ['', '[]', '{"', '{"key": 1}'])
def test_a_cache_that_is_none_is_replaced(library, text):
  xla_flags.CACHE.parent.mkdir()
  xla_flags.CACHE.write_text(text)
  assert xla_flags.add('xla_known', '1')
  assert True in json.loads(xla_flags.CACHE.read_text()).values()


def test_nothing_needs_to_be_written(library, monkeypatch):
  monkeypatch.setattr(xla_flags, 'CACHE', library / 'below' / 'a_file.json')
  assert xla_flags.add('xla_known', '1')


def test_this_xla_starts_with_every_flag_that_it_is_said_to_know():
  """XLA aborts at a flag that it does not know; one of these was given up by newer ones."""
  program = (
    'import experiments, os\n'
    'from experiments.harness import xla_flags\n'
    'xla_flags.add("xla_cpu_use_fusion_emitters", "false")\n'
    'assert not xla_flags.add("xla_cpu_no_such_flag", "1")\n'
    'assert xla_flags.add("xla_force_host_platform_device_count", "3")\n'
    'import jax\n'
    'print(jax.device_count())'
  )
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'} | {'JAX_PLATFORMS': 'cpu'}
  ran = subprocess.run(
    [sys.executable, '-c', program], env=environment, capture_output=True, text=True, timeout=120
  )
  assert ran.returncode == 0, ran.stderr
  assert ran.stdout.split() == ['3']
