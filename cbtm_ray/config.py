"""The configuration of a run: a tree of frozen dataclasses, read from strict YAML.

Every field says what it is and in which unit. Bounds are part of the types, so that a wrong value is refused where
the configuration is built. A new field is part of what the stages of its section depend on (`stages.STAGE_SETTINGS`), unless
its type is marked `Execution`; and a new field of `train` also of what the seed does, unless it is marked `ExpertsOnly`.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from cbtm_ray.errors import UserError


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "must be a number")
    return value


def _as_ray_counts(gpus: float) -> float:
    if 0 < gpus < LEAST_SHARE or (gpus > 1 and gpus % 1):
        raise PydanticCustomError("gpus", f"must be 0, a share from {LEAST_SHARE:.4f} to 1, or a whole number")
    return gpus


LEAST_SHARE = 1e-4
"""Of a CPU or GPU: the least that Ray counts."""
_NUMBER = BeforeValidator(_no_boolean)
Count = Annotated[int, Field(ge=1, strict=True)]
NonNegative = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), _NUMBER]
Cpus = Annotated[float, Field(ge=LEAST_SHARE, allow_inf_nan=False), _NUMBER]
Gpus = Annotated[float, Field(ge=0, allow_inf_nan=False), _NUMBER, AfterValidator(_as_ray_counts)]
Tunable = Annotated[float, Field(ge=1e-6, le=1e6), _NUMBER]
FromZero = Annotated[float, Field(ge=0, allow_inf_nan=False), _NUMBER]
BelowOne = Annotated[float, Field(ge=0, lt=1), _NUMBER]
Fraction = Annotated[float, Field(ge=0, le=1), _NUMBER]
Text = Annotated[str, Field(pattern=r"\S")]

PartitionControl = Literal["random", "unbalanced", "metadata"]
Control = Literal[PartitionControl, "moe"]
Routing = Literal["embedding", "ngram", "posterior", "prefix", "uniform", "bayes"]
PARTITION_CONTROLS: tuple[PartitionControl, ...] = get_args(PartitionControl)
CONTROLS: tuple[Control, ...] = get_args(Control)

_STRICT = ConfigDict(extra="forbid")

T = TypeVar("T")
Execution = Annotated[T, "execution"]
"""Marks a field that decides where and how fast things run, never what comes out. Every other field is part of the identity of
what a stage makes."""
ExpertsOnly = Annotated[T, "experts only"]
"""Marks a field of `train` that the seed, trained before the experts and the controls, does not depend on."""


def task_name(uri: str) -> str:
    """The name of a few-shot task: its file's, without the endings."""
    return uri.rpartition("/")[2].removesuffix(".gz").removesuffix(".jsonl")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RunSettings:
    dir: Execution[Text]
    """Where everything goes: a local path or a URI (s3://, gs://)."""
    shared: Execution[tuple[Text, ...]] = ()
    """Run directories whose corpus, tokenizer, clusters, shards and seed this run takes where they are finished and its own
    are not, the first that has one, instead of making its own. They must be of the same settings."""
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 0
    """Seed of every random choice: splits, samples, starts, initial weights, data order."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CorpusConfig:
    paths: tuple[Text, ...] = ()
    """Files or folders of documents: .jsonl, .ndjson, .json, .txt (each also .gz, .zst, .zstd, .bz2, .xz), .parquet.
    Empty: installed documentation."""
    valid_paths: tuple[Text, ...] = ()
    """Held-out documents, if the corpus has its own, in files that are not among `paths`; else `valid_fraction` of `paths` is
    held out by a hash of the id."""
    deduplicate: Literal["none", "exact"] = "none"
    """exact: training documents whose text is, character by character, that of a held-out document are left out.
    none: they are counted and stay."""
    packages: tuple[Text, ...] = ()
    """Python packages whose documentation is the corpus when `paths` is empty; the package is the domain."""
    package_bytes: Count = 2_000_000
    """At most this many bytes of documentation from each package."""
    text_column: Text = "text"
    """Column (or JSON key) that holds a document's text."""
    domain_column: Text | None = None
    """Column with a gold domain, used only to report and never to cluster. None: there is none."""
    id_column: Text | None = None
    """Column with a document id, which must be unique: checked among the sampled documents. None: file name and row number."""
    valid_fraction: Annotated[float, Field(gt=0, lt=1), _NUMBER] = 0.02
    """Share of documents held out, where `valid_paths` is empty."""
    sample_documents: Count = 20_000
    """Size of the uniform sample on which tokenizer, embedder and clusterer are fitted, in training documents."""

    def __post_init__(self) -> None:
        if bool(self.paths) == bool(self.packages):
            raise ValueError(
                f"corpus.paths={list(self.paths)} and corpus.packages={list(self.packages)}: give either corpus.paths or "
                "corpus.packages, and [] for the other"
            )
        if len(set(self.packages)) < len(self.packages):
            raise ValueError(f"corpus.packages={list(self.packages)} names a package twice. Keep one")
        if self.valid_paths and not self.paths:
            raise ValueError("corpus.valid_paths needs corpus.paths")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TokensConfig:
    tokenizer: Text = "train"
    """'train' (byte-level BPE on the corpus sample), or a Hugging Face folder or name."""
    vocab_size: Annotated[int, Field(ge=258, le=2**24, strict=True)] = 2048
    """Vocabulary size of a trained tokenizer; a loaded one keeps its own."""
    sequence_length: Annotated[int, Field(ge=8, strict=True)] = 256
    """Tokens in a training sequence and in an evaluation window."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EmbedConfig:
    embedder: Literal["token_tfidf", "word_tfidf", "sentence"] = "token_tfidf"
    """tf-idf over tokens (routing costs a row addition a token), over words (the paper's), or a Hugging Face encoder."""
    dimensions: Annotated[int, Field(ge=2, strict=True)] = 100
    """Dimensions of a tf-idf embedding (paper section 3.2: 100); an encoder has its own."""
    normalisation: Literal["l2", "standard"] = "l2"
    """word_tfidf: rows of unit length (the paper's code), or dimensions of mean 0 and variance 1 (the paper's text)."""
    encoder: Text | None = None
    """sentence: a folder, URI or Hugging Face name of the encoder; its copy in the run is used from then on."""
    encoder_tokens: Count = 256
    """sentence: tokens that the encoder reads, the first of a document and the last of a context."""
    refresh_tokens: Count = 16
    """sentence: tokens between two readings of a growing context."""
    batch_documents: Execution[Count] = 32
    """sentence: documents that the encoder reads at once."""
    gpus: Execution[Gpus] = 0
    """sentence: GPUs of one worker that embeds documents; fractions of one are allowed."""

    def __post_init__(self) -> None:
        if (self.embedder == "sentence") != (self.encoder is not None):
            raise ValueError("embed.encoder goes with embed.embedder=sentence: set both, or neither")
        if self.normalisation == "standard" and self.embedder != "word_tfidf":
            raise ValueError("embed.normalisation=standard goes with embed.embedder=word_tfidf")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ClusterConfig:
    n_clusters: Count = 8
    """K: clusters, and so experts."""
    balanced: bool = True
    """Equal cluster sizes while fitting (paper section 3.2); False is the unbalanced control."""
    max_iter: Count = 50
    """Most Lloyd iterations."""
    tol: FromZero = 1e-4
    """Stop when the centers move less than this: summed squared shift over the embeddings' variance."""
    refine: Literal["none", "likelihood"] = "likelihood"
    """likelihood: after k-means, documents go to the cluster whose bigram model explains them best, and the models are fitted
    again. none: to the nearest center (the paper's way)."""
    refine_rounds: Count = 4
    """Most rounds of it; fewer, if no document moves."""
    refine_tokens: Count = 1024
    """Tokens of a document, the first ones, that are counted and scored in it."""
    actors: Execution[Annotated[int, Field(ge=1, le=16, strict=True)]] = 2
    """Ray actors that hold the embeddings while fitting, at most 16."""
    gpus_per_actor: Execution[Gpus] = 0
    """GPUs of one such actor; fractions of one are allowed."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SeedModelConfig:
    name_or_path: Text | None = None
    """Hugging Face causal LM to start from, a folder or a name. None: a new Llama-architecture model of the sizes below."""
    hidden_size: Count = 64
    """Width of a new model."""
    n_layers: Count = 2
    """Layers of a new model."""
    n_heads: Count = 2
    """Attention heads of a new model; divides hidden_size."""
    intermediate_size: Count = 256
    """Width of a new model's feed-forward layers."""
    train_tokens: NonNegative = 0
    """Tokens that the seed is trained on before branching; 0 takes the model of `name_or_path` as it is."""
    learning_rate: Positive = 2e-3
    """Peak learning rate of the seed's own training."""
    cpus: Execution[Count | None] = None
    """CPUs of the seed's training. None: all of the largest node that has `train.gpus_per_expert` too, or as many as
    `train.cpus_per_expert` where no such node is up yet."""
    final_lr_fraction: Fraction = 0.5
    """Learning rate at the end of the seed's training, as a share of its peak."""

    def __post_init__(self) -> None:
        if self.name_or_path is None and self.train_tokens == 0:
            raise ValueError("a new seed model needs seed_model.train_tokens >= 1, or set seed_model.name_or_path")
        if self.hidden_size % self.n_heads:
            raise ValueError(f"seed_model.hidden_size={self.hidden_size} must be a multiple of n_heads={self.n_heads}")
        if self.name_or_path is None and (width := self.hidden_size // self.n_heads) > 1 and width % 2:
            raise ValueError(
                f"seed_model.hidden_size={self.hidden_size} over n_heads={self.n_heads} makes heads of {width}, which must be "
                "even for rotary positions"
            )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainConfig:
    total_tokens: ExpertsOnly[Count] = 1_600_000
    """Training budget of the whole system, which the K experts share; the dense control gets all of it."""
    budget: ExpertsOnly[Literal["equal", "by_size"]] = "equal"
    """How the experts share it: total/K each (the paper's rule), or in proportion to their clusters' training tokens."""
    warm_start: ExpertsOnly[Text | None] = None
    """Directory of a finished run with the same tokenizer and clusterer: experts and controls go on from its own instead of
    from the seed, with new optimizers. `total_tokens` are the new tokens."""
    clusters: Execution[Annotated[tuple[NonNegative, ...], Field(min_length=1)] | None] = None
    """Clusters whose experts to train now, the controls and the other experts later. None: all experts and the controls."""
    controls: ExpertsOnly[tuple[Control, ...]] = ()
    """Controls to train, each on the same budget: experts of documents split by chance, by k-means without balance, or by
    `corpus.domain_column`; and one mixture of experts, the seed upcycled to `cluster.n_clusters` experts of which two run.
    They may be added to a finished run, whose evaluation is then to be redone."""
    trainable: ExpertsOnly[Literal["all", "ffn"]] = "all"
    """ffn: experts, those of controls too, train their feed-forward layers alone, so that `jobs.export_moe` merges them
    exactly; attention, embeddings and norms stay the seed's. The dense control and 'moe' train all weights in any case."""
    batch_size: Count = 16
    """Sequences in an optimizer step."""
    micro_batch_size: Execution[Count | None] = None
    """Sequences that go through a worker's model at once; the step adds up their gradients. None: its whole share."""
    learning_rate: ExpertsOnly[Positive] = 1e-3
    """Peak learning rate of the experts and the controls."""
    final_lr_fraction: ExpertsOnly[Fraction] = 0.0
    """Learning rate at the end, as a share of the peak."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Shape of the decay after warm-up (the paper's code: linear to 0)."""
    warmup_steps: NonNegative = 10
    """Optimizer steps from 0 to the peak learning rate."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    weight_decay: FromZero = 0.0
    """AdamW weight decay of matrices; vectors (norms, biases) have none."""
    clip_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward pass; bf16 is faster on GPUs and on CPUs with AMX or AVX512-BF16, and slower elsewhere."""
    cross_documents: bool = True
    """Tokens attend to the documents before their own in a training sequence. False: to their own document alone."""
    activation_checkpointing: Execution[bool] = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more time."""
    compile: Execution[bool] = False
    """torch.compile: a minute at the start for faster steps; on CPUs it needs a C++ compiler on every node."""
    slots: Execution[Count | None] = None
    """Experts that train at once. None: as many as the cluster's CPUs and GPUs hold."""
    experts_per_run: Execution[Count] = 1
    """Experts that one Ray Train run trains one after the other. Starting a run costs 10 to 20 s of a CPU: a share that
    counts only where experts train for seconds. A run that fails for good leaves its later experts untrained too."""
    cpus_per_expert: Execution[Cpus] = 1
    """CPUs of one expert's training."""
    gpus_per_expert: Execution[Gpus] = 0
    """GPUs of one expert's training; fractions of one are allowed."""
    workers_per_expert: Execution[Count] = 1
    """Workers that share the batch, the CPUs and the GPUs of one expert (and of the seed and each control) equally."""
    parallel: Execution[Literal["ddp", "fsdp"]] = "ddp"
    """How they do it: every worker holds the whole model, or (FSDP2) its share of weights, gradients and moments."""
    log_every: Execution[Count] = 10
    """Optimizer steps between two points of the training curve."""
    tensorboard: Execution[bool] = False
    """Write every curve to `run.dir`/tensorboard too, with each checkpoint and at the end."""
    trackers: Execution[tuple[Literal["mlflow", "wandb"], ...]] = ()
    """Experiment trackers that receive every point of every curve; set up on every node, see `trackers.py`."""
    checkpoint_every: Execution[Count] = 200
    """Optimizer steps between two checkpoints: what a killed worker loses at most."""
    notice_every: Execution[Count] = 10
    """Optimizer steps between two looks for a notice that the node will be taken away, on which a checkpoint is written."""
    evaluate_every: Execution[Count | None] = None
    """Optimizer steps between two losses on the branch's own held-out documents. None: only at the end."""
    evaluate_sequences: Execution[Count] = 32
    """Held-out sequences that such a loss reads, at most."""
    max_failures: Execution[NonNegative] = 3
    """Restarts of one expert after errors, and after nodes lost without a notice."""

    def __post_init__(self) -> None:
        if len(set(self.controls)) < len(self.controls):
            raise ValueError(f"train.controls={list(self.controls)} names a control twice. Keep one")
        if self.batch_size % self.workers_per_expert:
            raise ValueError(
                f"train.batch_size={self.batch_size} must be a multiple of "
                f"train.workers_per_expert={self.workers_per_expert}"
            )
        if self.workers_per_expert > 1 and self.gpus_per_expert % self.workers_per_expert:
            raise ValueError(
                f"train.gpus_per_expert={self.gpus_per_expert:g} must be 0 or give each of "
                f"train.workers_per_expert={self.workers_per_expert} a GPU of its own, or the same number more"
            )
        if self.cpus_per_expert / self.workers_per_expert < LEAST_SHARE:
            raise ValueError(
                f"train.cpus_per_expert={self.cpus_per_expert:g} must give each of "
                f"train.workers_per_expert={self.workers_per_expert} at least {LEAST_SHARE:.4f}"
            )
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"train.micro_batch_size={self.micro_batch_size} must be at most train.batch_size={self.batch_size}"
            )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class NgramsConfig:
    """Bigram models of the clusters' tokens, the evidence of n-gram routing."""

    pairs: Count = 500_000
    """Pairs of tokens that have a row of their own, the most frequent ones: 2 K + 8 bytes each."""
    tokens: Count = 50_000_000
    """Training tokens to count, drawn by document; all, if there are fewer."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EvaluateConfig:
    top_k: tuple[Count, ...] = (1, 2, 4)
    """Sizes of the sparse ensemble to report, beside all experts; those of K and more are the same as all."""
    routings: Annotated[tuple[Routing, ...], Field(min_length=1)] = (
        "embedding",
        "ngram",
        "posterior",
        "prefix",
    )
    """Routers of the ensemble to tune and report (see `routers.py`). The endpoint can serve the routers among them that run no
    expert for its likelihood. Controls have their own routers."""
    max_documents: Annotated[int, Field(ge=2, strict=True)] = 2000
    """At most this many held-out documents, those with the smallest hash: half of them tune, half are reported on."""
    temperatures: Annotated[tuple[Tunable, ...], Field(min_length=1)] = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 1.0)
    """Candidates for T in softmax(-d^2 / T); chosen on one half of the held-out documents, reported on the other."""
    legacy_d4: bool = False
    """Embedding routing as the paper's released code has it, softmax(-d^4 / T); posterior and prefix routing keep d^2."""
    betas: Annotated[tuple[Tunable, ...], Field(min_length=1)] = (0.5, 1.0)
    """Candidates for posterior routing's weight of the experts' evidence."""
    gammas: Annotated[tuple[Fraction, ...], Field(min_length=1)] = (0.9, 0.95, 0.98)
    """Candidates for posterior routing's forgetting, per token."""
    ngram_betas: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.2, 0.35, 0.5, 1.0)
    """Candidates for n-gram routing's weight of the n-grams' evidence. It is tried without the embedding's distances too."""
    ngram_gammas: Annotated[tuple[Fraction, ...], Field(min_length=1)] = (0.95, 0.99, 1.0)
    """Candidates for n-gram routing's forgetting, per token."""
    reread_costs: Annotated[tuple[FromZero, ...], Field(min_length=1)] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
    """Candidates for the evidence, in nats, that an expert must lead by for each token that it would have to read before it
    takes over in n-gram routing."""
    reread_share: FromZero = 0.1
    """Tokens that experts may read again in n-gram routing, as a share of the tokens that are mixed. The tuning keeps to it
    where one of its candidates does."""
    prefix_tokens: Count = 32
    """Tokens of a document that all experts read in prefix routing, before the best top-k stay for good."""
    prefix_lengths: tuple[Count, ...] = (8, 16, 32, 64, 128, 256)
    """Lengths of the prefix, in tokens, after which routing is held to show how much of a text it has to see.
    Empty: not shown."""
    fewshot: tuple[Text, ...] = ()
    """Few-shot tasks to report accuracy on: JSONL files of examples, see `fewshot.py`."""
    fewshot_shots: Count = 8
    """Labeled examples shown in a prompt."""
    fewshot_seeds: Annotated[tuple[NonNegative, ...], Field(min_length=1)] = (13, 21, 42, 87, 100)
    """Seeds of the draws of these examples; accuracy is the mean over them."""
    fewshot_examples: Count = 200
    """Test examples of a task at most, the same for all seeds."""
    batch_tokens: Execution[Count] = 8192
    """Tokens in a scoring batch."""

    def __post_init__(self) -> None:
        if len({task_name(uri) for uri in self.fewshot}) < len(self.fewshot):
            raise ValueError(f"evaluate.fewshot={list(self.fewshot)} names a task twice. Rename a file, or keep one")
        if len(set(self.routings)) < len(self.routings):
            raise ValueError(f"evaluate.routings={list(self.routings)} names a router twice. Keep one")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ExportConfig:
    """What is made of a finished run for other engines."""

    moe_top_k: Count = 1
    """Experts that the merged mixture of experts runs for a token."""
    ridge_tokens: Count = 200_000
    """Training tokens, as many of each cluster, on which its routers are fitted in closed form."""
    router_tokens: NonNegative = 0
    """Tokens of all documents on which its routers alone are trained after that, in whole optimizer steps. 0: they are not."""
    router_learning_rate: Positive = 1e-3
    """Peak learning rate of that training."""
    rank: Count = 16
    """Rank of the adapters that are written; some engines take 8, 16, 32, 64 and so on alone."""
    embeddings: bool = False
    """Whether adapters change the token embeddings too. PEFT loads such adapters, vLLM does not where input and output
    embeddings are one."""
    ranks: tuple[Count, ...] = (1, 4, 16, 64)
    """Ranks whose perplexity is measured beside it."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SweepConfig:
    clusters: Execution[tuple[Count, ...]] = ()
    """Numbers of clusters of `jobs.sweep_clusters`. Empty: that of cluster.n_clusters alone."""
    total_tokens: Execution[tuple[Count, ...]] = ()
    """Training budgets. Empty: that of train.total_tokens alone."""
    dense_runs: Execution[tuple[Text, ...]] = ()
    """Finished runs on the same corpus whose dense control, of a larger model say, stands in the sweep's table of costs."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Config:
    """Everything one run needs to know."""

    run: RunSettings
    corpus: CorpusConfig
    tokens: TokensConfig = field(default_factory=TokensConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    seed_model: SeedModelConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    ngrams: NgramsConfig = field(default_factory=NgramsConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def __post_init__(self) -> None:
        if self.corpus.sample_documents < self.cluster.n_clusters:
            raise ValueError(
                f"corpus.sample_documents={self.corpus.sample_documents} must be at least "
                f"cluster.n_clusters={self.cluster.n_clusters}"
            )
        if "metadata" in self.train.controls and not (self.corpus.domain_column or self.corpus.packages):
            raise ValueError(
                "train.controls has 'metadata', which needs the domain of every document: set corpus.domain_column, or "
                "leave it out"
            )
        if "unbalanced" in self.train.controls and not self.cluster.balanced:
            raise ValueError(
                "train.controls has 'unbalanced', which is what cluster.balanced=False makes of the experts already: leave "
                "it out"
            )
        if "moe" in self.train.controls and self.cluster.n_clusters < 2:
            raise ValueError(
                f"train.controls has 'moe', which runs 2 of cluster.n_clusters={self.cluster.n_clusters} experts for every "
                "token: raise that to 2, or leave it out"
            )
        if (clusters := self.train.clusters) is not None and max(clusters) >= self.cluster.n_clusters:
            raise ValueError(
                f"train.clusters={list(clusters)} must be below cluster.n_clusters={self.cluster.n_clusters}"
            )
        self.steps_each(self.cluster.n_clusters)

    @property
    def tokens_per_step(self) -> int:
        """Tokens in an optimizer step."""
        return self.train.batch_size * self.tokens.sequence_length

    def steps_each(self, n_experts: int) -> int:
        """Optimizer steps that `train.total_tokens` gives each of so many experts; UserError if it gives none."""
        steps = self.train.total_tokens // n_experts // self.tokens_per_step
        if steps == 0:
            raise UserError(
                f"train.total_tokens={self.train.total_tokens} must give each of the {n_experts} experts at least one step of "
                f"{self.tokens_per_step} tokens; raise it to {n_experts * self.tokens_per_step}."
            )
        return steps


def _marked(mark: Any) -> frozenset[str]:
    """The dotted names of the fields whose types have the mark."""
    return frozenset(
        f"{section}.{name}"
        for section, owner in get_type_hints(Config).items()
        for name, hint in get_type_hints(owner, include_extras=True).items()
        if mark.__metadata__[0] in getattr(hint, "__metadata__", ())
    )


EXECUTION_FIELDS, EXPERTS_ONLY_FIELDS = _marked(Execution), _marked(ExpertsOnly)
