from __future__ import annotations

import gc
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxoptimizer
import onnxruntime
import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v3_small

import fxopt
from fxopt.backend import FixedBatchWarning
from fxopt.errors import BackendError, BackendUnavailable, InputError
from fxopt.lowering import OnnxBackend
from fxopt.lowering.onnx_optimize import SAFE_PASSES
from fxopt.lowering.onnx_session import OnnxEngine
from fxopt.program import BatchAxis, Program
from fxopt.registry import make_backend
from fxopt.verify import outputs_of  # placeholder
