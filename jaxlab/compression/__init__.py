"""Making a trained network small: which channels stay, by scores of all of them."""

from jaxlab.compression.ranking import global_ranking

__all__ = ['global_ranking']
