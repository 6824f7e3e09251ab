"""QwT on small networks trained here: vision transformers and a ResNet on digits, a byte-level GPT-2.

  python -m experiments.qwt

`vit_massive` starts with two position-embedding entries of +-15, which become massive activations. Every
network is trained once (a few minutes together) and kept in `networks_dir` for the papers that ask for it.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = ConfigDict()
  config.seed = 0
  config.networks = ('vit', 'vit_massive', 'resnet', 'text')
  config.networks_dir = 'runs/networks'
  config.bits = ('8w8a', '6w6a', '4w4a', '3w3a', '2w3a')
  config.calibration = dict(ranges=64, compensation=512, batch_size=32)
  config.qwt = dict(method=dict(), options=dict(dtype='float16', target='local', start_block=0))
  config.qwt.fine_tuning = fine_tuning()
  config.network = dict(
    vit=vit(), vit_massive={**vit(), 'massive': massive()}, resnet=resnet(), text=text()
  )
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.claims = tuple(
    gain('QwT', network, '2w3a', margin)
    for network, margin in (('vit', 4.0), ('vit_massive', 4.0), ('resnet', 0.0))
  )
  config.claims += tuple(
    lower('QwT', network, '2w3a', margin)
    for network, margin in (('vit', 0.3), ('vit_massive', 0.3), ('resnet', 0.1), ('text', 0.1))
  )
  config.claims += tuple(
    gain('QwT', network, bits, -0.5) for network in ('vit', 'resnet') for bits in ('4w4a', '8w8a')
  )
  config.claims += tuple(
    gain('QwT*', network, '2w3a', margin, baseline)
    for network in ('vit', 'resnet')
    for baseline, margin in (('QwT', 0.0), ('PTQ*', 1.0))
  )
  return config


def fine_tuning() -> dict:
  """Returns the training of QwT*: one epoch, as in the paper, which gives no settings of the optimizer.

  The loss is that of the float networks' own training.
  """
  return dict(
    tasks=('classification',),
    bits='lowest',
    epochs=1,
    batch_size=32,
    optimizer=dict(name='adamw', weight_decay=0.05),
    schedule=dict(name='cosine', base=1e-4),
    label_smoothing=0.0,
    head=r'head|head_dist|head/fc|fc|lm_head',
    log_every=20,
    checkpoint_every=1000,
  )


def gain(method: str, network: str, bits: str, margin: float, baseline: str = 'PTQ') -> dict:
  """Returns the claim that `method` is at least `margin` points of accuracy above `baseline`."""
  how = f'at least {margin:g} points above' if margin > 0 else f'within {-margin:g} points of'
  return dict(
    statement=f'{network} at {bits}: accuracy {how if margin else "not below"} {baseline}',
    metric=f'{network}_{bits}_accuracy',
    baseline=baseline,
    method=method,
    higher_is_better=True,
    margin=margin,
  )


def lower(method: str, network: str, bits: str, margin: float) -> dict:
  """Returns the claim that the logits' squared error is cut by at least a share `margin`."""
  return dict(
    statement=f'{network} at {bits}: squared error of the logits at least {margin:.0%} lower',
    metric=f'{network}_{bits}_logit_mse_ratio',
    baseline='PTQ',
    method=method,
    higher_is_better=False,
    margin=margin,
  )


def massive() -> tuple[tuple[int, int, float], ...]:
  """Returns (token, channel, value) of the position embedding from which massive activations grow."""
  return ((0, 0, 15.0), (0, 1, -15.0))


def digits() -> dict:
  """Returns the data: scikit-learn's 8x8 digits."""
  return dict(
    name='digits',
    train_split='train',
    test_split='test',
    train_options=dict(),
    test_options=dict(),
    train_size=1297,
    stored_image=(8, 8, 1),
    image_size=8,
    channels=1,
    mean=0.305,
    std=0.376,
  )


def vit() -> dict:
  """Returns a vision transformer of three blocks on digits."""
  return dict(
    task='classification',
    model=dict(
      name='vit_tiny_patch2_8', width=64, depth=3, num_heads=4, mlp_ratio=2.0, num_classes=10
    ),
    data=digits(),
    batch_size=64,
    eval_batch_size=512,
    epochs=40,
    optimizer=dict(name='adamw', weight_decay=0.05),
    schedule=dict(name='cosine', base=1e-3, warmup_epochs=2),
    log_every=200,
    checkpoint_every=1000,
    quantization='repq',
    blocks=r'blocks_\d+',
  )


def resnet() -> dict:
  """Returns a ResNet of three basic blocks on digits."""
  return dict(
    task='classification',
    model=dict(
      name='cifar_resnet18', stage_sizes=(1, 1, 1), strides=(1, 2, 2), width=16, num_classes=10
    ),
    data=digits(),
    batch_size=64,
    eval_batch_size=512,
    epochs=20,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=5e-4),
    schedule=dict(name='cosine', base=0.05),
    log_every=200,
    checkpoint_every=1000,
    quantization='percentile',
    conv_act_bits=None,
    blocks=r'layer\d_\d+',
  )


def text() -> dict:
  """Returns a byte-level GPT-2 of three blocks on the prose that ships with Python."""
  return dict(
    task='language',
    model=dict(name='gpt2', width=64, depth=3, num_heads=4, vocab_size=256, max_length=64),
    data=dict(
      name='text',
      train_split='train',
      test_split='test',
      train_options=dict(length=64, stride=16, limit=20000),
      test_options=dict(length=64),
      train_size=20000,
      length=64,
    ),
    batch_size=32,
    eval_batch_size=128,
    epochs=1,
    optimizer=dict(name='adamw', weight_decay=0.1),
    schedule=dict(name='cosine', base=3e-3, warmup_epochs=0.1),
    log_every=100,
    checkpoint_every=1000,
    quantization='repq',
    edges=None,
    blocks=r'h_\d+',
  )
