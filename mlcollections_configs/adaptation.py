"""Frozen networks and tasks that settings of parameter-efficient tuning have in common."""

# Derived tasks: group and number of classes.
DERIVED = dict(
  texture=('natural', 10),
  noise=('specialized', 10),
  rotation=('structured', 4),
  count=('structured', 4),
  quadrant=('structured', 4),
  size=('structured', 4),
)


def derived_network(name: str = 'digit_tasks', canvas: int = 16, depth: int = 4, **options) -> dict:
  """Returns a small vision transformer, trained on the classes of objects on plain canvases."""
  return dict(
    data=derived_data(name, 'plain', 10, canvas, 3000),
    model=dict(
      name='vit_tiny_patch4_16', image_size=canvas, width=64, depth=depth, num_heads=4, mlp_ratio=2.0,
      num_classes=10,
    ),
    recipe=dict(
      epochs=8,
      batch_size=64,
      optimizer=dict(name='adamw', weight_decay=0.05),
      schedule=dict(name='cosine', base=1e-3, warmup_epochs=2),
    ),
    **options,
  )  # fmt: skip


def derived_data(name: str, task: str, num_classes: int, canvas: int, length: int = 1000) -> dict:
  """Returns the images of a derived task."""
  return dict(
    name=name,
    train_options=dict(task=task, canvas=canvas, length=length),
    test_options=dict(task=task, canvas=canvas, length=1000),
    stored_image=(canvas, canvas, 1),
    train_size=length,
    num_classes=num_classes,
  )


def derived_targets(name: str = 'digit_tasks', canvas: int = 16) -> dict:
  """Returns the derived tasks of 1000 images each."""
  return {
    task: dict(group=group, data=derived_data(name, task, classes, canvas))
    for task, (group, classes) in DERIVED.items()
  }


def recipe(epochs: int, warmup: int, base: float = 1e-3, batch_size: int = 32) -> dict:
  """Returns timm's schedule, `warmup` epochs behind its cosine, and AdamW without decay of biases."""
  return dict(
    epochs=epochs + warmup,
    batch_size=batch_size,
    optimizer=dict(name='adamw', weight_decay=0.05, no_decay=('.*bias',)),
    schedule=dict(
      name='overlaid_cosine', base=base, end=1e-8, warmup_epochs=warmup, warmup_start=1e-7
    ),
  )


# VTAB-1k: group and number of classes.
VTAB = dict(
  cifar_100=('natural', 100), caltech101=('natural', 102), dtd=('natural', 47),
  flowers102=('natural', 102), pets=('natural', 37), svhn=('natural', 10), sun397=('natural', 397),
  patch_camelyon=('specialized', 2), eurosat=('specialized', 10), resisc45=('specialized', 45),
  diabetic_retinopathy=('specialized', 5), clevr_count=('structured', 8),
  clevr_dist=('structured', 6), dmlab=('structured', 6), kitti=('structured', 4),
  dsprites_loc=('structured', 16), dsprites_ori=('structured', 16),
  smallnorb_azi=('structured', 18), smallnorb_ele=('structured', 9),
)  # fmt: skip

VIT_BASE = dict(name='vit_base_patch16_224', weights='vit_base_patch16_224.orig_in21k')
SWIN_BASE = dict(
  name='swin_base_patch4_window7_224', weights='swin_base_patch4_window7_224.ms_in22k'
)


def vtab_targets() -> dict:
  """Returns the 19 tasks of VTAB-1k: resized to 224x224 whatever the aspect, no augmentation."""
  decode = dict(size=224, stretch=True, interpolation='bicubic')
  return {
    task: dict(
      group=group,
      data=dict(
        name='vtab', train_options=dict(task=task), test_options=dict(task=task), train_size=1000,
        stored_image=(224, 224, 3), num_classes=classes, train_decode=decode, test_decode=decode,
        num_threads=8, mean=0.5, std=0.5,
      ),
    )
    for task, (group, classes) in VTAB.items()
  }  # fmt: skip


def public_network(own: dict, data: dict) -> dict:
  """Returns a network with public weights for images like `data`."""
  return dict(model=dict(name=own['name']), pretrained=own['weights'], data=data)


# Classes, and folders of lists and of photographs in NOAH's repository.
FEW_SHOT = dict(
  aircraft=(100, 'fgvc-aircraft', 'images'), food101=(101, 'food101', 'images'),
  flowers=(102, 'oxford-flowers102', 'images'), pets=(37, 'oxford-pets', 'images'),
  cars=(196, 'standford-cars', ''),
)  # fmt: skip
SHOTS = (1, 2, 4, 8, 16)
FINE = dict(
  kind='resized_crop',
  interpolation='bicubic',
  rand_augment=dict(magnitude=9.0, magnitude_std=0.5, num_ops=2, increasing=True),
)


def photographs(num_classes: int, **fields) -> dict:
  """Returns photographs whose test images are resized to 256x256 and cut to the central 224x224.

  Training images are stretched to 256x256 too, from which crops are made on the device: other than in crops
  of the original, shapes are distorted by its aspect, and details are lost beyond 256 pixels a side.
  """
  return dict(
    stored_image=(256, 256, 3), image_size=224, num_classes=num_classes, num_threads=8, mean=0.5,
    std=0.5, train_decode=dict(size=256, stretch=True, interpolation='bicubic'),
    test_decode=dict(size=224, resize=256, stretch=True, interpolation='bicubic'), **fields,
  )  # fmt: skip


def few_shot_targets() -> dict:
  """Returns five fine-grained sets with 1 to 16 images a class, by published lists (`path label`).

  Folders are those of NOAH's repository (github.com/ZhangYuanhan-AI/NOAH): lists in
  `data/few-shot/<folder>/annotations`, photographs below `data/few-shot/<folder>/images` (cars: below the
  folder itself). With one shot the list of the pets names the image of each class twice.
  """

  def target(name: str, shots: int) -> dict:
    classes, folder, photos = FEW_SHOT[name]
    root = f'data/few-shot/{folder}'
    lists = f'{root}/annotations'
    options = dict(root=f'{root}/{photos}'.rstrip('/'), decode=False, num_classes=classes)
    count = classes * (2 if name == 'pets' and shots == 1 else shots)
    return dict(
      group=f'{shots}_shot',
      augment=FINE,
      validation=f'{lists}/val_meta.list',
      data=photographs(
        classes, name='listed_images', train_options=options, test_options=options,
        train_split=f'{lists}/train_meta.list.num_shot_{shots}.seed_{{seed}}',
        test_split=f'{lists}/test_meta.list', train_size=count,
      ),
    )  # fmt: skip

  return {f'{name}_{shots}': target(name, shots) for shots in SHOTS for name in FEW_SHOT}


SHIFTED = dict(
  imagenet=('imagenet2012', 'validation'),
  v2=('imagenet_v2', 'test'),
  sketch=('imagenet_sketch', 'test'),
  a=('imagenet_a', 'test'),
  r=('imagenet_r', 'test'),
)


def shifted_targets() -> dict:
  """Returns ImageNet with 16 images a class, judged on its validation images and on four other sets."""

  def images(name: str, split: str) -> dict:
    options = dict(decode=False)
    return photographs(
      1000, name=name, train_options=options, test_options=options, test_split=split,
      train_size=1281167,
    )  # fmt: skip

  train = images('imagenet2012', 'validation')
  return {
    task: dict(group=task, augment=FINE, shots=16, data=train, test=images(name, split))
    for task, (name, split) in SHIFTED.items()
  }
