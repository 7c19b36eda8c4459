"""PyTorch"""
try:
    import ml_dtypes
    import torch
except ImportError as error:
    raise ImportError('fastbn.torch needs torch and ml_dtypes: pip install "fastbn[torch]"') from error

from .layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, convert_batchnorm

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "convert_batchnorm"]
