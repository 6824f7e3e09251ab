"""Few-shot protocols: N-way K-shot episodes, and splits with K images of every class.

Host code on labels: what comes out are positions in the pool, reproducible from a seed.
"""

from typing import NamedTuple

import numpy as np

from jaxlab.data.sources.source import InMemory, Source, source_labels


class Episode(NamedTuple):
  """An N-way K-shot task, or several stacked along a first axis. All int64.

  Attributes:
    support: positions in the pool, `[num_ways * num_shots]`, listed class by class.
    support_labels: 0 .. num_ways - 1, position // num_shots.
    query: positions in the pool, `[num_ways * num_queries]`, listed class by class; none is in `support`.
    query_labels: 0 .. num_ways - 1, position // num_queries.
    classes: the pool's label of each way, `[num_ways]`.
  """

  support: np.ndarray
  support_labels: np.ndarray
  query: np.ndarray
  query_labels: np.ndarray
  classes: np.ndarray


def sample_episode(
  rng: np.random.Generator,
  labels: np.ndarray,
  num_ways: int = 5,
  num_shots: int = 1,
  num_queries: int = 15,
) -> Episode:
  """Draws classes without replacement, then disjoint support and query images of each.

  Args:
    rng: NumPy generator; advanced.
    labels: integers `[pool]`, the novel classes only; any numbers.
    num_ways: number of classes.
    num_shots: support images per class.
    num_queries: query images per class.

  Raises:
    ValueError: more ways than classes, or a class with fewer than num_shots + num_queries images.

  References:
    Vinyals et al., Matching Networks, NIPS 2016; 5-way with 15 queries as in Fu et al., Worst Case
    Matters for Few-Shot Recognition, ECCV 2022, https://arxiv.org/abs/2203.06574.

  >>> episode = sample_episode(np.random.default_rng(0), np.arange(60) % 3, num_ways=2, num_shots=2)
  >>> episode.support_labels.tolist(), episode.query.shape
  ([0, 0, 1, 1], (30,))
  """
  return _draw_episode(rng, *_pool(labels, num_ways, num_shots, num_queries))


def sample_episodes(
  seed: int,
  labels: np.ndarray,
  num_episodes: int,
  num_ways: int = 5,
  num_shots: int = 1,
  num_queries: int = 15,
) -> Episode:
  """Draws a fixed list of episodes; episode i is a function of (seed, i), not of their number.

  Args:
    seed: of the list.
    labels: as in `sample_episode`, like the further arguments.
    num_episodes: number of episodes (500 in Fu et al. 2022).
    num_ways: number of classes.
    num_shots: support images per class.
    num_queries: query images per class.

  Returns:
    An `Episode` whose arrays have a first axis of episodes, for `vmap` and `scan`.

  Raises:
    ValueError: as in `sample_episode`, num_episodes < 1, seed < 0.
  """
  if num_episodes < 1:
    raise ValueError(f'num_episodes is {num_episodes}, expected a number >= 1.')
  if seed < 0:
    raise ValueError(f'seed is {seed}, expected a number >= 0.')
  pool = _pool(labels, num_ways, num_shots, num_queries)
  episodes = [_draw_episode(np.random.default_rng((seed, i)), *pool) for i in range(num_episodes)]
  return Episode(*map(np.stack, zip(*episodes)))


def few_shot_split(
  rng: np.random.Generator,
  labels: np.ndarray,
  num_shots: int,
  num_classes: int | None = None,
) -> np.ndarray:
  """Draws `num_shots` images of every class: practical few-shot learning (pFSL), all classes at once.

  Args:
    rng: NumPy generator; advanced.
    labels: integers `[pool]`.
    num_shots: images per class.
    num_classes: labels must then cover 0 .. num_classes - 1; None: the classes are those that occur.

  Returns:
    int64 `[num_classes * num_shots]`, positions in the pool, classes ascending.

  Raises:
    ValueError: a class with too few images or, with `num_classes`, with none.

  References:
    Fu et al., Instance-based Max-margin for Practical Few-shot Recognition, CVPR 2024,
    https://arxiv.org/abs/2305.17368.
  """
  labels = _labels(labels)
  if num_classes is not None:
    missing = np.setdiff1d(np.arange(num_classes), labels)
    unknown = np.setdiff1d(labels, np.arange(num_classes))
    if missing.size or unknown.size:
      raise ValueError(
        f'labels lack {missing.size} of {num_classes} classes (first: {missing[:5].tolist()}) and hold '
        f'{unknown.size} others (first: {unknown[:5].tolist()}); expected 0 .. {num_classes - 1}.'
      )
  if num_shots < 1:
    raise ValueError(f'num_shots is {num_shots}, expected a number >= 1.')
  classes, members = _members(labels)
  _require_images(classes, members, num_shots, f'num_shots {num_shots}')
  return np.concatenate([rng.permutation(rows)[:num_shots] for rows in members])


