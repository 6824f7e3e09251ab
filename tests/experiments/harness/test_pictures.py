import numpy as np
import pytest

from experiments.harness import pictures
from experiments.harness.results import row
from experiments.harness.sections import Experiment


def test_bars_are_as_long_as_the_metrics_of_the_rows_that_are_pictured(tmp_path, monkeypatch):
  import matplotlib.pyplot as plt

  kept = []
  monkeypatch.setattr(plt, 'close', kept.append)
  rows = [
    row('float', 'reference', {'4_accuracy': 90, '3_accuracy': 90, '4_transfer': 50}),
    row('other', 'reference', {'4_accuracy': 1}),
    row('method', 'method', {'4_accuracy': 80, '3_accuracy': 70}),
  ]
  config = Experiment(paper='p', setting='s', pictured=('float', 'method'))
  panels = {
    'accuracy (%)': {'4': '4_accuracy', '3': '3_accuracy'},
    'transfer (%)': {'4': '4_transfer', '3': '3_transfer'},
  }
  pictures.bars(tmp_path / 'bars.png', config, rows, panels)
  (figure,) = kept
  accuracy, transfer = figure.axes
  widths = [[bar.get_width() for bar in own] for own in accuracy.containers]
  assert widths == [[90, 80], [90, 70]]
  np.testing.assert_array_equal([bar.get_width() for bar in transfer.containers[0]], [50, np.nan])
  assert [text.get_text() for text in accuracy.get_yticklabels()] == ['float', 'method']
  assert [text.get_text() for text in transfer.get_legend().get_texts()] == ['4', '3']
  assert accuracy.get_xlim() == pytest.approx((65, 92)) and (tmp_path / 'bars.png').exists()


def test_curves_are_those_metrics_that_some_training_has(tmp_path, monkeypatch):
  import matplotlib.pyplot as plt

  kept = []
  monkeypatch.setattr(plt, 'close', kept.append)
  histories = {
    'first': [{'step': 1, 'loss': 3.0}, {'step': 2, 'loss': 2.0, 'knn': 50.0}],
    'second': [{'step': 2, 'loss': 1.0}],
  }
  labels = {'loss': 'loss', 'knn': 'neighbors (%)', 'spread': 'spread'}
  config = Experiment(paper='p', setting='s')
  pictures.curves(tmp_path / 'curves.png', config, histories, labels)
  (figure,) = kept
  loss, knn = figure.axes
  assert (loss.get_ylabel(), knn.get_ylabel()) == ('loss', 'neighbors (%)')
  drawn = [
    [(line.get_label(), line.get_xydata().tolist()) for line in a.lines] for a in (loss, knn)
  ]
  assert drawn == [
    [('first', [[1, 3], [2, 2]]), ('second', [[2, 1]])],
    [('first', [[2, 50]])],
  ]
  pictures.curves(tmp_path / 'none.png', config, histories, {'spread': 'spread'})
  assert (tmp_path / 'curves.png').exists() and not (tmp_path / 'none.png').exists()
