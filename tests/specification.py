"""Mesh-TensorFlow's token routing as slow, plain float64 loops: what the gate must do, sharing no code with it.

A *group* is one row b of the leading dimension; capacity, slots and the balance loss are per group. Rank 0 is a token's
best expert.
"""

from types import SimpleNamespace

import numpy as np

EPS = 1e-9


def softmax(row):
    z = np.exp(row - row.max())
    return z / z.sum()


def logsumexp(row):
    m = row.max()
    return m + np.log(np.exp(row - m).sum())


def router_z_loss(logits, mask=None):
    """mean over real tokens (mask == 1) of logsumexp(logits)^2; all tokens are real without a mask"""
    total, count = 0.0, 0
    for b in range(logits.shape[0]):
        for t in range(logits.shape[1]):
            if mask is None or mask[b, t] == 1:
                total += logsumexp(logits[b, t]) ** 2
                count += 1
    return total / count


def wants_rank(policy, gate, draw, threshold):
    """does a token ask for its rank-r expert (r >= 1)? `gate` is normalised over the chosen n."""
    if policy == "all":
        return True
    if policy == "none":
        return False
    if policy == "threshold":
        return gate > threshold
    if policy == "random":
        return draw < gate / max(threshold, EPS)  # probability min(1, gate / threshold)
    raise ValueError(policy)


def route(
    logits,
    draws,
    top_n,
    thresholds,
    policy,
    capacity,
    mask=None,
    *,
    flavour="top_n",
    second_place_loss=False,
    balance_denominator="group",
):
    """Route by loops: experts, slots and gates of every token, and the losses.

    logits [b,n,e]; draws [top_n,b,n] uniform in [0,1), row 0 is never read;
    thresholds: a number, or one per rank (entry 0 unused); mask [b,n]: 1 real, 0 padding, or None.

    flavour 'top_2' and 'top_n' agree unless the mask holds values strictly between 0 and 1
    ("importance" in a hierarchical MoE): top_n routes those tokens fully, top_2 gives them no
    rank-0 expert and offers their best expert at rank-1 priority with gate 1.

    balance_denominator: 'group' is Mesh-TF's (divide by the padded group size); 'real' divides by
    the number of real tokens and skips empty groups (padding-invariant; not Mesh-TF).

    Returns .assignments[b][t] = [(expert, slot, gate), ...] in rank order, dropped ranks absent
            .first[b][t] = rank-0 expert or None;  .balance_loss, .z_loss, .second_place_loss
    """
    logits = np.asarray(logits, np.float64)
    B, N, E = logits.shape
    if np.isscalar(thresholds):
        thresholds = [thresholds] * top_n
    assignments = [[[] for _ in range(N)] for _ in range(B)]
    first = [[None] * N for _ in range(B)]
    group_losses, second_losses = [], []

    for b in range(B):
        # 1. each token names its experts, and a gate for each; nothing here depends on capacity
        asks = [[None] * N for _ in range(top_n)]  # asks[rank][t] = (expert, gate) or None
        probs = [softmax(logits[b, t]) for t in range(N)]
        rest1 = [None] * N  # probabilities left over, for the second-place loss
        second = [None] * N
        for t in range(N):
            imp = 1.0 if mask is None else float(mask[b, t])
            left = probs[t].copy()
            chosen = []  # (expert, raw gate, is a real choice)
            for r in range(top_n):
                ex = int(np.argmax(left))  # ties: lowest expert index
                real = imp > 0
                if flavour == "top_2" and r == 0:
                    real = imp == 1
                g = left[ex] if real else 0.0
                chosen.append((ex, g, real))
                if real:
                    left[ex] = 0.0  # a skipped rank does not use up the expert
                if r == 0 and flavour == "top_2" or r == 1 and flavour == "top_n":
                    rest1[t] = left.copy()
            if top_n > 1:  # a single expert keeps its raw probability
                denom = sum(g for _, g, _ in chosen) + EPS
                chosen = [(ex, g / denom, real) for ex, g, real in chosen]
            if chosen[0][2]:
                first[b][t] = chosen[0][0]
            which = 1 if flavour == "top_2" else 2  # Mesh-TF top_n looks at rank 2, not rank 1
            if second_place_loss and chosen[which][2]:
                second[t] = chosen[which][0]
            for r, (ex, g, real) in enumerate(chosen):
                if real and (r == 0 or wants_rank(policy, g, draws[r][b][t], thresholds[r])):
                    asks[r][t] = (ex, g)

        # 2. slots: rank by rank, within a rank in token order; a full expert drops the request.
        #    Gates are not renormalised after a drop.
        used = [0] * E
        for r in range(top_n):
            for t in range(N):
                if asks[r][t] is None:
                    continue
                ex, g = asks[r][t]
                if used[ex] < capacity:
                    assignments[b][t].append((ex, used[ex], g))
                    used[ex] += 1

        # 3. balance loss: E * sum_i f_i P_i, with f from first choices BEFORE any drop
        f, P, real_tokens = np.zeros(E), np.zeros(E), 0
        for t in range(N):
            if first[b][t] is not None:
                f[first[b][t]] += 1
            if mask is None or mask[b, t] == 1:
                P += probs[t]
                real_tokens += 1
        if balance_denominator == "group":
            group_losses.append(E * float(np.sum(f / N * P / N)))
        elif real_tokens:
            group_losses.append(E * float(np.sum(f / real_tokens * P / real_tokens)))
        if second_place_loss:
            f2, P2 = np.zeros(E), np.zeros(E)
            for t in range(N):
                if second[t] is not None:
                    f2[second[t]] += 1
                P2 += rest1[t] / (rest1[t].sum() + EPS)  # padding is not masked out here (Mesh-TF)
            second_losses.append(E * float(np.sum(f2 / N * P2 / N)))

    second = 0.5 * float(np.mean(second_losses)) if second_place_loss else 0.0
    return SimpleNamespace(
        assignments=assignments,
        first=first,
        second_place_loss=second,
        balance_loss=float(np.mean(group_losses)) + second,
        z_loss=router_z_loss(logits, mask),
    )
