"""RF-DETR: detector, mask heads, losses, data and training (Robinson et al., arXiv 2511.09554)."""
