"""Networks whose activations grow large, which several papers train in ways of their own.

Each is a section: its data, its model and its training from scratch.
"""


def digits_vit(base: float) -> dict:
  """Returns a narrow vision transformer on digits, 312 steps of AdamW at the learning rate `base`.

  Kernels are drawn with PyTorch's deviation; drawn with timm's 0.02, so narrow a network hardly learns at the
  rates that make outliers, there and here.
  """
  return dict(
    data=dict(name='digits'),
    model=dict(
      name='vit_tiny_patch2_8', width=48, depth=4, num_heads=4, mlp_ratio=2.0, num_classes=10
    ),
    fan_in_scaled=('.*/(qkv|proj|fc1|fc2)/kernel', 'head/kernel'),
    recipe=dict(
      epochs=24,
      batch_size=96,
      optimizer=dict(name='adamw'),
      schedule=dict(name='cosine', base=base, warmup_epochs=100 / 13),
    ),
  )


def imagenet(name: str, drop_path: float, warmup_epochs: int) -> dict:
  """Returns a transformer on ImageNet: the recipe of DeiT and Swin, 300 epochs at batch 1024.

  Without random erasing and label smoothing.
  """
  return dict(
    data=dict(name='imagenet2012'),
    augment=dict(
      kind='resized_crop',
      interpolation='bicubic',
      rand_augment=dict(magnitude=9.0, magnitude_std=0.5, num_ops=2, increasing=True),
    ),
    model=dict(name=name, drop_path=drop_path),
    recipe=dict(
      epochs=300,
      batch_size=1024,
      precision='bfloat16',
      mixup=0.8,
      cutmix=1.0,
      mix_partners='flip',
      optimizer=dict(name='adamw', weight_decay=0.05, no_decay=('ndim<=1',)),
      schedule=dict(
        name='cosine', base=1e-3, end=1e-5, warmup_epochs=warmup_epochs, warmup_start=1e-6
      ),
    ),
  )


def gpt2() -> dict:
  """Returns GPT-2 (124M) on files of tokens: nanoGPT's constants, a batch that 256 chips divide.

  The vocabulary is filled up, so that its table divides over chips, too.
  """
  windows = dict(vocab_size=50257, length=1024)
  return dict(
    data=dict(
      name='tokens',
      train_split='train.npy',
      test_split='validation.npy',
      train_options=windows,
      test_options=windows,
      train_size=8823810,
      length=1024,
    ),
    model=dict(name='gpt2', vocab_size=50304),
    recipe=dict(
      epochs=35,
      batch_size=512,
      precision='bfloat16',
      optimizer=dict(
        name='adamw',
        weight_decay=0.1,
        betas=(0.9, 0.95),
        no_decay=('ndim<=1',),
        clip_global_norm=1.0,
      ),
      schedule=dict(name='cosine', base=6e-4, end=6e-5, warmup_epochs=0.12),
    ),
  )
