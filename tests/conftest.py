"""The suite runs on the CPU, also where there is a GPU: its exact comparisons are of fp32 on one device."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
