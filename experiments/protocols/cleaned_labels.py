"""Labels that a training corrects: label logits of every record, the list that they leave, its pictures.

On a user's own records nothing is known of the noise; they end in a list of corrected labels, each with its
confidence, and a picture of the most suspicious ones.
"""

import csv
import io
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import pictures
from experiments.harness.supervised import Seen
from experiments.protocols.noisy_labels import Settings
from jaxlab import data

Array = jax.Array


class Cleaned(NamedTuple):
  """Corrected labels of the training records, `[records]` or, where images show several classes, one a class.

  Attributes:
    given: int32.
    label: int32, the corrected ones.
    confidence: float32 in [0, 1], of the corrected label.
    doubt: float32 in [0, 1]: of the given one.
  """

  given: np.ndarray
  label: np.ndarray
  confidence: np.ndarray
  doubt: np.ndarray

  def accuracy(self, true: np.ndarray) -> float:
    """Returns the share of corrected labels that are right, in percent."""
    return 100 * (1 - data.noise_rate(self.label, true))


def cleaned(given: np.ndarray, label_logits: np.ndarray) -> Cleaned:
  """Returns the labels that label logits `[rows, ..., outcomes]` say; rows beyond the labels are ignored."""
  logits = np.asarray(label_logits)[: len(given)]
  probabilities = np.asarray(jax.nn.softmax(logits, axis=-1))
  label = logits.argmax(-1).astype(np.int32)
  of = lambda labels: np.take_along_axis(probabilities, labels[..., None], -1)[..., 0]  # noqa: E731
  return Cleaned(given, label, of(label), 1 - of(given))


def named(label: np.ndarray, names: Sequence[str]) -> str:
  """Returns the name of a label, or of all classes that an image shows.

  >>> named(np.array(1), 'ab'), named(np.array([1, 0, 1]), 'abc')
  ('b', 'a;c')
  """
  return ';'.join(names[k] for k in np.flatnonzero(label)) if np.ndim(label) else names[label]


def write_cleaned(folder: pathlib.Path, source: data.Source, found: Cleaned) -> None:
  """Writes `labels.csv` and `labels.npz`: index, path (of files), given and corrected label, confidence.

  Of an image that shows several classes, the list has the least confidence of any, and the most doubt.
  """
  if jax.process_index():
    return
  names, paths = source.class_names, getattr(source, 'paths', None)
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(['index', *(['path'] if paths else []), 'given', 'label', 'confidence', 'doubt'])
  for index in range(len(found.given)):
    path = [paths[index]] if paths else []
    labels = (named(own[index], names) for own in (found.given, found.label))
    numbers = f'{found.confidence[index].min():.4f}', f'{found.doubt[index].max():.4f}'
    writer.writerow([index, *path, *labels, *numbers])
  (folder / 'labels.csv').write_text(text.getvalue())
  np.savez_compressed(folder / 'labels.npz', **found._asdict())


def correct_share(seen: Seen) -> Array:
  """Returns the share of a batch whose label logits say the true label; `rows` are those of `label_rows`."""
  return jnp.mean(jnp.argmax(seen.rows['logits'], -1) == seen.rows['true'])


def label_shapes(config: Settings) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of the records' label logits, and of what is looked at in metrics alone."""
  shape = (config.data.size, *config.data.label_shape)
  logits = jax.ShapeDtypeStruct((*shape, config.data.outcomes), jnp.float32)
  return {'logits': logits, 'true': jax.ShapeDtypeStruct(shape, jnp.int32)}


def draw_confusion(config: Settings, found: Cleaned, names: Sequence[str], path: Any) -> None:
  """Draws how many records with a given label (rows) have which corrected one (columns)."""
  count = len(names)
  table = np.zeros((count, count), int)
  np.add.at(table, (found.given, found.label), 1)
  with pictures.drawn(path, size=(5.5, 5)) as axis:
    axis.imshow(np.sqrt(table), cmap='Blues')
    axis.set_xlabel('corrected label')
    axis.set_ylabel('given label')
    axis.set_title(pictures.title(config))
    if count <= 20:
      axis.set_xticks(range(count), names, rotation=90, fontsize=7)
      axis.set_yticks(range(count), names, fontsize=7)
      for (row, column), value in np.ndenumerate(table):
        axis.text(column, row, value, ha='center', va='center', fontsize=6)


def draw_suspicious(source: data.Source, found: Cleaned, path: Any, shape=(4, 8)) -> None:
  """Draws the records whose given label is doubted most, with given and corrected label."""
  rows, columns = shape
  count = len(found.given)
  doubt = found.doubt.reshape(count, -1).max(-1)
  changed = np.any((found.label != found.given).reshape(count, -1), -1)
  doubted = np.argsort(-doubt, kind='stable')
  order = doubted[changed[doubted]][: rows * columns]
  rows = max(-(-len(order) // columns), 1)
  with pictures.drawn(
    path, rows, columns, size=(1.35 * columns, 1.6 * rows), squeeze=False
  ) as axes:
    for axis in axes.flat:
      axis.axis('off')
    for axis, index in zip(axes.flat, order):
      image = np.asarray(data.DecodeImage(96)(source[int(index)])['image'])
      axis.imshow(image.squeeze(), cmap='gray')
      labels = (named(own[index], source.class_names) for own in (found.given, found.label))
      axis.set_title(' → '.join(labels), fontsize=6)
