import numpy as np
import pytest
from few_shot_settings import tiny
from PIL import Image

from experiments.harness import launcher
from experiments.harness.settings import SettingsError, fill, problems
from experiments.protocols import few_shot_data
from experiments.protocols.few_shot_data import PUBLISHED, BaseAndNovel
from jaxlab import data


def write(folder, classes, count, size=(6, 5)):
  """Writes colored images, `count` of each class."""
  rng = np.random.default_rng(0)
  for name in classes:
    (folder / name).mkdir(parents=True)
    for index in range(count):
      image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
      Image.fromarray(image).save(folder / name / f'{index}.png')


@pytest.fixture
def small(monkeypatch):
  """A published set of two base classes, of 20 pixels."""
  own = few_shot_data.Published(2, 6, 8, 20, 'photographs of somewhere')
  monkeypatch.setitem(PUBLISHED, 'small', own)


def test_base_and_novel_classes_of_one_set_are_told_apart_by_label():
  own = tiny().data
  sources = few_shot_data.load(own)
  labels = {name: data.source_labels(getattr(sources, name)) for name in sources._fields}
  assert sorted(set(labels['base'])) == [0, 1, 2, 3, 4] and len(labels['base']) == 901
  assert sorted(set(labels['novel'])) == [5, 6, 7, 8, 9] and len(labels['novel']) == 895


def test_a_published_set_needs_no_more_than_its_name(tmp_path, small):
  write(tmp_path / 'small' / 'base', ('a', 'b'), 3)
  write(tmp_path / 'small' / 'novel', ('c', 'd', 'e', 'f'), 2)
  own = fill(BaseAndNovel, {'name': 'small', 'folder': str(tmp_path)})
  assert (own.view, own.stored_image) == ((20, 20, 3), (23, 23, 3))  # 1.15 times the side
  assert not list(problems(own))
  sources = few_shot_data.load(own)
  assert data.source_labels(sources.novel).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
  assert len(sources.base) == 6


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'train_size': 7}, 'data.train_size=7, but 6 records were found'),
    ({'novel_size': 7}, 'data.novel_size=7, but 8 records were found'),
    ({'num_classes': 1}, 'labels are out of range'),
    ({'test_decode': {'size': 22}}, r'image has shape \(22, 22, 3\)'),
  ],
)
def test_other_images_than_the_setting_says_are_refused(tmp_path, small, changes, message):
  write(tmp_path / 'small' / 'base', ('a', 'b'), 3)
  write(tmp_path / 'small' / 'novel', ('c', 'd', 'e', 'f'), 2)
  own = fill(BaseAndNovel, {'name': 'small', 'folder': str(tmp_path), **changes})
  with pytest.raises(ValueError, match=message):
    few_shot_data.load(own)


def test_what_is_missing_is_said_in_full(tmp_path):
  own = fill(BaseAndNovel, {'name': 'cub', 'folder': str(tmp_path)})
  with pytest.raises(FileNotFoundError) as caught:
    few_shot_data.load(own)
  for text in (f'{tmp_path}/cub/base', f'{tmp_path}/cub/novel', 'data.caltech.edu', '4th, 8th'):
    assert text in str(caught.value), text


@pytest.mark.parametrize('name', PUBLISHED)
def test_every_published_set_says_where_it_comes_from(name):
  config = launcher.load('acsr', name)
  assert config.data.name == name and config.data.num_classes == PUBLISHED[name].classes
  assert f'data/{name}/base and data/{name}/novel' in config.data.needs
  assert 'github.com' in config.data.needs


def test_wrong_values_are_all_told():
  values = {
    'name': 'digits', 'num_classes': 5, 'train_size': None, 'novel_size': 0,
    'base_classes': (0, 0), 'novel_classes': (),
  }  # fmt: skip
  found = '\n'.join(problems(fill(BaseAndNovel, values), 'data.'))
  for text in (
    'data.train_size: missing', 'data.novel_size=0', 'data.base_classes=(0, 0)', 'data.novel_classes=()',
  ):  # fmt: skip
    assert text in found, text
  with pytest.raises(SettingsError, match='novel_size: missing'):
    fill(BaseAndNovel, {'name': 'digits'})
