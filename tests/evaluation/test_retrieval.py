import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab.evaluation import retrieval_scores

RNG = np.random.default_rng(0)


def random(count, classes=4, dim=6):
  labels = RNG.integers(classes, size=count)
  return RNG.normal(size=(count, dim)) + np.eye(dim)[labels], labels


@golden('fgia', 'retrieval_metrics')
def test_scores_agree_with_reference(vectors):
  ks = tuple(vectors.param('ks'))
  found = retrieval_scores(vectors['in_embedding'], vectors['in_labels'], ks, chunk_size=16)
  assert_close(list(found.recall.values()), vectors['out_recall_at_k'])
  for name in ('r_precision', 'map_at_r'):
    assert_close(getattr(found, name), vectors[f'out_{name}'])
  assert_close(found.mean_average_precision, vectors['out_map'])


def brute(queries, names, items, item_names, ks, itself):
  """The definitions, one query after the other, in float64."""
  unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, items)]
  recall, scores = {k: [] for k in ks}, []
  for index, query in enumerate(unit[0]):
    others = [i for i in range(len(items)) if not (itself and i == index)]
    order = sorted(others, key=lambda i: (-(unit[1][i] @ query), i))
    hits = np.array([item_names[i] == names[index] for i in order])
    for k in ks:
      recall[k].append(hits[:k].any())
    if total := hits.sum():
      precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
      first = hits[:total]
      scores.append(
        (
          precision[hits].mean(),
          first.mean(),
          (precision[:total] * first).sum() / total,
        )
      )
  return {k: np.mean(v) for k, v in recall.items()}, np.mean(scores, 0)


@pytest.mark.parametrize('apart', [False, True])
def test_scores_are_those_of_the_definitions(apart):
  queries, names = random(23)
  names[0] = 9  # alone in its class
  items, item_names = random(17) if apart else (queries, names)
  gallery = (items, item_names) if apart else None
  found = retrieval_scores(queries, names, (1, 5), gallery=gallery, chunk_size=10)
  recall, means = brute(queries, names, items, item_names, (1, 5), not apart)
  assert found.recall == pytest.approx(recall)
  np.testing.assert_allclose(found[1:], means, rtol=1e-5)


def test_what_cannot_be_searched_is_refused():
  embeddings, labels = random(6)
  for given, message in (
    ((embeddings, labels[:3]), r'labels must be integers \[6\]'),
    ((embeddings * np.nan, labels), 'not finite'),
    ((embeddings * (np.arange(6) != 2)[:, None], labels), 'the embedding at 2 is zero'),
    ((embeddings, labels, (6,)), 'numbers from 1 to 5'),
    ((embeddings, labels, ()), 'numbers from 1 to 5'),
    ((embeddings, np.arange(6), (1,)), 'nothing can be found'),
  ):
    with pytest.raises(ValueError, match=message):
      retrieval_scores(*given)
  with pytest.raises(ValueError, match='embeddings have 6 channels, the gallery 5'):
    retrieval_scores(embeddings, labels, gallery=(embeddings[:, :5], labels))
