"""The commands in docstrings and on pages pass the checks that they meet first."""

import ast
import pathlib
import re
import shlex

import pytest
import tables

from experiments.harness import launcher

ROOT = pathlib.Path(__file__).parents[2]
# Those that change several settings, which depend on each other.
ALWAYS = ('last', 'mir', 'practise')


def texts(paper):
  """Yields setting, if it is one's, and text of all that describes a paper."""
  scripts = [ROOT / 'experiments' / f'{paper}.py', *launcher.settings(paper)]
  for script in scripts:
    setting = script.stem if script.parent.name == paper else None
    yield setting, ast.get_docstring(ast.parse(script.read_text())) or ''
  yield None, (launcher.CONFIGS / paper / 'README.md').read_text()


def commands(paper):
  """Yields the arguments of each command of a paper, once."""
  found = {}
  for _, text in texts(paper):
    lines = re.findall(
      rf'^ *python -m experiments\.{paper}\b(.*)$', text.replace('\\\n', ' '), re.MULTILINE
    )
    for line in lines:
      arguments = tuple(shlex.split(line, comments=True))
      if not any('...' in own and '://' not in own for own in arguments):
        found[arguments] = None
  return list(found)


def accepted(paper, arguments):
  options, changes = launcher._parse(paper, list(arguments))
  launcher.load_checked(paper, options.config, changes)


@pytest.mark.parametrize('paper', tables.few(launcher.papers(), *ALWAYS))
def test_commands_are_accepted(paper):
  found = commands(paper)
  assert found
  for arguments in found:
    accepted(paper, arguments)


@pytest.mark.parametrize('paper', ALWAYS)
def test_changes_that_a_setting_proposes_are_accepted(paper):
  proposed = [
    (setting, shlex.split(changes))
    for setting, text in texts(paper)
    if setting
    for changes in re.findall(r'`(--config\.[^`]*)`', text)
  ]
  assert proposed
  for setting, changes in proposed:
    accepted(paper, [f'--config={setting}', *changes])
