"""Data sections of photographs in files, brought to one size; the device cuts parts of them at random."""


def photographs(
  name: str,
  root: str,
  num_classes: int,
  train_size: int,
  *,
  size: int = 256,
  view: int = 224,
  test_resize: int = 256,
  **options: str,
) -> dict:
  """Returns a data section: images of `size` pixels on the host, of which `view` are cut.

  Args:
    name: 'image_folder' or 'listed_images'.
    root: folder of the images.
    num_classes: of the labels.
    train_size: training images.
    size: side of the middle of training images, whose shorter side is brought to it.
    view: side of what the network sees.
    test_resize: shorter side of test images, of whose middle `view` pixels are cut out.
    **options: further entries.
  """
  return dict(
    name=name, num_classes=num_classes, train_size=train_size,
    train_options=dict(root=root, decode=False), test_options=dict(root=root, decode=False),
    train_decode=dict(size=size, draft=True), test_decode=dict(size=view, resize=test_resize),
    stored_image=(size, size, 3), image_size=view, num_threads=16, num_workers=8,
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), **options,
  )  # fmt: skip
