"""Megatron-core must be mended before any test module imports it."""

from mmcore import host

host.use_host()
