"""OWL: sparsities of decoder layers from their outliers.

Yin et al. 2023, https://arxiv.org/abs/2310.05175: D_l is the share of weights of layer l whose
|w| ‖x‖ is above M times the layer's mean; the more outliers, the more is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

# The paper's choices for LLaMA.
M, LAMBDA = 5.0, 0.08


def owl_sparsities(
    outliers: Sequence[float], sparsity: float, spread: float = LAMBDA
) -> list[float]:
    """Sparsity of each decoder layer: S + mean(r) − r_l with r_l = 2λ (D_l − min) / (max − min).

    So does the published code; the mean is S, and no two layers are further apart than 2λ.

    Args:
        outliers: D_l.
        sparsity: S, the mean over the layers.
        spread: λ.
    """
    low, high = min(outliers), max(outliers)
    width = high - low
    moved = [2 * spread * (own - low) / width if width else 0.0 for own in outliers]
    mean = sum(moved) / len(moved)
    return [sparsity + mean - own for own in moved]
