import os
import pathlib

import nbclient
import nbformat
import pytest

import experiments

NOTEBOOKS = sorted((pathlib.Path(experiments.__file__).parent / 'notebooks').glob('*.ipynb'))
LONG = (
  'adapt_a_frozen_transformer', 'clean_my_labels', 'faster_with_100_images', 'few_images',
  'inside_a_language_model', 'pretrain_on_few_images', 'quantize_a_trained_network',
  'why_does_my_transformer_not_quantize',
)  # fmt: skip


def install_cells(notebook):
  return [cell for cell in notebook.cells if 'install' in cell.metadata.get('tags', ())]


def test_there_is_a_notebook_a_family_and_all_install_the_same():
  assert [path.stem for path in NOTEBOOKS] == [
    'adapt_a_frozen_transformer', 'clean_my_labels', 'faster_with_100_images', 'few_images',
    'inside_a_language_model', 'pretrain_on_few_images', 'quantize_a_trained_network', 'the_worst_class',
    'why_does_my_transformer_not_quantize',
  ]  # fmt: skip
  cells = [install_cells(nbformat.read(path, as_version=4)) for path in NOTEBOOKS]
  assert all(len(found) == 1 for found in cells)
  assert len({found[0].source for found in cells}) == 1


def notebooks():
  """Yields all; those that take longer than the shortest are exhaustive."""
  for path in NOTEBOOKS:
    marks = pytest.mark.exhaustive if path.stem in LONG else ()
    yield pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize('path', notebooks())
def test_a_notebook_runs_and_is_kept_without_outputs(path, tmp_path, monkeypatch):
  root = str(pathlib.Path(experiments.__file__).parents[1])
  monkeypatch.setenv('PYTHONPATH', root)
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  flags = os.environ.get('XLA_FLAGS', '').split()  # all but the devices: a reader has one
  monkeypatch.setenv('XLA_FLAGS', ' '.join(flag for flag in flags if 'device_count' not in flag))
  notebook = nbformat.read(path, as_version=4)
  assert not any(cell.get('outputs') for cell in notebook.cells)
  (install,) = install_cells(notebook)
  notebook.cells.remove(install)
  resources = {'metadata': {'path': str(tmp_path)}}
  nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
  shown = [
    output for cell in notebook.cells for output in cell.get('outputs', ()) if 'data' in output
  ]
  assert any('<td>' in output['data'].get('text/html', '') for output in shown)
