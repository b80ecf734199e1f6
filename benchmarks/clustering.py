"""Balanced assignment and k-means beside their peers, in one run: python -m benchmarks.clustering [--n 50000 --k 64]

    N documents, D embedding dims, K clusters

Two tables. Assignment: the same documents to the same centers, by dual prices (ours) and by auction. Fit: k-means from
the same number of iterations, also by k-means-constrained (exact flow) and the unbalanced k-means of scikit-learn and
faiss. Peers that are not installed are named in the table; benchmarks/requirements.txt has them. The last line of the
output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cbtm_ray.cluster.balanced_assignment import Assignment, assign_points
from cbtm_ray.cluster.kmeans import BalancedKMeans
from cbtm_ray.cluster.shard_steps import squared_distances

MISSING = "not installed"


def skewed_documents(n: int, dim: int, seed: int, n_domains: int = 40) -> Tensor:
    """(N, D) unit vectors around domains of very unequal sizes, as embedded text is: balance has work to do."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(n_domains, dim))
    share = np.exp(rng.normal(size=n_domains))
    domain = rng.choice(n_domains, size=n, p=share / share.sum())
    points = torch.empty(n, dim)
    for rows in np.array_split(np.arange(n), max(n // 50_000, 1)):
        block = centers[domain[rows]] + rng.normal(size=(len(rows), dim))
        points[rows[0] : rows[-1] + 1] = torch.nn.functional.normalize(torch.from_numpy(block).float())
    return points


def auction_assignment(scores_NK: Tensor, epsilon: float, max_rounds: int) -> tuple[Tensor | None, int]:
    """Labels (N,) with N / K documents in each cluster, and the rounds it took (Bertsekas 1979; BASE layers 2021).

    A cluster has N / K seats. In a round each cluster with free seats bids for as many of the documents that it lacks,
    those worth most to it at present prices: by how much each beats the first that it leaves out, plus epsilon. The
    highest bid takes the document from whoever holds it and raises its price. It ends when all seats are taken; the
    sum of scores is then within N * epsilon of the best. None if it has not ended in `max_rounds`: price wars are long.
    """
    n, n_clusters = scores_NK.shape
    assert n % n_clusters == 0, "the auction is for equal sizes"
    scores, prices = scores_NK.T.contiguous(), scores_NK.new_zeros(n)
    labels = torch.full((n,), -1)
    for rounds in range(1, max_rounds + 1):
        free = n // n_clusters - torch.bincount(labels[labels >= 0], minlength=n_clusters)
        bidders = (free > 0).nonzero()[:, 0]
        if not len(bidders):
            return labels, rounds
        worth = (scores[bidders] - prices).masked_fill_(labels == bidders[:, None], -torch.inf)
        best, wanted = worth.topk(min(int(free.max()) + 1, n), dim=1)
        seats = free[bidders][:, None]
        raises = best - best.gather(1, seats.clamp(max=best.shape[1] - 1)) + epsilon
        raises.masked_fill_(torch.arange(best.shape[1])[None] >= seats, 0)
        bids = torch.zeros(len(bidders), n).scatter_(1, wanted, raises)
        highest, winner = bids.max(0)
        won = highest > 0
        labels[won] = bidders[winner[won]]
        prices += highest
    return None, max_rounds


def clock(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, seconds, and seconds of all processors: on a busy machine only the latter can be compared."""
    start, cpu_start = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - start, time.process_time() - cpu_start


def peak_mem_gib() -> float:
    """The most memory that this process has had, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def spread(labels: np.ndarray, n_clusters: int) -> int:
    """Largest minus smallest cluster, in documents."""
    return int(np.ptp(np.bincount(labels, minlength=n_clusters)))


def compare_assignments(points: Tensor, centers: Tensor, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Dual prices and auction on the same distances, whose making both times include.

    If the auction does not end, its speedup is a lower bound and there is no cost to compare with.
    """
    n_clusters = len(centers)
    runs = [clock(lambda: assign_points(points, centers)) for _ in range(args.repeat)]
    ours, seconds, cpu = min(runs, key=lambda run: run[1])
    peak = peak_mem_gib()

    sizes = spread(ours.labels, n_clusters)
    table = Table(
        "assignment", "time, s", "CPU, s", "cost", "gap to the bound", "max - min size", title="The same centers"
    )
    table.add_row("ours", f"{seconds:.2f}", f"{cpu:.2f}", f"{ours.cost:.6f}", f"{ours.gap:.1e}", str(sizes))
    found = {"gap": ours.gap, "max_minus_min_size": sizes, "seconds": round(seconds, 3), "peak_mem_gib": round(peak, 2)}
    if args.auction_rounds:
        found |= compare_auction(points, centers, ours, (seconds, cpu), args, table)
    console.print(table)
    return found


def compare_auction(
    points: Tensor,
    centers: Tensor,
    ours: Assignment,
    our_times: tuple[float, float],
    args: argparse.Namespace,
    table: Table,
) -> dict[str, Any]:
    def auction() -> tuple[Tensor | None, int]:
        d = squared_distances(points, centers)
        return auction_assignment(-d, args.auction_epsilon * float(d.max() - d.min()), args.auction_rounds)

    (labels, rounds), auction_seconds, auction_cpu = clock(auction)
    row, ratio = [f"auction ({rounds} rounds)", f"{auction_seconds:.2f}", f"{auction_cpu:.2f}"], None
    gap = None
    if labels is None:
        row += ["did not end", "", ""]
    else:
        cost = float(squared_distances(points, centers).double()[torch.arange(len(points)), labels].mean())
        gap = (cost - ours.lower_bound) / cost
        row += [f"{cost:.6f}", f"{gap:.1e}", str(spread(labels.numpy(), len(centers)))]
        ratio = round(ours.cost / cost, 6)
    table.add_row(*row)
    return {
        "auction_speedup": round(auction_seconds / our_times[0], 2),
        "cost_ratio_to_auction": ratio,
        "auction_seconds": round(auction_seconds, 3),
        "auction_speedup_cpu": round(auction_cpu / our_times[1], 2),
        "auction_gap": gap,
        "auction_ended": labels is not None,
    }


def compare_fits(points: Tensor, args: argparse.Namespace, console: Console) -> None:
    """k-means from scratch; the cost is the mean squared distance to the center of a document's own cluster."""
    from sklearn.cluster import KMeans, MiniBatchKMeans  # a second to import, and only this table needs it

    x, k, seed = points.numpy(), args.k, args.seed
    common = {"n_init": 1, "random_state": seed, "max_iter": args.iterations}
    fits: dict[str, Callable[[], np.ndarray]] = {
        "ours, balanced": lambda: BalancedKMeans(k, max_iter=args.iterations, random_state=seed).fit(x).labels_,
        "ours, unbalanced": lambda: (
            BalancedKMeans(k, balanced=False, max_iter=args.iterations, random_state=seed).fit(x).labels_
        ),
        "scikit-learn KMeans": lambda: KMeans(k, **common).fit(x).labels_,
        "scikit-learn MiniBatchKMeans": lambda: MiniBatchKMeans(k, **common).fit(x).labels_,
        "faiss k-means": lambda: faiss_labels(x, k, args.iterations, seed),
    }
    table = Table(
        "fit",
        "documents",
        "time, s",
        "cost",
        "max - min size",
        "peak so far, GiB",
        title=f"{args.iterations} iterations",
    )
    for name, fit in fits.items():
        add_fit(table, name, fit, x, k)
    few = x[: args.flow_n]
    title = "ours, balanced"
    add_fit(
        table, title, lambda: BalancedKMeans(k, max_iter=args.iterations, random_state=seed).fit(few).labels_, few, k
    )
    add_fit(table, "k-means-constrained", lambda: flow_labels(few, k, common), few, k)
    console.print(table)


def add_fit(table: Table, name: str, fit: Callable[[], np.ndarray], x: np.ndarray, n_clusters: int) -> None:
    try:
        labels, seconds, _ = clock(fit)
    except ImportError as error:
        table.add_row(name, str(len(x)), f"{MISSING}: {error.name}", "", "", "")
        return
    peak = peak_mem_gib()
    counts = np.bincount(labels, minlength=n_clusters)
    sums = np.zeros((n_clusters, x.shape[1]))
    np.add.at(sums, labels, x)
    means = sums / np.maximum(counts, 1)[:, None]
    cost = ((x - means[labels]) ** 2).sum(1).mean()
    table.add_row(name, str(len(x)), f"{seconds:.2f}", f"{cost:.6f}", str(spread(labels, n_clusters)), f"{peak:.2f}")


def faiss_labels(x: np.ndarray, n_clusters: int, iterations: int, seed: int) -> np.ndarray:
    import faiss  # an optional peer

    model = faiss.Kmeans(x.shape[1], n_clusters, niter=iterations, seed=seed, max_points_per_centroid=len(x))
    model.train(x)
    return model.index.search(x, 1)[1][:, 0]


def flow_labels(x: np.ndarray, n_clusters: int, common: dict[str, int]) -> np.ndarray:
    from k_means_constrained import KMeansConstrained  # an optional peer

    floor, extra = divmod(len(x), n_clusters)
    model = KMeansConstrained(n_clusters, size_min=floor, size_max=floor + bool(extra), **common)
    return np.asarray(model.fit(x).labels_, dtype=np.int64)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--n", type=int, default=50_000, help="documents; rounded down to a multiple of k for the auction"
    )
    parser.add_argument("--dim", type=int, default=100, help="embedding dimensions")
    parser.add_argument("--k", type=int, default=64, help="clusters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch's threads, for all; 1 gives steady times on a busy machine")
    parser.add_argument("--repeat", type=int, default=3, help="our assignment is timed so often, the best counts")
    parser.add_argument("--auction-epsilon", type=float, default=0.02, help="as a share of the range of the distances")
    parser.add_argument("--auction-rounds", type=int, default=20_000, help="give up after so many; 0 leaves it out")
    parser.add_argument("--iterations", type=int, default=10, help="Lloyd iterations of the fits; 0 leaves them out")
    parser.add_argument(
        "--flow-n", type=int, default=5000, help="documents for k-means-constrained, whose flow is slow"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    console = Console()
    if args.threads:
        torch.set_num_threads(args.threads)
    n = args.n - args.n % args.k if args.auction_rounds else args.n
    points = skewed_documents(n, args.dim, args.seed)
    chosen = np.random.default_rng(args.seed).choice(len(points), args.k, replace=False)
    console.print(
        f"N = {len(points):,}, D = {args.dim}, K = {args.k}, seed {args.seed}, {torch.get_num_threads()} threads"
    )
    result = compare_assignments(points, points[chosen], args, console)
    if args.iterations:
        compare_fits(points, args, console)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
