"""Cluster-Branch-Train-Merge on Ray: cluster a corpus, branch a seed LM, train the experts apart, merge their outputs."""
