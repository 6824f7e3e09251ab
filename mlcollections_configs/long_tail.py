"""Claims, as settings write them."""


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
