import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from jaxlab import data
from jaxlab.data.protocols.samplers import (
  ClassAwareSampler,
  ClassBalancedSampler,
  MixedSampler,
  SquareRootSampler,
  TwoStreamSampler,
)

COUNTS = np.array([40, 12, 5, 2, 1])
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(len(COUNTS)), COUNTS))
SAMPLERS = {
  'balanced': lambda seed=0, n=None: ClassBalancedSampler(LABELS, seed, n),
  'square_root': lambda seed=0, n=None: SquareRootSampler(LABELS, seed, n),
  'mixed': lambda seed=0, n=None: MixedSampler(LABELS, seed, n, balance=0.3),
  'progressive': lambda seed=0, n=None: MixedSampler(LABELS, seed, n, num_epochs=4),
  'class_aware': lambda seed=0, n=None: ClassAwareSampler(LABELS, seed, n, num_samples_per_class=3),
}
each_sampler = pytest.mark.parametrize('make', SAMPLERS.values(), ids=SAMPLERS)


def _source(labels=LABELS):
  images = np.arange(4 * len(labels)).reshape(-1, 2, 2, 1) % 251
  return data.InMemory({'image': images.astype(np.uint8), 'label': labels})


def _same(batches, others):
  assert len(batches) == len(others)
  for a, b in zip(batches, others):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize(
  ('name', 'epoch', 'law'),
  [
    ('balanced', 3, np.ones(5)),
    ('square_root', 3, np.sqrt(COUNTS)),
    ('mixed', 3, 0.7 * COUNTS / 60 + 0.3 / 5),
    ('progressive', 0, COUNTS),
    ('progressive', 1, 0.75 * COUNTS / 60 + 0.25 / 5),
    ('progressive', 4, np.ones(5)),
    ('progressive', 9, np.ones(5)),
  ],
)
def test_drawn_classes_and_records_follow_their_law(name, epoch, law):
  draws = 40000
  indices = SAMPLERS[name](seed=1, n=draws)(epoch)
  law = law / law.sum()
  classes = np.bincount(LABELS[indices], minlength=5)
  assert chisquare(classes, law * draws).pvalue > 1e-3
  records = np.bincount(indices, minlength=60)
  assert chisquare(records, (law / COUNTS)[LABELS] * draws).pvalue > 1e-3


def test_another_law_would_be_noticed():
  classes = np.bincount(LABELS[SAMPLERS['square_root'](n=40000)(0)])
  assert chisquare(classes, np.full(5, 8000.0)).pvalue < 1e-3


@each_sampler
def test_draws_are_a_function_of_seed_and_epoch(make):
  sampler = make(seed=1)
  assert sampler(2).shape == (60,)
  np.testing.assert_array_equal(sampler(2), make(seed=1)(2))
  assert (sampler(2) != sampler(3)).any() and (sampler(2) != make(seed=2)(2)).any()
  assert make(n=7)(0).shape == (7,)


