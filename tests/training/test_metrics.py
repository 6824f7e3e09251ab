import glob
import io
import math

import pytest
from tensorboardX.proto import event_pb2

from jaxlab.training import MetricWriter, Progress, read_metrics


def test_rows_are_written_as_they_come(tmp_path):
  writer = MetricWriter(tmp_path)
  writer.write(1, {'loss': 2})
  assert read_metrics(tmp_path) == [{'step': 1, 'loss': 2.0}]
  writer.write(2, {'loss': 1.5, 'top1': math.inf})
  writer.close()
  assert (
    read_metrics(tmp_path)
    == writer.rows
    == [
      {'step': 1, 'loss': 2.0},
      {'step': 2, 'loss': 1.5, 'top1': math.inf},
    ]
  )
  assert read_metrics(tmp_path, last_step=1) == writer.rows[:1]
  assert glob.glob(str(tmp_path / 'events.out.tfevents*'))


def test_run_that_goes_on_drops_what_it_will_write_again(tmp_path):
  writer = MetricWriter(tmp_path)
  for step in (1, 2, 3):
    writer.write(step, {'loss': step})
  writer.close()
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 4, "lo')  # killed here
  writer = MetricWriter(tmp_path, start=2)
  assert [row['step'] for row in writer.rows] == [1, 2]
  writer.write(3, {'loss': 30})
  writer.close()
  assert [row['loss'] for row in read_metrics(tmp_path)] == [1, 2, 30]


def test_without_a_directory_rows_are_kept_in_memory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  writer = MetricWriter(None)
  writer.write(5, {'loss': 1})
  writer.close()
  assert writer.rows == [{'step': 5, 'loss': 1.0}]
  assert not list(tmp_path.iterdir())
  assert read_metrics(tmp_path) == []


def test_progress_prints_plain_lines_where_there_is_no_terminal(capsys):
  with Progress('distill', 0, 10) as progress:
    for step in range(1, 6):
      progress.advance(step)
    assert progress.rate(5)['steps_per_second'] > 0
    assert progress.rate(5) == {}
    progress.show(5, {'step': 5, 'top1': 0.5, 'loss': 1.25})
    progress.say('going on')
  first, second = capsys.readouterr().out.splitlines()
  assert 'distill 5/10  loss 1.25  top1 0.5' in first and first.endswith('left')
  assert second == 'going on'


def test_progress_shows_a_bar_on_a_terminal(monkeypatch):
  screen = io.StringIO()
  screen.isatty = lambda: True
  monkeypatch.setattr('sys.stdout', screen)
  monkeypatch.setenv('TERM', 'xterm')
  with Progress('distill', 0, 4) as progress:
    for step in range(1, 5):
      progress.advance(step)
      progress.show(step, {'loss': step / 4})
  assert '4/4' in screen.getvalue() and 'loss 1' in screen.getvalue()


def test_brackets_of_names_and_texts_are_shown(monkeypatch, capsys):
  with Progress('vit [a]', 0, 4) as progress:
    progress.say('in /runs/[b]/' + 100 * 'x')
  assert capsys.readouterr().out == 'in /runs/[b]/' + 100 * 'x' + '\n'
  screen = io.StringIO()
  screen.isatty = lambda: True
  monkeypatch.setattr('sys.stdout', screen)
  monkeypatch.setenv('TERM', 'xterm')
  with Progress('vit [a]', 0, 4) as progress:
    progress.advance(1)
    progress.say('in [b]')
  assert 'vit [a]' in screen.getvalue() and 'in [b]' in screen.getvalue()


def test_silent_progress_prints_nothing(capsys):
  with Progress('distill', 0, 4, visible=False) as progress:
    progress.advance(1)
    progress.show(1, {'loss': 1.0})
    progress.say('hello')
  assert capsys.readouterr().out == ''


def test_what_a_step_does_not_measure_is_no_point_on_the_board(tmp_path, capsys, caplog):
  writer = MetricWriter(tmp_path)
  writer.write(1, {'loss': 2.0, 'loss_narrow': math.nan})
  writer.close()
  assert math.isnan(read_metrics(tmp_path)[0]['loss_narrow'])
  assert not caplog.records and not capsys.readouterr().err


@pytest.mark.parametrize('start', [0, 2])
def test_tensorboard_gets_the_numbers(tmp_path, start):
  writer = MetricWriter(tmp_path, start=start)
  writer.write(start + 1, {'loss': 0.25})
  writer.close()
  (path,) = glob.glob(str(tmp_path / 'events.out.tfevents*'))
  assert [('loss', start + 1, 0.25)] == list(scalars(path))


def scalars(path):
  """Yields (tag, step, value) of an event file: records of length, checksum, data, checksum."""
  with open(path, 'rb') as file:
    while header := file.read(12):
      event = event_pb2.Event.FromString(file.read(int.from_bytes(header[:8], 'little')))
      file.read(4)
      for value in event.summary.value:
        yield value.tag, event.step, value.simple_value
