"""The README tells the truth: its code runs, and what its table names exists."""

import pathlib
import re

import jax
import pytest

import jaxlab

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


@pytest.mark.parametrize('code', re.findall(r'```python\n(.*?)```', README, re.DOTALL))
def test_the_code_runs(code):
  scope = {}
  exec(code, scope)
  assert jax.numpy.isfinite(scope['loss']) and scope['codes'].dtype == jax.numpy.int8
  assert scope['features']['avgpool'].shape == (8, 64)


def test_the_table_names_functions_and_files_that_exist():
  rows = [line.split('|')[1:-1] for line in README.splitlines() if '`experiments/' in line]
  assert rows
  for _, functions, script, configs, _ in rows:
    for room, names in re.findall(r'`(\w+)\.(\{[^}]+\}|\w+)`', functions):
      for name in names.strip('{}').split(', '):
        assert hasattr(getattr(jaxlab, room), name), f'{room}.{name}'
    assert (ROOT / script.strip().strip('`')).is_file()
    folder, *settings = re.findall(r'`([^`]+)`', configs)
    assert {path.stem for path in (ROOT / folder).glob('[!_]*.py')} == set(settings)
