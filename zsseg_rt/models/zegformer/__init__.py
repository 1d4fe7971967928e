"""ZegFormer, which proposes segments and classifies them."""
