"""Data of the RF-DETR scripts: the Roboflow layout (roboflow.py), its masks (mask_codes.py), augmentation
(transforms.py) and batches (batches.py)."""
