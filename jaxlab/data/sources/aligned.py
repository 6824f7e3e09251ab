"""Several sources read side by side."""

from collections.abc import Sequence

import numpy as np

from jaxlab.data.sources.source import InMemory, Source


class Aligned:
  """Sources in memory of one length, side by side: a batch has the sources on its second axis.

  For programs that train several networks at once, each on data of its own.
  """

  def __init__(self, sources: Sequence[Source]):
    """Takes the sources.

    Raises:
      ValueError: for sources that are not `InMemory`, or differ in length.
    """
    if not sources or not all(isinstance(source, InMemory) for source in sources):
      raise ValueError('Aligned needs sources in memory, whose records are not read one by one.')
    if len(lengths := {len(source) for source in sources}) > 1:
      raise ValueError(f'Aligned needs sources of one length, got {sorted(lengths)}.')
    self._sources = sources
    self.num_classes, self.class_names = sources[0].num_classes, sources[0].class_names

  def __len__(self) -> int:
    return len(self._sources[0])

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return {name: rows[0] for name, rows in self.gather(np.array([index])).items()}

  def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Returns a batch, `[records, sources, ...]`."""
    batches = [source.gather(indices) for source in self._sources]
    return {name: np.stack([batch[name] for batch in batches], 1) for name in batches[0]}
