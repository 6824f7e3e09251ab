"""Float networks and claims that settings of post-training quantization have in common.

Each network is a section: its data, its model or public weights, its training, how it is quantized.
"""


def digits_networks() -> dict:
  """Returns small networks of digits and of text, minutes of training together.

  `vit_massive` starts with two position-embedding entries of +-15, which become massive activations.
  """
  # The byte-level GPT-2 reads the prose that ships with Python.
  prose = dict(
    name='text',
    train_options=dict(length=64, stride=16, limit=20000),
    test_options=dict(length=64),
    train_size=20000,
    length=64,
  )
  return dict(
    vit=vit(dict(name='digits')),
    vit_massive=vit(dict(name='digits')) | dict(massive=((0, 0, 15.0), (0, 1, -15.0))),
    resnet=resnet(dict(name='digits')),
    text=dict(
      data=prose,
      model=dict(name='gpt2', width=64, depth=3, num_heads=4, vocab_size=256, max_length=64),
      recipe=dict(
        epochs=1,
        batch_size=32,
        optimizer=dict(name='adamw', weight_decay=0.1),
        schedule=dict(name='cosine', base=3e-3, warmup_epochs=0.1),
      ),
    ),
  )


def fashion_networks() -> dict:
  """Returns a transformer and a ResNet of the first 10240 training images of Fashion-MNIST."""
  data = dict(
    name='fashion_mnist',
    train_options=dict(limit=10240),
    test_options=dict(limit=4000),
    train_size=10240,
  )
  return dict(
    vit=vit(data, 'vit_tiny_patch4_28', epochs=12, batch_size=128),
    resnet=resnet(data, strides=(2, 2, 2), epochs=4, batch_size=128),
  )


def vit(
  data: dict, name: str = 'vit_tiny_patch2_8', epochs: int = 40, batch_size: int = 64
) -> dict:
  """Returns a vision transformer of three blocks."""
  return dict(
    data=data,
    model=dict(name=name, width=64, depth=3, num_heads=4, mlp_ratio=2.0, num_classes=10),
    recipe=dict(
      epochs=epochs,
      batch_size=batch_size,
      optimizer=dict(name='adamw', weight_decay=0.05),
      schedule=dict(name='cosine', base=1e-3, warmup_epochs=2),
    ),
  )


def resnet(data: dict, strides: tuple = (1, 2, 2), epochs: int = 20, batch_size: int = 64) -> dict:
  """Returns a ResNet of three basic blocks."""
  return dict(
    data=data,
    model=dict(
      name='cifar_resnet18', stage_sizes=(1, 1, 1), strides=strides, width=16, num_classes=10
    ),
    recipe=dict(
      epochs=epochs,
      batch_size=batch_size,
      optimizer=dict(name='sgd', momentum=0.9, weight_decay=5e-4),
      schedule=dict(name='cosine', base=0.05),
    ),
    quantization='percentile',
  )


IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

# network: (weights of timm, normalization, length of the shorter side before the central crop of 224)
PUBLIC = {
  'deit_tiny': ('deit_tiny_patch16_224.fb_in1k', IMAGENET, 256),
  'deit_small': ('deit_small_patch16_224.fb_in1k', IMAGENET, 256),
  'deit_base': ('deit_base_patch16_224.fb_in1k', IMAGENET, 256),
  'deit_tiny_distilled': ('deit_tiny_distilled_patch16_224.fb_in1k', IMAGENET, 256),
  'deit_small_distilled': ('deit_small_distilled_patch16_224.fb_in1k', IMAGENET, 256),
  'deit_base_distilled': ('deit_base_distilled_patch16_224.fb_in1k', IMAGENET, 256),
  'vit_small': ('vit_small_patch16_224.augreg_in21k_ft_in1k', HALF, 248),
  'vit_base': ('vit_base_patch16_224.augreg_in21k_ft_in1k', HALF, 248),
  'swin_tiny': ('swin_tiny_patch4_window7_224.ms_in1k', IMAGENET, 248),
  'swin_small': ('swin_small_patch4_window7_224.ms_in1k', IMAGENET, 248),
  'swin_base': ('swin_base_patch4_window7_224.ms_in1k', IMAGENET, 248),
  'resnet18': ('resnet18.tv_in1k', IMAGENET, 256),
  'resnet50': ('resnet50.tv_in1k', IMAGENET, 256),
  'resnet101': ('resnet101.tv_in1k', IMAGENET, 256),
}


def imagenet_networks() -> dict:
  """Returns networks of ImageNet with public weights.

  Calibration images are under bicubic random resized crops, flips and RandAugment (timm's
  rand-m9-mstd0.5-inc1) as in QwT's code, which crops from the full photograph (here: from its center of
  256x256).
  """
  augment = dict(
    kind='resized_crop',
    interpolation='bicubic',
    rand_augment=dict(magnitude=9.0, magnitude_std=0.5, num_ops=2, increasing=True),
  )
  found = {}
  for name, (weights, normalization, resize) in PUBLIC.items():
    # torchvision's own recipe is bilinear, those of timm's transformers are bicubic.
    kernel = 'bilinear' if weights.endswith('.tv_in1k') else 'bicubic'
    decode = dict(size=224, resize=resize, interpolation=kernel)
    found[name] = dict(
      data=dict(name='imagenet2012', test_decode=decode, **normalization),
      augment=augment,
      model=dict(name=weights.partition('.')[0]),
      pretrained=weights,
      # conv_act_bits=8 gives what QwT's code does to ResNets, whatever bits are asked for.
      quantization='percentile' if name.startswith('resnet') else 'repq',
    )
  return found


def gain(method: str, network: str, bits: str, margin: float, baseline: str = 'PTQ') -> dict:
  """Returns the claim that `method` is at least `margin` points of accuracy above `baseline`."""
  how = f'at least {margin:g} points above' if margin > 0 else f'within {-margin:g} points of'
  return dict(
    statement=f'{network} at {bits}: accuracy {how if margin else "not below"} {baseline}',
    metric=f'{network}_{bits}_accuracy',
    baseline=baseline,
    method=method,
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
