"""The names of the schemes of `edit --quantize`, for those who must not wait for torch (see `schemes`)."""

from typing import Literal

SchemeName = Literal["fp8", "mxfp4", "nvfp4"]
