import jax
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab.training import schedules


@pytest.fixture(params=['float32', 'float64'])
def rtol(request):
  """Runs a test in both precisions; the tolerance of each."""
  with jax.enable_x64(request.param == 'float64'):
    yield {'float32': 1e-5, 'float64': 1e-9}[request.param]


def values(schedule, steps):
  return np.asarray(jax.jit(jax.vmap(schedule))(np.arange(steps)))


@golden('idmm', 'lr_schedule')
def test_a_displaced_cosine_agrees_with_official_code(vectors, rtol):
  epochs, steps, warmup = (
    vectors.param(name) for name in ('epochs', 'steps_per_epoch', 'warmup_epochs')
  )
  rate = schedules.make_schedule(
    'displaced_cosine', vectors.param('lr'), epochs=epochs, steps_per_epoch=steps,
    warmup_epochs=warmup,
  )  # fmt: skip
  assert_close(values(rate, epochs * steps), vectors['out_lr'], rtol)


@golden('up_vits', 'finetune_pieces')
def test_the_displaced_cosine_is_that_of_another_official_code_too(vectors, rtol):
  base, epochs, steps = (vectors.param(name) for name in ('base_lr', 'epochs', 'steps_per_epoch'))
  rate = schedules.displaced_cosine(base, epochs, steps, 2)
  assert_close(values(rate, epochs * steps), vectors['out_lr'], rtol)


@golden('r2d2', 'stage1_lr')
def test_a_cosine_that_is_cut_off_agrees_with_official_code(vectors, rtol):
  # The code changes it every step, by the epoch as a fraction.
  steps_per_epoch = 400
  steps = np.round(vectors['in_epoch'] * steps_per_epoch)
  np.testing.assert_allclose(steps / steps_per_epoch, vectors['in_epoch'], rtol=1e-12)
  rate = schedules.make_schedule(
    'cosine', vectors.param('base_lr'), epochs=300, steps_per_epoch=steps_per_epoch,
    decay_epochs=vectors.param('rampdown_epochs'),
  )  # fmt: skip
  assert_close(jax.vmap(rate)(steps.astype(int)), vectors['out_lr'], rtol)
  with pytest.raises(ValueError, match='decay_epochs=9 belongs to the schedule cosine'):
    schedules.make_schedule('constant', 0.1, epochs=9, steps_per_epoch=2, decay_epochs=9)


def test_a_displaced_cosine_without_warmup_is_the_cosine():
  found = values(schedules.displaced_cosine(0.3, 5, 4), 20)
  assert_close(found, values(schedules.cosine(0.3, 20), 20), 1e-5)
  for warmup, message in ((0.5, 'whole warmup_epochs'), (5, 'below epochs=5')):
    with pytest.raises(ValueError, match=message):
      schedules.displaced_cosine(0.3, 5, 4, warmup)
  with pytest.raises(ValueError, match='no warmup_start'):
    schedules.make_schedule('displaced_cosine', 0.1, epochs=5, steps_per_epoch=2, warmup_start=0.01)


@golden('peer_learning', 'schedules')
def test_a_shifted_cosine_and_a_ramp_of_drop_rates_agree_with_official_code(vectors, rtol):
  epochs = vectors.param('num_epochs')
  rate = schedules.make_schedule(
    'shifted_cosine', vectors.param('base_lr'), epochs=epochs, steps_per_epoch=3,
    warmup_epochs=vectors.param('warmup_epochs'),
  )  # fmt: skip
  assert_close(values(rate, 3 * epochs), np.repeat(vectors['out_lr_per_epoch'], 3), rtol)
  ramp = schedules.drop_rate_ramp(vectors.param('drop_rate'), vectors.param('ramp_epochs'), epochs)
  assert_close(values(ramp, epochs), vectors['out_drop_rate_per_epoch'], rtol)


