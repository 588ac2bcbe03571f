"""Which attention layers matter: a scorer takes a model and gives a ranking, its controls beside it.

`METHODS` is the one table of scorers. Imports no torch until a model is scored, so that a plan can name the
cost at once.
"""

from hybridize.importance.correlation import rank_correlation
from hybridize.importance.cost import rank_cost
from hybridize.importance.methods import METHODS, Method, rank_layers
from hybridize.importance.ranking import FORMAT, LayerOrder, Ranking, load_ranking, save_ranking
from hybridize.importance.search_result import FoundLayout, SearchResult, load_search, save_search, search_layout

__all__ = [
    "FORMAT",
    "METHODS",
    "FoundLayout",
    "LayerOrder",
    "Method",
    "Ranking",
    "SearchResult",
    "load_ranking",
    "load_search",
    "rank_correlation",
    "rank_cost",
    "rank_layers",
    "save_ranking",
    "save_search",
    "search_layout",
]
