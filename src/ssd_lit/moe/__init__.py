"""The method, in plain torch and scikit-learn: neuron order, clustering, similarity, routers, backends."""

from ssd_lit.moe.clustering import balanced_kmeans
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.permutation import moefy, reorder_neurons
from ssd_lit.moe.similarity import pattern_similarity

__all__ = ["ExpertFFN", "balanced_kmeans", "moefy", "pattern_similarity", "reorder_neurons"]