@settings(max_examples=20, deadline=None)
@given(
  counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
  run=st.integers(1, 5),
  draws=st.integers(1, 70),
  seed=st.integers(0, 9),
)
def test_class_aware_stream_is_made_of_whole_cycles(counts, run, draws, seed):
  labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
  sampler = ClassAwareSampler(labels, seed, draws, num_samples_per_class=run)
  stream = np.concatenate([sampler(epoch) for epoch in range(-(-150 // draws))])
  # Runs of one class, and every class once in a round, across the borders of epochs.
  whole = len(stream) // run * run
  runs = labels[stream[:whole]].reshape(-1, run)
  assert (runs == runs[:, :1]).all()
  for start in range(0, len(runs) - len(counts) + 1, len(counts)):
    assert sorted(runs[start : start + len(counts), 0]) == list(range(len(counts)))
  # Every record of a class once in a cycle of the class.
  for c, count in enumerate(counts):
    own = stream[labels[stream] == c]
    for start in range(0, len(own) - count + 1, count):
      assert sorted(own[start : start + count]) == np.flatnonzero(labels == c).tolist()


def test_class_aware_cycles_are_shuffled_anew():
  labels = np.repeat(np.arange(6), 8)
  sampler = ClassAwareSampler(labels, num_samples=8 * 6 * 50, num_samples_per_class=4)
  stream = sampler(0)
  rounds = labels[stream].reshape(-1, 6, 4)[:, :, 0]
  assert len(np.unique(rounds, axis=0)) > 90
  cycles = stream[labels[stream] == 2].reshape(-1, 8)
  assert len(np.unique(cycles, axis=0)) > 45
  firsts = np.bincount(rounds[:, 0], minlength=6)
  assert chisquare(firsts).pvalue > 1e-3


@each_sampler
@pytest.mark.parametrize('stop', [0, 5, 6, 13])
def test_resumed_loader_draws_what_the_uninterrupted_one_would_have(make, stop):
  def loader(**options):
    # 50 draws of 60 records in batches of 8: 6 steps an epoch, the rest of 2 draws is left out.
    return data.make_loader(
      _source(), batch_size=8, sampler=make(seed=3, n=50), num_epochs=3, **options
    )

  uninterrupted = list(loader())
  assert len(uninterrupted) == 18
  first = loader()
  head = [next(first) for _ in range(stop)]
  state = json.loads(json.dumps(first.get_state()))
  second = loader(num_threads=2)
  second.set_state(state)
  _same(uninterrupted, head + list(second))
  for batch in head:
    np.testing.assert_array_equal(batch['label'], LABELS[batch['index']])


def test_batches_are_the_samplers_draws_and_processes_share_them():
  sampler = ClassBalancedSampler(LABELS, 5, num_samples=150)  # more draws than records
  options = {'batch_size': 20, 'sampler': sampler, 'num_epochs': 2, 'pad': True}
  whole = list(data.make_loader(_source(), **options))
  assert len(whole) == 16
  drawn = np.concatenate([b['index'][b['mask']] for b in whole])
  np.testing.assert_array_equal(drawn, np.concatenate([sampler(0), sampler(1)]))
  shares = [
    data.make_loader(_source(), process_index=p, process_count=2, **options) for p in range(2)
  ]
  joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*shares)]
  _same(whole, joined)


@each_sampler
def test_worker_processes_can_have_the_sampler(make):
  sampler = make(seed=2)
  drawn = sampler(1)
  np.testing.assert_array_equal(pickle.loads(pickle.dumps(sampler))(1), drawn)


def test_state_of_another_sampler_is_refused():
  def loader(sampler):
    return data.make_loader(_source(), batch_size=8, sampler=sampler)

  states = [loader(s).get_state() for s in (None, *(make() for make in SAMPLERS.values()))]
  for state in states:
    with pytest.raises(ValueError, match=r'belongs to another data order: .*sampler was'):
      loader(ClassBalancedSampler(LABELS, seed=1)).set_state(state)
  with pytest.raises(ValueError, match=r'belongs to another data order: .*sampler was .* is None'):
    loader(None).set_state(states[1])
  # Alike in the first epoch.
  slow, fast = (MixedSampler(LABELS, num_epochs=n) for n in (8, 4))
  np.testing.assert_array_equal(slow(0), fast(0))
  with pytest.raises(ValueError, match=r'belongs to another data order: .*sampler was'):
    loader(slow).set_state(loader(fast).get_state())


@given(
  st.integers(1, 30), st.integers(1, 12), st.integers(1, 8), st.integers(1, 8), st.integers(0, 9)
)
@settings(max_examples=50, deadline=None)
def test_a_batch_of_two_streams_holds_its_share_of_each_and_no_record_twice(
  unlabeled, labeled, a, b, epoch
):
  a, b = min(a, unlabeled), min(b, labeled)
  both = np.random.default_rng(1).permutation(100)[: unlabeled + labeled]
  sampler = TwoStreamSampler(both[:unlabeled], both[unlabeled:], a + b, b, seed=3)
  batches = sampler(epoch).reshape(sampler.steps, a + b)
  assert sampler.steps == unlabeled // a
  assert all(len(np.unique(row)) == a + b for row in batches)
  first, second = batches[:, :a].ravel(), batches[:, a:].ravel()
  assert set(first) <= set(both[:unlabeled]) and len(set(first)) == len(first)
  # Every record has had its turn before any has the next.
  assert set(second) <= set(both[unlabeled:])
  for length in range(labeled, len(second) + 1, labeled):
    counts = np.unique(second[:length], return_counts=True)[1]
    assert len(counts) == labeled and np.all(counts == length // labeled)
  np.testing.assert_array_equal(sampler(epoch), sampler(epoch))


def test_epochs_and_seeds_of_two_streams_differ_and_processes_share_a_batch():
  make = lambda seed: TwoStreamSampler(np.arange(40), np.arange(40, 60), 8, 2, seed)  # noqa: E731
  assert np.any(make(0)(0) != make(0)(1)) and np.any(make(0)(0) != make(1)(0))
  options = {'batch_size': 8, 'sampler': make(0)}
  whole = data.make_loader(_source(), **options)
  parts = [
    data.make_loader(_source(), **options, process_index=i, process_count=2) for i in range(2)
  ]
  for _ in range(7):
    joined = np.concatenate([next(part)['index'] for part in parts])
    np.testing.assert_array_equal(next(whole)['index'], joined)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: ClassBalancedSampler(np.array([0, 2])), 'class 1 has no images'),
    (lambda: SquareRootSampler(np.array([0, -1])), 'labels are out of range'),
    (lambda: ClassBalancedSampler(np.zeros(3)), 'label has dtype float64'),
    (lambda: ClassBalancedSampler(LABELS, -1), 'seed is -1'),
    (lambda: ClassAwareSampler(LABELS, 0, 0), 'num_samples is 0'),
    (lambda: ClassAwareSampler(LABELS, num_samples_per_class=0), 'num_samples_per_class is 0'),
    (lambda: MixedSampler(LABELS, balance=1.5), r'balance is 1\.5'),
    (lambda: MixedSampler(LABELS, num_epochs=0), 'num_epochs is 0'),
    (lambda: TwoStreamSampler([], [1], 2, 1), r'first has shape \(0,\)'),
    (lambda: TwoStreamSampler([0], [1.0], 2, 1), 'second has shape .* float64'),
    (lambda: TwoStreamSampler([0, 1], [1], 2, 1), 'a record twice, or share one'),
    (lambda: TwoStreamSampler([0], [1], 2, 2), 'second_size is 2, expected 1 to 1'),
    (lambda: TwoStreamSampler([0], [1], 2, 0), 'second_size is 0'),
    (lambda: TwoStreamSampler([0], [1], 3, 1), 'first has 1 records, a batch takes 2'),
    (lambda: TwoStreamSampler([0, 2], [1], 4, 2), 'second has 1 records, a batch takes 2'),
    (lambda: TwoStreamSampler([0], [1], 2, 1, seed=-1), 'seed is -1'),
  ],
)
def test_bad_samplers_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.parametrize(
  ('sampler', 'message'),
  [
    (lambda epoch: np.zeros((2, 2), int), r'shape \(2, 2\) of int64 in epoch 0'),
    (lambda epoch: np.zeros(0, int), r'shape \(0,\)'),
    (lambda epoch: np.zeros(9), 'of float64'),
    (lambda epoch: np.arange(61), 'indices from 0 to 60 in epoch 0, but source has 60'),
    (lambda epoch: np.arange(3), 'sampler draws 3 records, fewer than batch_size 8'),
  ],
)
def test_loader_refuses_samplers_without_valid_draws(sampler, message):
  with pytest.raises(ValueError, match=message):
    data.make_loader(_source(), batch_size=8, sampler=sampler)


def test_loader_refuses_a_sampler_whose_epochs_differ_in_length():
  loader = data.make_loader(_source(), batch_size=8, sampler=lambda epoch: np.arange(16 + epoch))
  with pytest.raises(ValueError, match='draws 17 records in epoch 1 and 16 in epoch 0'):
    for _ in range(3):
      next(loader)
