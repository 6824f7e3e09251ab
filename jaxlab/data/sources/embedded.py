"""Images without a network: scikit-learn's digits, and Fashion-MNIST where its files lie on disk."""

import gzip
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from jaxlab.data.sources.catalogue import Catalogue
from jaxlab.data.sources.source import InMemory, materialize

FASHION_MNIST_CLASSES = (
  'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat',
  'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot',
)  # fmt: skip
FASHION_MNIST_DIR = '/usr/share/datasets/fashion-mnist'  # of Debian's dataset-fashion-mnist
FASHION_MNIST_VARIABLE = 'JAXLAB_FASHION_MNIST_DIR'


class Digits(InMemory):
  """scikit-learn's 1797 handwritten digits, 8x8 gray, 10 classes; needs no network.

  Args:
    split: 'train' (1297 with the default test_size) or 'test'.
    seed: of the random split; the test records are the first of the permutation.
    test_size: number of test records.

  The 17 gray levels of the original are spread over 0..255.
  """

  def __init__(self, split: str = 'train', seed: int = 0, test_size: int = 500):
    from sklearn.datasets import load_digits

    _check_split(split, ('train', 'test'))
    digits = load_digits()
    if not 0 < test_size < len(digits.target):
      raise ValueError(f'test_size is {test_size}, expected 1 to {len(digits.target) - 1}.')
    order = np.random.default_rng(seed).permutation(len(digits.target))
    rows = order[:test_size] if split == 'test' else order[test_size:]
    images = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)[..., None]
    super().__init__({'image': images, 'label': digits.target[rows]}, 10)


class FashionMNIST(InMemory):
  """Fashion-MNIST (Xiao et al. 2017): 60000 + 10000 images, 28x28 gray, 10 classes.

  Args:
    split: 'train' or 'test'.
    folder: holds `{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]`. Default: the environment variable
      JAXLAB_FASHION_MNIST_DIR, else the folder of Debian's package `dataset-fashion-mnist`; when the
      default folder has no such files, TFDS is asked.

  Raises:
    FileNotFoundError: if the data is nowhere; the message says how to get it.
  """

  def __init__(self, split: str = 'train', folder: str | os.PathLike | None = None):
    _check_split(split, ('train', 'test'))
    chosen = folder or os.environ.get(FASHION_MNIST_VARIABLE)
    path = pathlib.Path(chosen or FASHION_MNIST_DIR)
    prefix = 'train' if split == 'train' else 't10k'
    images, labels = _find(path, f'{prefix}-images-idx3-ubyte'), None
    if images:
      labels = _find(path, f'{prefix}-labels-idx1-ubyte')
    if images and labels:
      arrays = {'image': _read_idx(images)[..., None], 'label': _read_idx(labels)}
    else:
      advice = (
        f'No Fashion-MNIST idx files in {path}. Install them (Debian, Ubuntu: '
        '`apt install dataset-fashion-mnist`), name their folder by the argument `folder` or by '
        f'${FASHION_MNIST_VARIABLE}'
      )
      if chosen:
        raise FileNotFoundError(f'{advice}.')
      try:
        arrays = materialize(Catalogue('fashion_mnist', split))
      except FileNotFoundError as error:
        raise FileNotFoundError(f'{advice}, or use TFDS. {error}') from None
    super().__init__(arrays, 10, FASHION_MNIST_CLASSES)


def _check_split(split: str, known: Sequence[str]) -> None:
  if split not in known:
    raise ValueError(f'split is {split!r}, expected one of {list(known)}.')


def _find(folder: pathlib.Path, name: str) -> pathlib.Path | None:
  candidates = (folder / name, folder / f'{name}.gz')
  return next((path for path in candidates if path.exists()), None)


def _read_idx(path: pathlib.Path) -> np.ndarray:
  """Reads an idx file of unsigned bytes: 0, 0, type, rank, sizes (big-endian int32), data."""
  with gzip.open(path) if path.suffix == '.gz' else path.open('rb') as file:
    data = file.read()
  rank = data[3] if data[:3] == b'\x00\x00\x08' else 0
  header = 4 + 4 * rank
  shape = np.frombuffer(data[4:header], '>i4')
  if not rank or len(shape) != rank or len(data) != header + shape.prod(dtype=np.int64):
    raise ValueError(f'{path} is not a complete idx file of unsigned bytes; fetch it again.')
  return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
