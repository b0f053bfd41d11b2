"""Data of the RF-DETR scripts: the Roboflow layout (roboflow.py) and its augmentation (transforms.py)."""
