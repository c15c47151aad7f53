"""The suite runs on the CPU, also where there is a GPU: its exact comparisons are of fp32 on one device. And without a network.

For test_gpu.py: CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_gpu.py
"""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ["HF_HUB_OFFLINE"] = "1"
