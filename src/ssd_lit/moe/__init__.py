"""The method, in plain torch and scikit-learn: neuron order, clustering, similarity, routers, backends."""
