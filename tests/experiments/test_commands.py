import pytest

from experiments import __main__ as commands


def test_papers_are_listed_one_a_line(capsys):
  commands.main([])
  lines = capsys.readouterr().out.splitlines()
  assert sum(line.startswith('gml ') for line in lines) == 1


def test_settings_are_listed_with_what_they_need(capsys):
  commands.main(['list', 'gml'])
  text = capsys.readouterr().out
  assert 'embedded' in text and 'needs nothing: digits come with the package' in text
  assert 'needs weights resnet152.tv_in1k' in text and 'data/Places_LT_val.txt' in text
  assert 'tfds build cifar100' in text


@pytest.mark.parametrize('arguments', [['list', 'gmll'], ['lsit']])
def test_what_does_not_exist_ends_with_status_2(arguments):
  with pytest.raises(SystemExit) as stop:
    commands.main(arguments)
  assert stop.value.code == 2
