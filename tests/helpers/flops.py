"""What torch counts of a model's matrix products, as the cost model has them."""

from torch.utils.flop_counter import FlopCounterMode


def of_products(counter: FlopCounterMode) -> int:
    """All but the angles of positions, a matrix product in some versions of transformers."""
    counts = counter.get_flop_counts()
    everywhere = sum(flops for name, flops in counts["Global"].items() if "mm" in str(name))
    return everywhere - sum(sum(kinds.values()) for name, kinds in counts.items() if name.endswith(".model.rotary_emb"))
