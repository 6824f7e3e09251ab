"""What the configurations of the long-tail papers are made of: stages, data sets, claims.

Constants without a source in a comment are those of the code of LDAM-DRW, BagofTricks-LT, MiSLAS or BTM.
"""

from ml_collections import ConfigDict

# All of the classifier anew, over a network that stays as it is.
CLASSIFIER = dict(fresh=('head/.*',), frozen=('backbone/.*',), eval_mode=('backbone',))
# Learnable weight scaling (LWS, Kang et al. 2020): only the classes' factors over a trained classifier.
SCALING = dict(
  head='scaled',
  fresh=('head/scale',),
  frozen=('backbone/.*', 'head/kernel', 'head/bias'),
  eval_mode=('backbone',),
)
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def stage(
  title: str,
  role: str,
  *,
  loss: str | dict = 'cross_entropy',
  epochs: int,
  batch_size: int,
  schedule: dict,
  optimizer: dict,
  head: str = 'linear',
  start: str | None = None,
  fresh: tuple[str, ...] = (),
  pretrained: str | None = None,
  teacher: str | None = None,
  frozen: tuple[str, ...] = (),
  eval_mode: tuple[str, ...] = (),
  sampler: str | None = None,
  mixup: float = 0.0,
  cap: int | None = None,
  holdout: float = 0.0,
) -> dict:
  """Returns a stage of training, see `experiments/supervised.py`."""
  return dict(
    title=title,
    role=role,
    loss=dict(name=loss) if isinstance(loss, str) else dict(loss),
    epochs=epochs,
    batch_size=batch_size,
    schedule=dict(schedule),
    optimizer=dict(optimizer),
    head=head,
    start=start,
    fresh=fresh,
    pretrained=pretrained,
    teacher=teacher,
    frozen=frozen,
    eval_mode=eval_mode,
    sampler=sampler,
    mixup=mixup,
    cap=cap,
    holdout=holdout,
  )


def recipe(
  epochs: int,
  batch_size: int,
  base: float,
  weight_decay: float,
  schedule: str = 'cosine',
  **options,
) -> dict:
  """Returns the training of a stage: SGD with momentum 0.9; `options` are those of the schedule."""
  return dict(
    epochs=epochs,
    batch_size=batch_size,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=weight_decay),
    schedule=dict(name=schedule, base=base, **options),
  )


def base() -> ConfigDict:
  """Returns what all configurations have; data, network, stages and claims are missing."""
  config = ConfigDict()
  config.seed = 0
  config.features = ''
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.augment = dict(kind='none')
  config.groups = dict(many=100, few=20)
  config.eval_batch_size = 512
  config.log_every = 100
  config.checkpoint_every = 2000
  config.claims = ()
  return config


def set_stages(config: ConfigDict, stages: dict, skip: tuple[str, ...] = ()) -> None:
  """Sets the stages and runs them in their order, but for those of `skip`, which others ask for."""
  config.stages = stages
  config.runs = tuple(name for name in stages if name not in skip)


def claim(
  statement: str, metric: str, baseline: str, method: str, margin: float, higher: bool = True
) -> dict:
  """Returns the claim that `metric` of row `method` is at least `margin` better than that of `baseline`."""
  return dict(
    statement=statement,
    metric=metric,
    baseline=baseline,
    method=method,
    higher_is_better=higher,
    margin=margin,
  )


def set_digits(config: ConfigDict, ratio: float) -> None:
  """Sets scikit-learn's 8x8 digits, long-tailed with a head of 100, and a perceptron.

  70 test images a class are drawn first. Groups by images: many above 50, few below 20.
  """
  config.data = dict(
    name='digits',
    num_classes=10,
    train_split='train',
    test_split='test',
    train_options=dict(),
    test_options=dict(),
    stored_image=(8, 8, 1),
    image_size=8,
    channels=1,
    dtype='uint8',
    mean=0.0,
    std=1.0,
    long_tail=dict(kind='split', max_count=100, ratio=ratio, test_per_class=70),
  )
  config.groups = dict(many=50, few=20)
  config.model = dict(backbone=dict(name='mlp', hidden=(64, 64)), head_init='torch')


def digits_recipe(epochs: int = 60) -> dict:
  """Returns the training of the perceptron: batch 32, learning rate 0.1 to 0 by a cosine over steps."""
  return recipe(epochs, 32, 0.1, 5e-4)


def set_fashion_mnist(config: ConfigDict, max_count: int = 500, ratio: float = 100.0) -> None:
  """Sets long-tailed Fashion-MNIST, its whole test split, and a small residual network."""
  config.data = dict(
    name='fashion_mnist',
    num_classes=10,
    train_split='train',
    test_split='test',
    train_options=dict(),
    test_options=dict(),
    stored_image=(28, 28, 1),
    image_size=28,
    channels=1,
    dtype='uint8',
    mean=0.286,
    std=0.353,
    long_tail=dict(kind='exponential', max_count=max_count, ratio=ratio, selection_seed=0),
  )
  config.groups = dict(many=100, few=20)
  backbone = dict(name='cifar_resnet18', stage_sizes=(1, 1, 1), strides=(2, 2, 2), width=16)
  config.model = dict(backbone=backbone, head_init='torch')