def few_shot_draws(
  seed: int,
  labels: np.ndarray | Source,
  num_draws: int,
  num_shots: int,
  num_classes: int,
) -> np.ndarray:
  """Draws several few-shot sets; set i is a function of (seed, i), not of their number.

  A set with fewer shots is a part of the one with more: the first columns. A source whose labels are not in
  memory is read at random until all classes are complete: a few records for each one that is drawn, not the
  whole of ImageNet.

  Args:
    seed: of the list.
    labels: integers `[pool]`, or a source with them.
    num_draws: number of sets.
    num_shots: images per class.
    num_classes: labels cover 0 .. num_classes - 1.

  Returns:
    int64 `[num_draws, num_classes, num_shots]`, positions in the pool.

  Raises:
    ValueError: as `few_shot_split`, num_draws < 1, seed < 0.

  >>> few_shot_draws(0, np.arange(60) % 3, num_draws=4, num_shots=2, num_classes=3).shape
  (4, 3, 2)
  """
  if num_draws < 1:
    raise ValueError(f'num_draws is {num_draws}, expected a number >= 1.')
  if seed < 0:
    raise ValueError(f'seed is {seed}, expected a number >= 0.')
  generators = [np.random.default_rng((seed, i)) for i in range(num_draws)]
  if not isinstance(labels, np.ndarray | InMemory) and not hasattr(labels, 'labels'):
    known = np.full(len(labels), -1)
    return np.stack([_read_split(g, labels, known, num_shots, num_classes) for g in generators])
  labels = labels if isinstance(labels, np.ndarray) else source_labels(labels)
  drawn = [few_shot_split(rng, labels, num_shots, num_classes) for rng in generators]
  return np.stack(drawn).reshape(num_draws, num_classes, num_shots)


def _read_split(
  rng: np.random.Generator, source: Source, known: np.ndarray, num_shots: int, num_classes: int
) -> np.ndarray:
  """Draws a few-shot set from records that are read until it is complete; `known` labels are filled in."""
  if num_shots < 1:
    raise ValueError(f'num_shots is {num_shots}, expected a number >= 1.')
  found: list[list[int]] = [[] for _ in range(num_classes)]
  missing = num_classes * num_shots
  for index in map(int, rng.permutation(len(source))):
    if known[index] < 0:
      known[index] = source[index]['label']
      if not 0 <= known[index] < num_classes:
        raise ValueError(
          f'record {index} has label {known[index]}, expected 0 .. {num_classes - 1}.'
        )
    members = found[known[index]]
    if len(members) < num_shots:
      members.append(index)
      missing -= 1
    if not missing:
      return np.array(found)
  short = [c for c, members in enumerate(found) if len(members) < num_shots]
  raise ValueError(
    f'{len(short)} classes have fewer than num_shots {num_shots} images, the first is class {short[0]} with '
    f'{len(found[short[0]])}.'
  )


def _pool(
  labels: np.ndarray, num_ways: int, num_shots: int, num_queries: int
) -> tuple[np.ndarray, list[np.ndarray], int, int, int]:
  for name, value in (
    ('num_ways', num_ways), ('num_shots', num_shots), ('num_queries', num_queries)
  ):  # fmt: skip
    if value < 1:
      raise ValueError(f'{name} is {value}, expected a number >= 1.')
  classes, members = _members(_labels(labels))
  if num_ways > len(classes):
    raise ValueError(
      f'num_ways is {num_ways}, but the pool has only {len(classes)} classes; use fewer ways or a pool '
      'with more classes.'
    )
  needed = f'num_shots {num_shots} + num_queries {num_queries}'
  _require_images(classes, members, num_shots + num_queries, needed)
  return classes, members, num_ways, num_shots, num_queries


def _draw_episode(
  rng: np.random.Generator,
  classes: np.ndarray,
  members: list[np.ndarray],
  num_ways: int,
  num_shots: int,
  num_queries: int,
) -> Episode:
  ways = rng.permutation(len(classes))[:num_ways]
  drawn = np.stack([rng.permutation(members[w])[: num_shots + num_queries] for w in ways])
  return Episode(
    support=drawn[:, :num_shots].reshape(-1),
    support_labels=np.repeat(np.arange(num_ways), num_shots),
    query=drawn[:, num_shots:].reshape(-1),
    query_labels=np.repeat(np.arange(num_ways), num_queries),
    classes=classes[ways].astype(np.int64),
  )


def _labels(labels: np.ndarray) -> np.ndarray:
  labels = np.asarray(labels)
  if labels.ndim != 1 or not labels.size or not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(
      f'labels have shape {labels.shape} and dtype {labels.dtype}, expected a non-empty vector of '
      'integers.'
    )
  return labels


def _members(labels: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
  """Returns the classes that occur, ascending, and the positions of each."""
  classes, counts = np.unique(labels, return_counts=True)
  order = np.argsort(labels, kind='stable')
  return classes, np.split(order, np.cumsum(counts)[:-1])


def _require_images(classes: np.ndarray, members: list[np.ndarray], needed: int, what: str) -> None:
  for c, rows in zip(classes, members):
    if len(rows) < needed:
      raise ValueError(
        f'class {c} has {len(rows)} images, fewer than {what}: take fewer, or leave small classes out '
        'of the pool.'
      )
