"""How old a trajectory may be when it is trained on, and how many groups that lets out.

Integer arithmetic only. The bound is on the trajectory, queue time included.
"""

from collections.abc import Iterable


def staleness(learner_version: int, token_versions: Iterable[int]) -> int:
    """Distance in versions from the learner to the farthest policy that sampled a token.

        staleness = max over tokens of |learner_version - version|

    After a resume a version can be ahead of the learner: those weights no longer exist, and
    the distance counts the same.

    Args:
        token_versions: of each token, or of each run of tokens with one version.
    Raises:
        ValueError: there is no version.
    """
    distances = [abs(learner_version - version) for version in token_versions]
    if not distances:
        raise ValueError("a trajectory without a sampled token has no staleness")
    return max(distances)


def admissible(num_outstanding: int, *, max_staleness: int, groups_per_batch: int) -> int:
    """How many more groups may be issued now, so that none need grow too stale.

        num_outstanding + admissible <= (max_staleness + 1) * groups_per_batch

    A group is outstanding from its issue until it is dropped, or until it is trained and the
    version that contains it is published.

    Proof of the bound. Let G = groups_per_batch and S = max_staleness. Version v is published
    when batches 0 .. v-1 are trained, and batch k is taken by the learner at version k. Let a
    group be issued while v is the published version; no token of it is sampled by an older one.
    The groups of batches 0 .. v-1 are no longer outstanding, so with itself at most (S + 1) G
    groups share the batches v, v+1, ... before or with it. Consumed first in, first out, G to
    a batch, it is in batch v + S at the latest, where the learner's version is v + S: its
    staleness is at most S. Drops only move it forward.
    When completions overtake each other, a slow group can miss its batch. Then the learner's
    check (drop where staleness > max_staleness) keeps the bound, strictly and in every case;
    admission keeps drops rare. Batches fill in either case: at least G groups may be out, and a
    dropped group makes room for another.

    Args:
        max_staleness: versions; 0 is synchronous training.
    Returns:
        At least 0, also where a changed configuration left more out than it allows.
    Raises:
        ValueError: num_outstanding or max_staleness is negative, or groups_per_batch < 1.
    """
    if num_outstanding < 0 or max_staleness < 0 or groups_per_batch < 1:
        raise ValueError(
            "need num_outstanding >= 0, max_staleness >= 0 and groups_per_batch >= 1, got "
            f"{num_outstanding}, {max_staleness} and {groups_per_batch}"
        )
    return max(0, (max_staleness + 1) * groups_per_batch - num_outstanding)
