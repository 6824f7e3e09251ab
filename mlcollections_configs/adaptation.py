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


def derived_network(name: str = 'digit_tasks', canvas: int = 16, **options) -> dict:
  """Returns a vision transformer of six blocks, trained on the classes of objects on plain canvases."""
  return dict(
    data=dict(derived_data(name, 'plain', 10, canvas, 5000)),
    model=dict(
      name='vit_tiny_patch4_16', image_size=canvas, width=64, depth=6, num_heads=4, mlp_ratio=2.0,
      num_classes=10,
    ),
    recipe=dict(
      epochs=16,
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
