import importlib
import subprocess
import sys

import pytest

from experiments import __main__ as commands
from experiments.harness import launcher


def test_papers_are_listed_one_a_line(capsys):
  commands.main([])
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines[: lines.index('')]] == launcher.papers()
  assert 'gml' in launcher.papers()


def test_settings_are_listed_with_what_they_need(capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '80')
  commands.main(['list', 'gml'])
  lines = capsys.readouterr().out.splitlines()
  assert [line.split(':')[0].strip() for line in lines if line[:3].count(' ') == 2] == [
    path.stem for path in launcher.settings('gml')
  ]
  assert '    needs nothing: digits comes with the package' in lines
  assert max(len(line) for line in lines[1:] if '/' not in line) <= 80
  text = ' '.join(' '.join(lines).split())
  assert 'huggingface.co/timm/resnet152.tv_in1k' in text and 'data/Places_LT_val.txt' in text


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['list', 'gml', 'gmll'], "there is no paper 'gmll'. Did you mean gml"),
    (['lsit'], "no command 'lsit'; did you mean list"),
    (['gml'], 'gml is a paper: python -m experiments.gml runs it'),
    (['qtw'], 'did you mean experiments.qwt'),
    (['xyz'], 'there are papers, list, report, aot, bench, compare'),
    (['report', 'nowhere'], 'no results.json below nowhere'),
    (['aot', '--config=gmll/embedded'], "there is no paper 'gmll'"),
  ],
)
def test_what_does_not_exist_ends_with_status_2(arguments, message, capsys):
  with pytest.raises(SystemExit) as stop:
    commands.main(arguments)
  captured = capsys.readouterr()
  assert stop.value.code == 2 and message in captured.err and not captured.out


@pytest.mark.parametrize('name', [n for n in commands.COMMANDS if n != 'papers'])
def test_every_command_has_help(name, capsys):
  with pytest.raises(SystemExit) as stop:
    commands.main([name, '--help'])
  assert stop.value.code == 0
  assert f'python -m experiments {name}' in capsys.readouterr().out


def test_commands_are_there():
  for module, function in commands.COMMANDS.values():
    assert callable(getattr(importlib.import_module(f'experiments.tools.{module}'), function))


def test_a_reader_that_has_seen_enough_sees_no_traceback():
  command = f'{sys.executable} -m experiments list gml | head -1'
  done = subprocess.run(['bash', '-c', command], capture_output=True, text=True)
  assert done.stdout.startswith('gml: ') and not done.stderr