def test_warm_ups_and_ramps_of_one_epoch_begin_with_zero():
  assert_close(values(schedules.drop_rate_ramp(0.4, 1), 3), [0, 0.4, 0.4], 1e-6)
  found = values(schedules.shifted_cosine(2.0, 4, 1), 4)
  assert_close(found, [0, *(1 + np.cos(np.pi * np.arange(1, 4) / 4))], 1e-6)
  found = values(schedules.shifted_cosine(2.0, 4, 0), 4)
  assert_close(found, 1 + np.cos(np.pi * np.arange(1, 5) / 4), 1e-6, 1e-6)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: schedules.drop_rate_ramp(1.0, 3), r'drop_rate must be in \[0, 1\), got 1.0'),
    (lambda: schedules.drop_rate_ramp(0.2, 0), 'ramp_epochs must be at least 1, got 0'),
    (lambda: schedules.drop_rate_ramp(0.2, 9, 8), 'at most epochs=8, got 9'),
    (lambda: schedules.shifted_cosine(0.1, 4, 5), 'at most epochs=4, got 5'),
    (lambda: schedules.shifted_cosine(0.1, 4, 0.5), 'whole warmup_epochs'),
    (lambda: schedules.switched(0.9, 0.1, -1), 'at must not be negative'),
  ],
)
def test_what_small_loss_selection_cannot_be_scheduled_by(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@golden('ssl_baselines', 'dino_schedules')
def test_cosine_with_inclusive_warmup_agrees_with_reference(vectors, rtol):
  epochs, steps_per_epoch = vectors.param('epochs'), vectors.param('steps_per_epoch')
  rate = schedules.make_schedule(
    'cosine',
    vectors.param('base_lr'),
    epochs=epochs,
    steps_per_epoch=steps_per_epoch,
    end=vectors.param('min_lr'),
    warmup_epochs=vectors.param('warmup_epochs'),
    warmup_inclusive=True,
  )
  steps = epochs * steps_per_epoch
  assert_close(values(rate, steps), vectors['out_lr'], rtol)
  decay = schedules.cosine(0.04, steps, 0.4)
  assert_close(values(decay, steps), vectors['out_weight_decay'], rtol)
  momentum = schedules.cosine(0.996, steps, 1.0)
  assert_close(values(momentum, steps), vectors['out_teacher_momentum'], rtol)


@golden('s3l', 'lr_schedules')
def test_cosines_over_epochs_and_over_steps_agree_with_reference(vectors, rtol):
  base, each = vectors.param('lr'), vectors.param('steps_per_epoch')
  options = {'epochs': vectors.param('epochs'), 'steps_per_epoch': each}
  steps = options['epochs'] * each
  by_epoch = schedules.make_schedule('cosine_per_epoch', base, **options)
  expected = np.repeat(vectors['out_pretrain_lr_per_epoch'], each)
  assert_close(values(by_epoch, steps), expected, rtol)
  by_step = schedules.make_schedule('cosine', base, **options)
  assert_close(values(by_step, steps), vectors['out_finetune_lr_per_step'], rtol)


def test_cosine_starts_at_base_halves_in_the_middle_and_stays_at_the_end():
  lr = values(schedules.cosine(2.0, 8, 1.0), 12)
  assert_close(lr[[0, 4, 8, 11]], [2, 1.5, 1, 1], 1e-6)
  assert np.all(np.diff(lr[:9]) < 0)


def test_warmup_rises_linearly_to_the_schedule_it_precedes():
  lr = values(schedules.cosine(1.0, 12, warmup_steps=4, warmup_start=0.2), 12)
  assert_close(lr[:5], [0.2, 0.4, 0.6, 0.8, 1.0], 1e-6)
  assert_close(lr[4:], values(schedules.cosine(1.0, 8), 8), 1e-6)
  assert_close(values(schedules.linear_warmup(1.0, 2), 4), [0, 0.5, 1, 1], 1e-6)


@pytest.mark.parametrize(('steps', 'expected'), [(1, [0, 1, 1]), (2, [0, 1, 1]), (3, [0, 0.5, 1])])
def test_inclusive_warmup_is_linspace(steps, expected):
  warmed = schedules.with_warmup(schedules.constant(1.0), steps, inclusive=True)
  assert_close(values(warmed, 3), expected, 1e-6)


def test_cosine_per_epoch_is_constant_within_an_epoch():
  lr = values(schedules.cosine_per_epoch(0.1, 4, 3), 12).reshape(4, 3)
  assert np.all(lr == lr[:, :1])
  assert_close(lr[:, 0], 0.05 * (1 + np.cos(np.pi * np.arange(4) / 4)), 1e-6)


def test_multistep_multiplies_from_each_milestone_on():
  lr = values(schedules.multistep(1.0, [2, 4], 0.1), 6)
  assert_close(lr, [1, 1, 0.1, 0.1, 0.01, 0.01], 1e-6)


@pytest.mark.parametrize(
  ('name', 'options', 'direct'),
  [
    ('constant', {}, schedules.constant(0.3)),
    ('cosine', {'end': 0.1}, schedules.cosine(0.3, 20, 0.1)),
    ('cosine_per_epoch', {}, schedules.cosine_per_epoch(0.3, 4, 5)),
    ('multistep', {'milestones': (1, 3), 'factor': 0.5}, schedules.multistep(0.3, [5, 15], 0.5)),
  ],
)
def test_make_schedule_counts_in_epochs(name, options, direct):
  made = schedules.make_schedule(name, 0.3, epochs=4, steps_per_epoch=5, **options)
  assert_close(values(made, 20), values(direct, 20), 1e-6)


def test_milestones_count_from_the_start_of_the_warmup():
  made = schedules.make_schedule(
    'multistep', 1.0, epochs=4, steps_per_epoch=2, warmup_epochs=1, milestones=(2,)
  )
  assert_close(values(made, 6), [0, 0.5, 1, 1, 0.1, 0.1], 1e-6)


def test_staircase_starts_after_the_warmup():
  made = schedules.make_schedule(
    'cosine_per_epoch', 1.0, epochs=3, steps_per_epoch=2, warmup_epochs=1
  )
  assert_close(values(made, 6), [0, 0.5, 1, 1, 0.5, 0.5], 1e-6)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: make('cosin'), "Unknown schedule 'cosin'"),
    (lambda: make('constant', end=0.1), 'end=0.1'),
    (lambda: make('multistep'), 'milestones'),
    (lambda: make('cosine', milestones=(1,)), 'milestones'),
    (lambda: make('multistep', milestones=(1,), warmup_epochs=2), 'within the warm-up'),
    (lambda: make('multistep', milestones=(2, 1)), 'must increase'),
    (lambda: make('cosine', warmup_epochs=4), 'total_steps'),
    (lambda: make('cosine_per_epoch', warmup_epochs=0.5), 'whole warmup_epochs'),
    (lambda: make('cosine', steps_per_epoch=0), 'must be positive'),
    (lambda: schedules.with_warmup(schedules.constant(1.0), -1), 'not be negative'),
    (lambda: schedules.per_epoch(schedules.constant(1.0), 0), 'must be positive'),
  ],
)
def test_bad_arguments_raise(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def make(name, steps_per_epoch=2, **options):
  return schedules.make_schedule(name, 1.0, epochs=4, steps_per_epoch=steps_per_epoch, **options)


def test_a_warm_up_longer_than_the_training_is_refused():
  for name, options in {'constant': {}, 'multistep': {'milestones': (7,)}, 'cosine': {}}.items():
    with pytest.raises(ValueError, match=r'warmup_epochs=6 is longer than the training, epochs=5'):
      schedules.make_schedule(name, 0.1, epochs=5, steps_per_epoch=3, warmup_epochs=6, **options)


@golden('peft_protocols', 'lr_schedule')
def test_the_overlaid_cosine_is_timms(vectors):
  names = ('base_lr', 't_initial', 'warmup_epochs', 'lr_min', 'warmup_lr_init')
  rate = schedules.overlaid_cosine(*map(vectors.param, names))
  expected = vectors['out_lr_of_each_trained_epoch']
  with jax.enable_x64(True):
    assert_close([rate(epoch) for epoch in range(len(expected))], expected, 1e-12)
  found = jax.jit(jax.vmap(rate))(np.arange(len(expected)))
  assert_close(found, expected, 1e-6)
  assert_close(found[-1], expected[-1], 1e-3)
  options = {'warmup_epochs': vectors.param('warmup_epochs'), 'end': vectors.param('lr_min')}
  options |= {'warmup_start': vectors.param('warmup_lr_init'), 'epochs': len(expected)}
  staircase = schedules.make_schedule(
    'overlaid_cosine', vectors.param('base_lr'), steps_per_epoch=3, **options
  )
  by_step = jax.jit(jax.vmap(staircase))(np.arange(3 * len(expected)))
  assert_close(by_step, np.repeat(expected, 3), 1e-6)
  with pytest.raises(ValueError, match='warmup_epochs=5'):
    schedules.overlaid_cosine(0.1, 5, 5)
  with pytest.raises(ValueError, match=r'warmup_epochs=5: .* fewer than half of epochs=10'):
    schedules.make_schedule('overlaid_cosine', 0.1, epochs=10, steps_per_epoch=3, warmup_epochs=5)
  with pytest.raises(ValueError, match='whole epochs'):
    schedules.make_schedule('overlaid_cosine', 0.1, epochs=5, steps_per_epoch=3, warmup_epochs=0.5)
