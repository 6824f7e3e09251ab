"""How numbers of channels are scaled."""


def make_divisible(value: float, divisor: int = 8, minimum: int = 1) -> int:
  """Returns the multiple of `divisor` nearest to `value`, the next one where that lost more than a tenth.

  `n = max(minimum, int(value + divisor / 2) // divisor * divisor)`, plus `divisor` if `n < 0.9 value`.

  >>> [make_divisible(value) for value in (16, 19.2, 9.6)]
  [16, 24, 16]

  Raises:
    ValueError: for a value, divisor or minimum that is not positive.
  """
  if not (value > 0 and divisor > 0 and minimum > 0):
    raise ValueError(f'expected positive numbers, got {value=}, {divisor=}, {minimum=}.')
  found = max(minimum, int(value + divisor / 2) // divisor * divisor)
  return found + divisor if found < 0.9 * value else found
