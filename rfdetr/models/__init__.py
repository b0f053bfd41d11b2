"""Networks of RF-DETR that are ours: the mask heads."""