def set_cifar(config: ConfigDict, num_classes: int, ratio: float = 100.0) -> None:
  """Sets CIFAR-10-LT or CIFAR-100-LT with ResNet-32 (option-A shortcuts, Kaiming fan-in everywhere).

  Groups of the latter by images: many above 100, few below 20. No class of the former has so few: the three
  largest of ten are its head, the three smallest its tail.
  The published selection (NumPy's legacy generator, seed 0) out of TFDS' order of the images.
  """
  config.data = dict(
    name=f'cifar{num_classes}',
    num_classes=num_classes,
    train_split='train',
    test_split='test',
    train_options=dict(),
    test_options=dict(),
    stored_image=(32, 32, 3),
    image_size=32,
    channels=3,
    dtype='uint8',
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
    num_threads=8,
    long_tail=dict(
      kind='exponential', max_count=50000 // num_classes, ratio=ratio, selection_seed=0
    ),
  )
  config.groups = dict(boundaries=(3, 7)) if num_classes == 10 else dict(many=100, few=20)
  config.augment = dict(kind='pad_crop', padding=4, flip=True)
  config.model = dict(backbone=dict(name='cifar_resnet32'), head_init='kaiming')


def cifar_recipe(epochs: int = 200) -> dict:
  """Returns BagofTricks-LT's training: lr/3 to 0.1 in 5 epochs, a hundredth from 120 and again from 160."""
  return recipe(
    epochs, 128, 0.1, 2e-4, 'multistep',
    milestones=(120, 160), factor=0.01, warmup_epochs=5, warmup_start=0.1 / 3, staircase=True,
  )  # fmt: skip


def ldam_recipe() -> dict:
  """Returns LDAM's training: lr e / 5 in epoch e = 1 ... 5, a hundredth from 161 and again from 181."""
  return recipe(
    200, 128, 0.1, 2e-4, 'multistep',
    milestones=(160, 180), factor=0.01, warmup_epochs=5, warmup_start=0.02, warmup_inclusive=True,
    staircase=True,
  )  # fmt: skip


# Published lists: classes, training images, most and fewest of a class.
LISTED = {
  'ImageNet_LT': (1000, 115846, 1280, 5),
  'Places_LT': (365, 62500, 4980, 5),
  'iNaturalist18': (8142, 437513, 1000, 2),
}


def set_listed(config: ConfigDict, name: str, folder: str = 'data', **normalization) -> None:
  """Sets a data set of published text lists, `<folder>/<name>_train.txt` and so on.

  Photographs lie below `data.{train,test}_options.root` at the listed paths; for GML, which chooses tau on
  them, those of the validation list below `data.validation_options.root`. They are decoded to 256x256
  (shorter side, center) on the host and cropped from there on the device: random crops of 8 to 100 % of the
  area to 224, flips and color jitter (0.4, 0.4, 0.4, no hue); tests see the central 224.
  """
  classes, size, most, fewest = LISTED[name]
  root = f'{folder}/{name}'

  def listed(split: str) -> dict:
    return dict(path=f'{folder}/{name}_{split}.txt', root=root, decode=False)

  config.data = dict(
    name=name,
    num_classes=classes,
    train_options=listed('train'),
    test_options=listed('val' if name == 'iNaturalist18' else 'test'),
    validation_options=None if name == 'iNaturalist18' else listed('val'),
    train_decode=dict(size=256, draft=True),
    test_decode=dict(size=224, resize=256),
    train_size=size,
    stored_image=(256, 256, 3),
    image_size=224,
    channels=3,
    dtype='uint8',
    num_threads=16,
    num_workers=16,
    long_tail=dict(kind='listed', max_count=most, ratio=most / fewest),
    **(normalization or IMAGENET),
  )
  config.augment = dict(
    kind='resized_crop',
    scale=(0.08, 1.0),
    jitter=(0.4, 0.4, 0.4, 0.0),
    jitter_probability=1.0,
    grayscale_probability=0.0,
    blur_probability=0.0,
    flip_probability=0.5,
  )
  config.checkpoint_every = 5000


INATURALIST = dict(mean=(0.466, 0.471, 0.380), std=(0.195, 0.194, 0.192))

# ResNet-152 with one more bottleneck (2048-512-2048) at its end, `layer4_3`; all before it is public, frozen.
PLACES_BACKBONE = dict(name='resnet152', stage_sizes=(3, 8, 36, 4))
_PUBLIC_BLOCKS = r'bn1|layer[123]_\d+|layer4_[012]'
PLACES_STAGE = dict(
  pretrained='resnet152.tv_in1k',
  fresh=('head/.*', 'backbone/layer4_3/.*'),
  frozen=(rf'backbone/(conv1|{_PUBLIC_BLOCKS})/.*',),
  eval_mode=(rf'backbone/({_PUBLIC_BLOCKS})',),
)
