"""Cluster-Branch-Train-Merge on Ray: many small language models, trained apart and used together.

Cluster: `corpus` reads the documents, and `cluster` sorts them by topic into K clusters of equal size.
Branch: `branch` copies one seed model K times, gives each copy one cluster, and launches its training on Ray.
Train: `train` turns each copy into an expert on its own cluster, and no expert exchanges anything with another.
Merge: `merge` weighs the experts by the context and mixes their next-token probabilities, `decode` writes text with them,
and `evaluate` and `report` measure them against a dense model of the same training tokens.

Nothing is imported here. The public API is what these modules name; everything else may change:

    cluster.kmeans               BalancedKMeans, a scikit-learn estimator
    cluster.embed                TokenTfidf; cluster.word_tfidf: WordTfidf; cluster.sentence_encoder: SentenceEncoder
    merge.routers                Route: from whole documents to weights over experts; merge.context_router: token by token
    merge.mixture                mix_logprobs, average_weights
    merge.ensemble               load_ensemble: experts, embedder and centers of a finished run
    decode.engine                Engine; decode.sequence: Request, Step; decode.sampling: Sampling
    load_config, run, pipeline   load_config, Run, run_all: a run from Python
    errors                       UserError, a ValueError written for people
"""
